#!/usr/bin/env bash
# What needs a GPU, measured in one run: tests, tables of the 3B shape, a profile of one step, memory in main memory.
#
#   bash benchmarks/gpu.sh                       all entries, results as files in gpu-results/ (or in $OUT)
#   bash benchmarks/gpu.sh table-256k            from this entry on
#   DEVICE=cpu SHAPE=tiny bash benchmarks/gpu.sh     a rehearsal without a GPU, with short prompts
#
# An entry whose file is there already is left out, so a run that was cut off is gone on with by the same command.
set -u
cd "$(dirname "$0")/.."
out=${OUT:-gpu-results} device=${DEVICE:-cuda} shape=${SHAPE:-3b} first=${1:-tests-cuda} started=
export PYTHONUNBUFFERED=1
if [ "$device" = cuda ] && ! python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    echo "gpu.sh: there is no GPU that torch can use here: DEVICE=cpu SHAPE=tiny rehearses without one" >&2
    exit 2
fi
mkdir -p "$out"

# entry NAME SECONDS COMMAND...: what the command prints goes to NAME.txt, once it has ended well.
entry() {
    local name=$1 seconds=$2
    shift 2
    [ "$name" = "$first" ] && started=yes
    if [ -z "$started" ] || [ -e "$out/$name.txt" ]; then return; fi
    echo "== $name"
    { echo "\$ $*"; timeout "$seconds" "$@"; } >"$out/$name.part" 2>&1
    local status=$?
    tail -n 4 "$out/$name.part"
    if [ $status -eq 0 ]; then mv "$out/$name.part" "$out/$name.txt"; else echo "$name: exit status $status, see $name.part"; fi
}

bench() { # NAME SECONDS FLAGS...
    local name=$1 seconds=$2
    shift 2
    entry "$name" "$seconds" python benchmarks/bench.py --shape "$shape" --device "$device" "$@"
}

short=2k,16k long=256k longest=1M compile=--compile tests=cuda all=
if [ "$device" = cpu ]; then short=1k long=2k longest=4k compile= tests=original all="-k original"; fi

entry tests-cuda 180 python -m pytest -q -x -k $tests
bench table-short 200 $compile --prompt-tokens $short --compare naive,sdpa,transformers
bench table-256k 120 $compile --prompt-tokens $long --compare ""
bench table-1M 150 $compile --prompt-tokens $longest --repeats 1 --compare ""
for kind in int8 int4; do
    bench $kind-short 120 $compile --weights $kind --prompt-tokens ${short%%,*} --compare ""
    bench $kind-256k 150 $compile --weights $kind --prompt-tokens $long --compare ""
done
bench core 90 --prompt-tokens ${short%%,*} --compare core
entry profile 90 python benchmarks/profile_step.py --shape "$shape" --device "$device" --prompt-tokens ${short%%,*}
bench main-memory-short 90 --mem-device cpu --prompt-tokens ${short##*,} --compare ""
bench main-memory-256k 180 --mem-device cpu --prompt-tokens $long --repeats 1 --compare ""
entry tests-all 600 python -m pytest -q $all
