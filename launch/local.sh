#!/usr/bin/env bash
# Runs a job on all devices of this machine. The same command continues it.
#
#   launch/local.sh configs/cifar10.py:small runs/cifar10_small --config.data.data_dir=TFDS_FOLDER
#
# --python=PROGRAM         interpreter; default $PYTHON, otherwise python3
# --coordinator=HOST:PORT --num_processes=N --process_id=I
#                          if this machine is one of several: the same on all but I
# --dry_run                only print what would run
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "$0")/lib.sh"

python=${PYTHON:-python3} coordinator="" num_processes="" process_id=""
parse "python coordinator num_processes process_id" "$@"
main_command "$python"
for name in coordinator num_processes process_id; do
    [ -z "${!name}" ] || command+=("--$name=${!name}")
done
if [ -n "$coordinator$num_processes$process_id" ]; then
    need coordinator "HOST:PORT of process 0"
    need num_processes "the number of machines"
    need process_id "the number of this machine, from 0"
fi
have "$python" "give another with --python=PROGRAM"

# Two jobs at once would overwrite each other's files. The lock ends with the process.
# It is not in the workdir, because a refused config must not create the workdir.
if [ -z "$dry_run$coordinator" ] && command -v flock >/dev/null; then
    [[ $workdir == /* || $workdir == *://* ]] || workdir=$PWD/$workdir
    exec 9>"${TMPDIR:-/tmp}/$(id -u)-$(job_name).lock"
    flock -n 9 || { echo "a job is already running in $workdir: nothing to do."; exit 0; }
fi
if [ -n "$dry_run" ]; then
    run "${command[@]}"
else
    exec "${command[@]}"
fi
