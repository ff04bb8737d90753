"""A LightningModule of your own with a SmartBatchDataModule, padded or packed.

python examples/own_module.py            # padded to the longest text of a batch
python examples/own_module.py packed     # without padding
"""

import sys

import lightning as L
import torch
from transformers import AutoModelForSequenceClassification

from smartbatch_lightning import SmartBatchDataModule, demo
from smartbatch_lightning.models.packing import enable_packing

NOT_INPUTS = ("index", "labels", "loss_weight", "num_samples")


class Reviewer(L.LightningModule):
    """Learns two classes with AdamW."""

    def __init__(self, pretrained: str) -> None:
        super().__init__()
        self.model = AutoModelForSequenceClassification.from_pretrained(pretrained, num_labels=2)
        self.model.train()  # from_pretrained returns models in evaluation mode, without dropout
        enable_packing(self.model)  # padded batches still work

    def forward(self, batch):
        inputs = {name: value for name, value in batch.items() if name not in NOT_INPUTS}
        logits = self.model(**inputs).logits
        return logits[: batch.get("num_samples")]  # packed rows that are padded to a multiple have more

    def training_step(self, batch, batch_idx):
        loss = torch.nn.functional.cross_entropy(self(batch), batch["labels"])
        self.log("train_loss", loss, batch_size=len(batch["labels"]))
        return loss * batch["loss_weight"]  # batches hold different numbers of samples

    def validation_step(self, batch, batch_idx):
        accuracy = (self(batch).argmax(1) == batch["labels"]).float().mean()
        self.log("val_accuracy", accuracy, batch_size=len(batch["labels"]), sync_dist=True, on_epoch=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


def main(padding: str = "longest", **trainer_options) -> L.Trainer:
    name = str(demo.model_dir())  # or a name on the Hub, such as bert-base-uncased
    data = SmartBatchDataModule("demo", tokenizer=name, max_length=24, padding=padding)
    trainer = L.Trainer(**{"max_epochs": 1, **trainer_options})
    trainer.fit(Reviewer(name), data)
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
