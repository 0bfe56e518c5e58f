#!/bin/bash
# Two GPUs of one host: what --tp-size 2 and --dp-size 2 cost and give; 8B shape, dummy weights.
#     benchmark/run_gpu_pair.sh ranks      9 minutes: stock and the gate with --tp-size 2, both up: decode
#                                          steps, then all requests at once, streamed; then sameness
#     benchmark/run_gpu_pair.sh replicas   6 minutes: the gate on one GPU, and with --dp-size 2 on both,
#                                          with twice the requests
# Nothing else may run on either GPU. Results go to $OUT. python3 there must have sglang.
set -u
cd "$(dirname "$0")/.." && source benchmark/bench/steps.sh

shape=(--model benchmark/models/configs/llama-3.1-8b)
load=(python3 -m benchmark.speed.serving "${shape[@]}" --rates inf --mixes sharegpt 1k-1k
    --repeats 2 --no-prefill-graphs --start-s 240)
# SGLang refuses ranks whose GPUs have unequal memory left, as they have while two servers start.
export SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK=0
case ${1:-} in
ranks)
    step ranks-steps 240 python3 -m benchmark.speed.decode_step "${shape[@]}" --tp-size 2 \
        --modes stock-default gate-default --batches 1 8 32 64 128 --contexts 256 2048 \
        --repeats 2 --together 2 --kv-tokens 160000 --budget-s 90 --out "$OUT/ranks-steps.json"
    step ranks-load 300 "${load[@]}" --modes stock-default gate --together 2 --kv-tokens 160000 \
        --requests 128 --tokens 130000 --budget-s 120 --out "$OUT/ranks-load.json" \
        -- --tp-size 2 --mem-fraction-static 0.45
    step ranks-same 240 python3 -m benchmark.sameness.tensor_parallel "${shape[@]}" --tp-size 2 \
        --servers gate --out "$OUT/ranks-same.json"
    ;;
replicas)
    alone=(--modes gate --together 1 --kv-tokens 300000)
    step one-load 200 env CUDA_VISIBLE_DEVICES=0 "${load[@]}" "${alone[@]}" \
        --requests 64 --tokens 130000 --budget-s 60 --out "$OUT/one-load.json"
    step two-load 240 "${load[@]}" "${alone[@]}" \
        --requests 128 --tokens 260000 --budget-s 60 --out "$OUT/two-load.json" -- --dp-size 2
    ;;
*)
    echo "ranks or replicas, not '${1:-}'" >&2
    exit 2
    ;;
esac
exit $worst
