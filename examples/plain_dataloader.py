"""Smart batches in a loop of your own, without Lightning: the sampler and the collator alone.

python examples/plain_dataloader.py
"""

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from smartbatch_lightning import BatchSpec, PadCollator, SmartBatchSampler, demo

REVIEWS = [("a fine film", 1), ("a dull film, and far too long for what it has to say", 0), ("warm and funny", 1)] * 32


def main(epochs: int = 2) -> list[float]:
    name = str(demo.model_dir())  # or a name on the Hub
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
    model.train()  # from_pretrained returns models in evaluation mode, without dropout
    rows = [{"input_ids": tokenizer(text)["input_ids"], "label": label} for text, label in REVIEWS]
    sampler = SmartBatchSampler([len(row["input_ids"]) for row in rows], BatchSpec(batch_size=8, seed=321))
    loader = DataLoader(rows, batch_sampler=sampler, collate_fn=PadCollator(tokenizer.pad_token_id))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)  # each epoch has a plan of its own
        for batch in loader:  # input_ids, attention_mask, labels
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        print(f"epoch {epoch}: loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
