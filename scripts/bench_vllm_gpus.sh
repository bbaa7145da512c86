#!/usr/bin/env bash
# vLLM with the plugin over N GPUs of one machine, beside vLLM's FP8 on the same, one GPU, and two engines of N / 2 GPUs:
#
#     scripts/bench_vllm_gpus.sh N FOLDER [SHAPE] [REQUESTS]
#
# writes FOLDER/serving-GPUS-xN.json, and FOLDER/profile-xN.txt with the kernels of one rank. N is 2, 4 or 8, SHAPE
# llama-2-70b, REQUESTS 512 (of 1024 + 512 tokens). Needs vLLM, the plugin and N idle GPUs. What compiles does so first.
# The two engines are two processes at the same time, each with half of the requests: vLLM's data parallelism of dense
# models without its router.
set -euo pipefail

count=${1:?number of GPUs}
folder=${2:?folder for results}
shape=${3:-llama-2-70b}
requests=${4:-512}
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$folder"
file=$folder/serving-gpus-x$count.json
memory=${MEMORY:-132}  # GiB of each GPU

gpus() { seq -s, "$1" "$(($2 - 1))"; }
bench() {  # GPUS REQUESTS OPTIONS...
  local visible=$1 number=$2
  shift 2
  local degree=${visible//[^,]/}
  CUDA_VISIBLE_DEVICES=$visible python3 "$scripts/bench_vllm.py" "$shape" --gpu-memory "$memory" \
    --tensor-parallel-size $((${#degree} + 1)) --num-prompts "$number" --max-num-seqs "$number" "$@"
}
plugin() { bench "$@" --recipe quatom-w4a8kv4; }
fp8() { VLLM_PLUGINS=none bench "$@" --recipe fp8; }

all=$(gpus 0 "$count")
half=$((count / 2))
plugin "$all" "$requests" --prepare &
fp8 "$all" "$requests" --prepare &
wait
plugin "$all" "$requests" --json "$file" --profile "$folder/profile-x$count.txt"
fp8 "$all" "$requests" --json "$file"
plugin 0 "$requests" --json "$file"
for first in 0 "$half"; do
  plugin "$(gpus "$first" $((first + half)))" $((requests / 2)) --json "$folder/half-$first.json" &
done
wait
