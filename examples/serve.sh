#!/usr/bin/env bash
# bash examples/serve.sh reviewer    # a folder that `smartbatch export` wrote
# Serves it with Hugging Face's text-embeddings-inference, here on a CPU. For other images and the supported models, see
# https://huggingface.co/docs/text-embeddings-inference/en/supported_models
# curl localhost:8080/predict -H 'Content-Type: application/json' -d '{"inputs": "A gem."}'
# The response has the softmax of the logits; for multi-label or regression, add "raw_scores": true to get the logits.
# This image runs model.onnx if the folder has it (examples/export_onnx.py writes it), otherwise the safetensors.
set -euo pipefail
folder=$(realpath "$1")

# the server truncates texts to `max_seq_length`; without this file, to the model's maximum
python -c 'import json, sys; print(json.dumps({"max_seq_length": json.load(sys.stdin)["model_max_length"]}))' \
    < "$folder/tokenizer_config.json" > "$folder/sentence_bert_config.json"

docker run --rm -p 8080:80 -v "$folder:/model:ro" \
    ghcr.io/huggingface/text-embeddings-inference:cpu-1.9 --model-id /model
