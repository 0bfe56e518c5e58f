#!/bin/bash
# Speed, answers, calibration and study in one go, on two cards of a host without a network; 40 minutes.
#     benchmark/run_gpu_all.sh DATA MODEL [SECOND]
# DATA: the four prompt files (run_gpu_study.sh); MODEL: SmolLM2; SECOND: another real model. Card 0
# has what is timed beside stock, on cores of its own; card 1 the rest, and what is timed last, alone.
# Results appear in $OUT as they are made, with a line each in $OUT/progress.txt. Where a command may
# run for some minutes only, start it with setsid and come back: a machine that is left idle is lost.
set -u
data=$(cd "$1" && pwd) model=$2 second=${3:-}
cd "$(dirname "$0")/.." && source benchmark/bench/steps.sh
cores=$(nproc) half=$(($(nproc) * 9 / 16))
files=("$data"/{math500,gsm8k,humaneval,sharegpt}.jsonl)

card_0() {
    export CUDA_VISIBLE_DEVICES=0
    step attention 90 python3 -m benchmark.kernels.attention --out "$OUT/attention.json"
    step serving 1400 bash benchmark/run_gpu_serving.sh serving --kv-tokens 300000
    step latency 330 bash benchmark/run_gpu_serving.sh latency --batches 32 8 1
    step shares 600 bash benchmark/run_gpu_serving.sh shares --kv-tokens 300000 --mixes sharegpt
}

card_1() {
    export CUDA_VISIBLE_DEVICES=1
    local steps=(python3 -m benchmark.speed.decode_step --modes stock-default gate-default --together 1 --repeats 2)
    step calibrate 900 bash benchmark/run_gpu_study.sh "$data" "$model" calibrate
    step study 900 bash benchmark/run_gpu_study.sh "$data" "$model" study
    step sameness 600 python3 -m benchmark.sameness.servers --model "$model" --prompts "${files[@]}" \
        --per-file 100 --others 400 --tokens 256 --servers gate exact-no-cache stock-default gate-stock-path \
        --out "$OUT/sameness.json" -- --max-total-tokens 60000 --mem-fraction-static 0.5 \
        --cuda-graph-max-bs-decode 64 --context-length 4096
    [ -z "$second" ] || step short 500 env OUT="$OUT/second" WORK=/tmp/margingate-second \
        bash benchmark/run_gpu_study.sh "$data" "$second" short
    step steps-8b 300 "${steps[@]}" --model benchmark/models/configs/llama-3.1-8b --kv-tokens 345000 \
        --batches 128 32 16 8 1 --contexts 2048 8192 --budget-s 120 --out "$OUT/steps-8b.json"
    step steps-14b 300 "${steps[@]}" --model benchmark/models/configs/qwen2.5-14b --kv-tokens 200000 \
        --batches 1 8 32 64 128 --contexts 256 2048 --budget-s 120 --out "$OUT/steps-14b.json"
}

(taskset -pc $half-$((cores - 1)) $BASHPID >/dev/null && card_0) &
(taskset -pc 0-$((half - 1)) $BASHPID >/dev/null && card_1) &
wait
