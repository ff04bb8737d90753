"""Converts an exported folder to ONNX and checks that it gives the same logits.

pip install onnx onnxscript onnxruntime
smartbatch fit --export_model.folder=reviewer    # or smartbatch export
python examples/export_onnx.py reviewer          # writes reviewer/model.onnx
"""

import sys

import onnxruntime
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

TEXTS = ["A gem.", "Two hours of shouting in a kitchen, and then it rains."]


def main(folder: str = "reviewer") -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    inputs = dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))
    any_batch = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}  # any number of texts, of any width
    torch.onnx.export(
        model,
        kwargs=inputs,
        f=f"{folder}/model.onnx",
        input_names=list(inputs),
        output_names=["logits"],
        dynamic_shapes=dict.fromkeys(inputs, any_batch),
        dynamo=True,
    )
    session = onnxruntime.InferenceSession(f"{folder}/model.onnx")
    [logits] = session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model(**inputs).logits, atol=1e-4, rtol=0)


if __name__ == "__main__":
    main(*sys.argv[1:])
