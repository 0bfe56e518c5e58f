# What the scripts for GPU machines share. Sourced from the root of the checkout: makes $OUT, and gives
#     step NAME SECONDS COMMAND...
# which runs a command for so long at most, writes what it prints to $OUT/NAME.txt, and its begin and
# end to $OUT/progress.txt. $worst is 1 once one of them failed.
export OUT=${OUT:-/tmp/out}
export PYTHONPATH=$PWD:$PWD/python:$PWD/sgl-kernel-patches:${PYTHONPATH:-}
mkdir -p "$OUT"
# SGLang finds the plugin by its metadata.
python3 -c 'import importlib.metadata as m; m.distribution("margingate")' 2>/dev/null ||
    python3 setup.py -q egg_info || exit 1

worst=0
step() {
    local name=$1 limit=$2 status=0
    shift 2
    echo "$(date +%T) $name begins" >>"$OUT/progress.txt"
    timeout -k 20 "$limit" "$@" >"$OUT/$name.txt" 2>&1 || status=$?
    echo "$(date +%T) $name ends with $status" >>"$OUT/progress.txt"
    ((status == 0)) || worst=1
    return $status
}
