#!/bin/bash
# Row counts that give other bits, on one H100 or H200 without a network, in under 9 minutes.
#     benchmark/run_gpu_holes.sh [all|counts|holes|random]
# counts: row_counts.py, alone on the GPU because it times (150 s at most). holes: holes.py for the
# layers of Qwen2.5-1.5B and Llama-3.2-1B side by side. random: 25 row counts for the 8B shape.
# SEED, if set, is that of random's counts. CODE, if set, is another checkout of margingate whose
# servers are asked (0b0f5a1, say); the scripts are always these. What follows the first word goes
# to holes.py. Results go to $OUT, logs as one archive. python3 there must have sglang.
set -u
here=$(cd "$(dirname "$0")/.." && pwd)
CODE=$(cd "${CODE:-$here}" && pwd)
OUT=${OUT:-/tmp/out}
LOGS=/tmp/margingate-logs/holes
rm -rf "$LOGS"
mkdir -p "$OUT" "$LOGS"
cd "$CODE"
export PYTHONUNBUFFERED=1 PYTHONPATH=$here:$here/python:$here/sgl-kernel-patches:${PYTHONPATH:-}
# SGLang finds the plugin by its metadata.
python3 -c 'import importlib.metadata as m; m.distribution("margingate")' 2>/dev/null ||
    python3 setup.py -q egg_info || exit 1
cd "$here" # whose scripts are run

what=${1:-all}
shift
status=0
counts() {
    timeout -k 5 150 python3 -m benchmark.kernels.row_counts --out "$OUT/row_counts.json" \
        >"$OUT/row_counts.txt" 2>&1 || status=$?
    cat "$OUT/row_counts.txt"
}
ask() { # NAME OPTIONS...: one model, both graph settings, within what is left of 530 s
    local name=$1 left=$((530 - SECONDS))
    shift
    timeout -k 10 $((left < 240 ? left : 240)) python3 -m benchmark.sameness.holes \
        --code "$CODE" --out "$OUT/$name.json" --logs "$LOGS" "$@" >"$LOGS/$name.txt" 2>&1
}
holes() {
    ask qwen2.5-1.5b --model qwen2.5-1.5b "$@" &
    local first=$!
    ask llama-3.2-1b --model llama-3.2-1b "$@" || status=$?
    wait $first || status=$?
    cat "$LOGS/qwen2.5-1.5b.txt" "$LOGS/llama-3.2-1b.txt"
}
random() {
    ask random --model llama-3.1-8b --layers 4 --random-counts 25 --max 4096 \
        ${SEED:+--seed "$SEED"} "$@" || status=$?
    cat "$LOGS/random.txt"
}
case $what in
all)
    counts
    holes "$@"
    random "$@"
    ;;
counts | holes | random)
    $what "$@"
    ;;
*)
    echo "all, counts, holes or random, not '$what'" >&2
    exit 2
    ;;
esac
tar -czf "$OUT/holes-logs.tar.gz" -C "$LOGS" .
exit $status
