"""LoRA on a decoder: a few weights are trained, saved, and merged into an ordinary transformers folder.

python examples/lora_decoder.py                                  # a tiny Llama made here, no network
python examples/lora_decoder.py Qwen/Qwen3-0.6B                  # one from the Hub
"""

import sys
from pathlib import Path

import lightning as L
from transformers import AutoTokenizer, LlamaConfig, LlamaModel

from smartbatch_lightning import SequenceClassifier, SmartBatchDataModule, demo
from smartbatch_lightning.export import export_model


def tiny_llama(folder: Path) -> str:
    """A randomly initialized Llama with two layers and the demo's vocabulary."""
    tokenizer = AutoTokenizer.from_pretrained(demo.model_dir())
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaModel(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def main(pretrained: str | None = None, **trainer_options) -> L.Trainer:
    model = SequenceClassifier(
        pretrained or tiny_llama(Path("tiny-llama")),
        learning_rate=1e-3,
        peft_config={"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    )
    data = SmartBatchDataModule("demo", max_length=24, batch_size=16)
    trainer = L.Trainer(**{"max_epochs": 1, **trainer_options})
    trainer.fit(model, data)
    export_model(model, data, "reviewer")  # merged; adapter=True writes the adapter alone
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
