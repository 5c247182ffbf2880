#!/usr/bin/env bash
# Submits a job to a GKE cluster of TPUs with XPK, with one process per host.
# While the job exists in the cluster, the same command does nothing.
# Afterwards the same command continues the job.
#
#   launch/xpk_gke.sh --cluster=NAME --zone=ZONE --tpu_type=v5litepod-256 --image=IMAGE \
#       configs/imagenet256.py:convnext_large_t110 gs://BUCKET/FOLDER
#
# --cluster=NAME --zone=ZONE   the cluster, as made by xpk cluster create
# --tpu_type=TYPE              type of a slice, such as v5litepod-256
# --image=IMAGE                container with this repository as its working folder
# --project=PROJECT            default: gcloud's
# --num_slices=N               default 1; several are joined over the data centre's network
# --max_restarts=N             restarts after a preemption or a failed host; default 50
# --python=PROGRAM             interpreter in the container; default python3
# --dry_run                    only print what would run
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "$0")/lib.sh"

cluster="" zone="" project="" tpu_type="" image="" num_slices=1 max_restarts=50
python=python3
parse "cluster zone project tpu_type image num_slices max_restarts python" "$@"
need cluster "the name of the cluster"
need zone "its zone, us-west4-a say"
need tpu_type "the type of a slice, v5litepod-256 say"
need image "a container image with this repository"
positive num_slices
positive max_restarts
in_bucket
have xpk "pip install xpk"
main_command "$python"
name=$(job_name)
where=("--cluster=$cluster" "--zone=$zone")
[ -z "$project" ] || where+=("--project=$project")

if [ -z "$dry_run" ]; then
    jobs=$(xpk workload list "${where[@]}" "--filter-by-job=$name") ||
        die "xpk cannot list the jobs of $cluster: $jobs"
    line=$(grep -E "^${name}[[:space:]]" <<<"$jobs" || true)
    case $line in
    "") ;;
    *[[:space:]]Finished[[:space:]]*)
        # Its name is taken until it is deleted. What it saved is in the bucket.
        xpk workload delete "${where[@]}" "--workload=$name" --force ;;
    *)
        echo "the job of $workdir is already there ($name): nothing to do."
        exit 0 ;;
    esac
fi
# XPK restarts a job that a signal ended (exit codes from 128 on), but not one that ended
# with a user's mistake (2). SIGTERM comes two minutes before the end: enough to save.
run xpk workload create "${where[@]}" "--workload=$name" "--tpu-type=$tpu_type" \
    "--num-slices=$num_slices" "--docker-image=$image" "--max-restarts=$max_restarts" \
    --termination-grace-period-seconds=120 \
    --command="$(quoted "${command[@]}")"
