#!/usr/bin/env sh
# Train on several processes of one machine, or of many with NNODES, NODE_RANK and MASTER_ADDR set:
#   tools/dist_train.sh CONFIG NPROC [options of tools/train.py]
set -eu
if [ "$#" -lt 2 ]; then
    echo "usage: $0 CONFIG NPROC [options of tools/train.py]" >&2
    exit 2
fi
config=$1
nproc=$2
shift 2
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" --nproc_per_node="$nproc" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" \
    "$(dirname "$0")/train.py" "$config" --launcher pytorch "$@"
