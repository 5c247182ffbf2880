#!/usr/bin/env bash
# Runs a job on this machine, on all of its devices; the same command goes on with it.
#
#   launch/local.sh configs/cifar10.py:small runs/cifar10_small --config.data.data_dir=TFDS_FOLDER
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: launch/local.sh CONFIG WORKDIR [--config.FIELD=VALUE ...]" >&2
    exit 2
fi
config=$1 workdir=$2
shift 2
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m atebm_jax.main --config="$config" --workdir="$workdir" "$@"
