#!/usr/bin/env bash
# Starts a job on every host of a Cloud TPU slice, in the background.
# Hosts on which it already runs are left alone.
# A job that ended or was preempted continues from its last checkpoint.
#
#   launch/tpu_pod.sh --tpu=NAME --zone=ZONE configs/cifar10.py:wrn34_10_t50 gs://BUCKET/FOLDER
#
# --tpu=NAME --zone=ZONE   the slice
# --project=PROJECT        default: gcloud's
# --remote_dir=FOLDER      this repository on the hosts; default ~/atebm_jax
# --python=PROGRAM         interpreter there; default .venv/bin/python in that folder
# --dry_run                only print what would run
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "$0")/lib.sh"

tpu="" zone="" project="" remote_dir=atebm_jax python=.venv/bin/python
parse "tpu zone project remote_dir python" "$@"
need tpu "the name of the slice"
need zone "its zone, us-west4-a say"
in_bucket
have gcloud "see https://cloud.google.com/sdk/docs/install"
main_command "$python"

# This runs on each host. The job holds a lock as long as it lives, which keeps a second
# job away. There is one job per host, whatever its workdir: a TPU serves one process.
remote="cd $(quoted "$remote_dir") && command -v $(quoted "$python") >/dev/null || {
    echo \"\$(hostname): no $(quoted "$remote_dir") with $(quoted "$python")\"
    exit 2
}
exec 9>>\"\$HOME/.atebm_jax.lock\" || exit 1
if ! flock -n 9; then
    echo \"\$(hostname): already running \$(cat \"\$HOME/.atebm_jax.workdir\")\"
    exit 0
fi
echo $(quoted "$workdir") >\"\$HOME/.atebm_jax.workdir\"
nohup $(quoted "${command[@]}") >>\"\$HOME/atebm_jax.log\" 2>&1 </dev/null &
echo \"\$(hostname): started process \$!, log ~/atebm_jax.log\""

ssh=(gcloud compute tpus tpu-vm ssh "$tpu" "--zone=$zone")
[ -z "$project" ] || ssh+=("--project=$project")
if [ -n "$dry_run" ]; then
    echo "on every host of $tpu in $zone, by: $(quoted "${ssh[@]}" --worker=all) --command=..."
    echo "$remote"
else
    "${ssh[@]}" --worker=all --command="$remote"
fi
