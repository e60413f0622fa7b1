#!/usr/bin/env bash
# Runs the presets of tools/benchmark.py and tools/benchmark_kernels.py on an accelerator, within ten minutes:
#
#     tools/benchmark_gpu.sh [--with-mamba-ssm] FOLDER [DEVICE]
#
# FOLDER gets a JSON, tables and a picture of most parts. A part that runs out of its time keeps what it has finished;
# the same command with the same folder goes on from there. PYTHON names another interpreter.
#
# --with-mamba-ssm first builds mamba_ssm from its source distribution, where it is not installed, as a contestant of
# the kernels. That compiles CUDA code, for up to half an hour beyond the ten minutes; if it fails, all is measured
# without it, and FOLDER/mamba_ssm.log says why.
set -u
with_mamba_ssm=0
if [ "${1:-}" = --with-mamba-ssm ]; then
    with_mamba_ssm=1
    shift
fi
case ${1:-} in -*) set -- ;; esac  # --help, or an option that there is not
if [ $# -lt 1 ] || [ $# -gt 2 ]; then
    echo "usage: $0 [--with-mamba-ssm] FOLDER [DEVICE]" >&2
    exit 2
fi
folder=$1
device=${2:-cuda}
python=${PYTHON:-python3}
tools=$(dirname "$0")
mkdir -p "$folder" || exit 1
"$python" -c "import torch; torch.zeros(1, device='$device')" ||
    { echo "error: $python has no PyTorch, or none that can use $device (PYTHON names another)" >&2; exit 1; }

failed=0
# tool, name, seconds, then the options of the benchmark
part() {
    local tool=$1 name=$2 seconds=$3 code
    shift 3
    echo "== $name" >&2
    timeout -k 10 "$seconds" "$python" "$tools/$tool.py" "$@" --device "$device" --rounds 20 --min-seconds 0.5 \
        --json "$folder/$name.json" >/dev/null
    code=$?
    [ $code -eq 124 ] && echo "   out of time after $seconds s; what is finished is kept" >&2
    [ $code -ne 0 ] && failed=1
}

# tool, name, then the options of the report
report() {
    local tool=$1 name=$2
    shift 2
    [ -f "$folder/$name.json" ] && "$python" "$tools/$tool.py" --render --json "$folder/$name.json" \
        --markdown "$folder/$name.md" "$@"
}

has_mamba_ssm() {
    "$python" -c 'from mamba_ssm.ops.selective_scan_interface import selective_scan_fn'
}

# the PyTorch that is installed stays: what is built belongs to it
build_mamba_ssm() {
    "$python" -m pip freeze | grep -iE '^(torch|torchvision|triton)==' >"$folder/constraints.txt"
    "$python" -m pip install --constraint "$folder/constraints.txt" ninja packaging setuptools wheel || return 1
    MAMBA_FORCE_BUILD=TRUE timeout -k 10 1800 "$python" -m pip install --constraint "$folder/constraints.txt" \
        --no-build-isolation --no-binary mamba-ssm mamba-ssm || return 1
    has_mamba_ssm
}

if [ $with_mamba_ssm -eq 1 ] && ! has_mamba_ssm 2>/dev/null; then
    echo "== building mamba_ssm" >&2
    build_mamba_ssm >"$folder/mamba_ssm.log" 2>&1 ||
        echo "   it could not be built, and is left out: $folder/mamba_ssm.log says why" >&2
fi

# scans by themselves beside other packages' kernels
part benchmark_kernels kernels 110 --preset gpu
# images per second with AMP at batch 128; then with the memory format that convolutions like best
part benchmark training 120 --preset training
part benchmark training_channels_last 60 --preset training --channels-last
part benchmark classification 140 --preset classification
# memory and time of a training step over the resolution
part benchmark memory 100 --preset classification --task train --dtype bfloat16 --batch-size 8 --size 224 384 512 1024

report benchmark_kernels kernels --bars --plot "$folder/kernels.png"
report benchmark training
report benchmark training_channels_last
report benchmark classification --bars --plot "$folder/classification.png"
report benchmark memory --plot "$folder/memory.png"
exit $failed
