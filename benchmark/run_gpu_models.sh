#!/bin/bash
# Quantized models and two K/V pools, on one GPU without a network: are answers the same, and how fast.
#     benchmark/run_gpu_models.sh DATA MODEL answers NAME...   are answers the same, beside stock SGLang
#     benchmark/run_gpu_models.sh DATA MODEL speed NAME...     decode steps and prefills, beside it
# DATA: the four prompt files (run_gpu_study.sh); MODEL: SmolLM2. NAME: gptq, awq, fp8, channels or oss
# (gpt-oss with two K/V pools) for answers; awq-8b, fp8-8b, fp8-30b or oss-20b for speed. 3 to 8 minutes
# a NAME: a first start compiles kernels. Models are made in $WORK, of SmolLM2 or of a shape. Results go
# to $OUT. python3 there must have sglang.
set -u
data=$(cd "$1" && pwd) model=$(cd "$2" && pwd) what=$3
shift 3
cd "$(dirname "$0")/.." && source benchmark/bench/steps.sh
WORK=${WORK:-/tmp/margingate-models}
mkdir -p "$WORK"
files=("$data"/{math500,gsm8k,humaneval,sharegpt}.jsonl)
shapes=benchmark/models/configs

# made NAME COMMAND...: the folder $WORK/NAME, by a command that is given it last.
made() {
    local folder=$WORK/$1
    shift
    [ -f "$folder/config.json" ] || python3 -m "$@" "$folder" >&2 || return 1
    echo "$folder"
}
padded() { made padded benchmark.models.padded "$model"; }
as_qwen2() { made qwen2 benchmark.models.padded --qwen2 "$model"; }
folder_of() {
    case $1 in
    gptq | awq) made "$1" benchmark.models.four_bits "$1" "$(padded)" ;;
    fp8) made fp8 benchmark.models.fp8_blocks "$(as_qwen2)" ;;
    channels) made channels benchmark.models.fp8_channels "$(padded)" ;;
    oss) made oss benchmark.models.random_mxfp4 --layers 8 --device cuda $shapes/gpt-oss-20b ;;
    awq-8b) made awq-8b benchmark.models.random_four_bits --device cuda $shapes/qwen3-8b-awq ;;
    oss-20b) made oss-20b benchmark.models.random_mxfp4 --device cuda $shapes/gpt-oss-20b ;;
    fp8-8b) echo $shapes/qwen3-8b-fp8 ;;
    fp8-30b) echo $shapes/qwen3-30b-a3b-fp8 ;;
    *) echo "gptq, awq, fp8, channels, oss, awq-8b, fp8-8b, fp8-30b or oss-20b, not '$1'" >&2 && return 2 ;;
    esac
}
answers() { # NAME FOLDER
    local extra=()
    [ "$1" != oss ] || extra=(--swa-full-tokens-ratio 0.15)
    mkdir -p "$OUT/$1" # logs of its servers: several of these may run at once
    step "same-$1" 600 env OUT="$OUT/$1" python3 -m benchmark.sameness.servers --model "$2" --prompts "${files[@]}" \
        --per-file 50 --others 50 --tokens 256 --servers gate exact-512 stock-default --start-s 400 \
        --out "$OUT/same-$1.json" -- --max-total-tokens 60000 --mem-fraction-static 0.4 \
        --cuda-graph-max-bs-decode 64 --context-length 4096 --cuda-graph-backend-prefill disabled \
        "${extra[@]}"
}
speed() { # NAME FOLDER
    step "steps-$1" 600 python3 -m benchmark.speed.decode_step --model "$2" \
        --modes stock-default gate-default deterministic-default --batches 1 8 32 64 128 \
        --contexts 256 2048 --prefills 1000 4000 --repeats 2 --budget-s 120 --out "$OUT/steps-$1.json"
}
case $what in
answers | speed) ;;
*) echo "answers or speed, not '$what'" >&2 && exit 2 ;;
esac
status=0
for name in "$@"; do
    folder=$(folder_of "$name") && $what "$name" "$folder" || status=1
done
exit $status
