#!/usr/bin/env bash
# Runs the presets of tools/benchmark.py on an accelerator, within about eight minutes:
#
#     tools/benchmark_gpu.sh FOLDER [DEVICE]
#
# FOLDER gets a JSON, tables and, of sweeps, a picture each. A part that runs out of its time keeps the sizes it has
# finished; the same command with the same folder goes on from there. PYTHON names another interpreter.
set -u
if [ $# -lt 1 ] || [ $# -gt 2 ]; then
    echo "usage: $0 FOLDER [DEVICE]" >&2
    exit 2
fi
folder=$1
device=${2:-cuda}
python=${PYTHON:-python3}
tool=$(dirname "$0")/benchmark.py
mkdir -p "$folder" || exit 1
"$python" -c "import torch; torch.zeros(1, device='$device')" || { echo "error: no device $device" >&2; exit 1; }

failed=0
# name, seconds, then the options of the benchmark
part() {
    local name=$1 seconds=$2 code
    shift 2
    echo "== $name" >&2
    timeout -k 10 "$seconds" "$python" "$tool" "$@" --device "$device" --rounds 20 --min-seconds 0.5 \
        --json "$folder/$name.json" >/dev/null
    code=$?
    [ $code -eq 124 ] && echo "   out of time after $seconds s; finished sizes are kept" >&2
    [ $code -ne 0 ] && failed=1
}

# name, then the options of the report
report() {
    local name=$1
    shift
    [ -f "$folder/$name.json" ] && "$python" "$tool" --render --json "$folder/$name.json" \
        --markdown "$folder/$name.md" "$@"
}

# images per second with AMP at batch 128; then with the memory format that convolutions like best
part training 120 --preset training
part training_channels_last 60 --preset training --channels-last
part classification 150 --preset classification
# memory and time of a training step over the resolution
part memory 110 --preset classification --task train --dtype bfloat16 --batch-size 8 --size 224 384 512 1024

report training
report training_channels_last
report classification --bars --plot "$folder/classification.png"
report memory --plot "$folder/memory.png"
exit $failed
