#!/usr/bin/env bash
# bash examples/serve.sh reviewer    # a folder that `smartbatch export` wrote
# Serves it with Hugging Face's text-embeddings-inference, here on a CPU; other images, and the models that it takes:
# https://huggingface.co/docs/text-embeddings-inference/en/supported_models
# curl localhost:8080/predict -H 'Content-Type: application/json' -d '{"inputs": "A gem."}'
# It answers with the softmax of the logits; for several labels or a regression add "raw_scores": true, which gives logits.
# This image runs model.onnx, which examples/export_onnx.py writes, if the folder has it, else the safetensors.
set -euo pipefail
folder=$(realpath "$1")

# it truncates texts at `max_seq_length`; without, at the longest that the model can take
python -c 'import json, sys; print(json.dumps({"max_seq_length": json.load(sys.stdin)["model_max_length"]}))' \
    < "$folder/tokenizer_config.json" > "$folder/sentence_bert_config.json"

docker run --rm -p 8080:80 -v "$folder:/model:ro" \
    ghcr.io/huggingface/text-embeddings-inference:cpu-1.9 --model-id /model
