"""A search for the learning rate and the batch size with Optuna; trials that fall behind the others are pruned.

pip install optuna optuna-integration
python examples/optuna_search.py
"""

import lightning as L
import optuna
from optuna_integration import PyTorchLightningPruningCallback

from smartbatch_lightning import SequenceClassifier, SmartBatchDataModule


def objective(trial: optuna.Trial, **trainer_options) -> float:
    data = SmartBatchDataModule(  # tokenized once: all trials use the same cache
        "demo", max_length=24, batch_size=trial.suggest_categorical("batch_size", [8, 16, 32])
    )
    model = SequenceClassifier("demo", learning_rate=trial.suggest_float("learning_rate", 1e-6, 1e-2, log=True))
    pruning = PyTorchLightningPruningCallback(trial, monitor="val_f1")
    trainer = L.Trainer(
        **{"max_epochs": 3, "logger": False, "enable_checkpointing": False, **trainer_options}, callbacks=[pruning]
    )
    trainer.fit(model, data)
    return float(trainer.callback_metrics["val_f1"])


def main(trials: int = 10, **trainer_options) -> optuna.Study:
    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=321),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=2),  # below the earlier trials' median at the same epoch
    )
    study.optimize(lambda trial: objective(trial, **trainer_options), trials)
    print(f"best: {study.best_params}, val_f1 {study.best_value:.3f}")
    return study


if __name__ == "__main__":
    main()
