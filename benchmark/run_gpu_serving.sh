#!/bin/bash
# Speed under load and what verification adds, on one H100 or H200 without a network: 8B shape, dummy weights.
#     benchmark/run_gpu_serving.sh latency   4 minutes: what verification adds to a step
#     benchmark/run_gpu_serving.sh serving   20 minutes: throughput, TTFT and TPOT
#     benchmark/run_gpu_serving.sh shares    7 minutes: 100, 50 and 10 % of the requests gated
# Results go to $OUT, logs as one archive. MODES, if set, replaces the modes; what follows the
# first word goes to the benchmark, where a later option wins over an earlier one. python3 there
# must have sglang.
set -u
cd "$(dirname "$0")/.." && source benchmark/bench/steps.sh
LOGS=/tmp/margingate-logs/$1
mkdir -p "$LOGS"

what=$1
shift
common=(--model benchmark/models/configs/llama-3.1-8b --logs "$LOGS" --out "$OUT/$what.json")
case $what in
latency)
    # An 80 GB card holds three engines at once: two groups, each with a stock one. Of the rounds,
    # the first lets --gate-max-delay auto see the load (it looks every 256 steps).
    timeout -k 20 300 python3 -m benchmark.speed.verification_overhead "${common[@]}" \
        --modes ${MODES:-stock always margin-0.1856 margin-0.05 margin-0.5} \
        --batches 1 8 32 --tokens 288 --rounds 3 --kv-tokens 20000 --budget-s 130 "$@"
    ;;
serving)
    # One at a time, so that each server has the memory and the probe the GPU for itself.
    timeout -k 20 1400 python3 -m benchmark.speed.serving "${common[@]}" \
        --modes ${MODES:-stock-default gate exact deterministic-default} --together 1 --start-s 300 \
        --mixes sharegpt 1k-1k 4k-1k --rates inf 4 --seconds 10 --tokens 130000 --budget-s 480 "$@"
    ;;
shares)
    timeout -k 20 600 python3 -m benchmark.speed.serving "${common[@]}" \
        --modes ${MODES:-stock-default gate gate-50 gate-10} --together 1 --start-s 300 \
        --mixes sharegpt 1k-1k --rates inf --tokens 130000 --budget-s 140 "$@"
    ;;
*)
    echo "latency, serving or shares, not '$what'" >&2
    exit 2
    ;;
esac
status=$?
tar -czf "$OUT/$what-logs.tar.gz" -C "$LOGS" .
exit $status
