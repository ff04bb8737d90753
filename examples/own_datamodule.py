"""A SequenceClassifier with a data module of your own, whose batches are dictionaries of tensors.

python examples/own_datamodule.py
"""

import lightning as L
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorWithPadding

from smartbatch_lightning import SequenceClassifier, demo

REVIEWS = [("a fine film", 1), ("a dull film", 0), ("warm and funny", 1), ("I left before the end", 0)] * 16


class Reviews(L.LightningDataModule):
    """Tokenizes a list of reviews, and pads each batch to its longest."""

    def __init__(self, pretrained: str, batch_size: int = 8) -> None:
        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(pretrained)
        self.batch_size = batch_size

    def setup(self, stage):
        self.rows = [{**self.tokenizer(text), "labels": label} for text, label in REVIEWS]

    def loader(self, rows, shuffle):
        collate = DataCollatorWithPadding(self.tokenizer)
        return DataLoader(rows, self.batch_size, shuffle=shuffle, collate_fn=collate)

    def train_dataloader(self):
        return self.loader(self.rows, shuffle=True)

    def val_dataloader(self):
        return self.loader(self.rows[:16], shuffle=False)


def main(**trainer_options) -> L.Trainer:
    name = str(demo.model_dir())  # or a name on the Hub
    model = SequenceClassifier(name, num_labels=2, learning_rate=1e-3)  # this data module does not supply num_labels
    trainer = L.Trainer(**{"max_epochs": 2, **trainer_options})
    trainer.fit(model, Reviews(name))
    return trainer


if __name__ == "__main__":
    main()
