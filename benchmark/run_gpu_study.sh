#!/bin/bash
# Calibration and study on one GPU without a network.
#     benchmark/run_gpu_study.sh DATA MODEL calibrate   on MATH500 alone, some 533,000 steps, 9 minutes
#     benchmark/run_gpu_study.sh DATA MODEL study       all four sets, 228,000 steps, and what the
#                                                       calibrated threshold misses; 5 minutes
#     benchmark/run_gpu_study.sh DATA MODEL short       25 prompts of each set, for another model
# DATA holds math500.jsonl, gsm8k.jsonl, sharegpt.jsonl and humaneval.jsonl. Results go to $OUT. What
# was ended goes on with the same command, in the same $WORK. python3 there must have sglang.
set -u
data=$(cd "$1" && pwd) model=$2 what=$3
here=$(cd "$(dirname "$0")/.." && pwd)
OUT=${OUT:-/tmp/out} WORK=${WORK:-/tmp/margingate-study}
mkdir -p "$OUT" "$WORK"
cd "$WORK"
export PYTHONPATH=$here/python:$here/sgl-kernel-patches:${PYTHONPATH:-}
files=("$data"/{math500,gsm8k,sharegpt,humaneval}.jsonl)
server=(--max-total-tokens 131072 --mem-fraction-static 0.6 --cuda-graph-max-bs-decode 256
    --context-length 4096 --disable-prefill-cuda-graph)
run=(timeout -s INT 880 python3 -m margingate.cli.main)
case $what in
calibrate)
    "${run[@]}" calibrate --model-path "$model" --prompts "$data/math500.jsonl" --tokens 192 \
        --batch-sizes 8 12 16 24 32 48 64 96 128 192 256 --out calibration.json -- "${server[@]}"
    ;;
study)
    "${run[@]}" study --model-path "$model" --prompts "${files[@]}" --per-file 75 --tokens 128 \
        --batch-sizes 8 16 32 64 128 256 --calibration calibration.json --no-probe \
        --out study.json.xz --report report -- "${server[@]}" | tee "$OUT/study.md"
    ;;
short)
    "${run[@]}" study --model-path "$model" --prompts "${files[@]}" --per-file 25 --tokens 128 \
        --batch-sizes 8 32 128 --no-probe --out short.json.xz -- "${server[@]}" | tee "$OUT/short.md"
    ;;
*)
    echo "calibrate, study or short, not '$what'" >&2
    exit 2
    ;;
esac
status=${PIPESTATUS[0]}
cp -- *.json *.json.xz *.partial.jsonl report/index.html "$OUT/" 2>/dev/null
exit "$status"
