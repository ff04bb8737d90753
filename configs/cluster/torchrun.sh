#!/usr/bin/env bash
# bash configs/cluster/torchrun.sh [more options of smartbatch fit]
# One machine, all its GPUs; if a rank dies, all ranks restart from the latest checkpoint.
# On several machines: --nnodes=N --rdzv-backend=c10d --rdzv-endpoint=HOST:29500, the same command on each, and
# --trainer.num_nodes=N. To resume with fewer GPUs, start it with fewer: the rest of the epoch is replanned for them.
set -euo pipefail
ranks=${RANKS:-$(nvidia-smi --list-gpus | wc -l)}

smartbatch prepare --config configs/imdb.yaml "$@" # tokenizes once, before ranks wait for each other
for start in 1 2 3 4; do # not --max-restarts: ranks restarted by torchrun may connect to addresses of dead ranks
    echo "Start $start"
    torchrun --standalone --nproc-per-node="$ranks" --no-python \
        smartbatch fit \
        --config configs/imdb.yaml --config configs/cluster/requeue.yaml --ckpt_path=last \
        --trainer.devices="$ranks" --trainer.strategy=ddp --trainer.precision=bf16-mixed "$@" && exit
done
exit 1
