#!/usr/bin/env bash
# Submits a job to Slurm, with one process per GPU.
# While the job is queued or running, the same command does nothing.
# Afterwards the same command continues the job.
#
#   launch/gpu_slurm.sh --nodes=2 --gpus_per_node=8 --partition=gpu configs/imagenet256.py:resnet50_t30 SHARED_FOLDER
#
# --nodes=N --gpus_per_node=N      default 1 and 8
# --cpus_per_gpu=N                 default 8
# --time=LIMIT                     Slurm's, such as 2-00:00:00; default: the partition's
# --partition=NAME --account=NAME  default: the site's
# --python=PROGRAM                 interpreter; default $PYTHON, otherwise python3
# --dry_run                        only print what would run
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "$0")/lib.sh"

# shellcheck disable=SC2034  # some are read only through their names
nodes=1 gpus_per_node=8 cpus_per_gpu=8 time="" partition="" account=""
python=${PYTHON:-python3}
parse "nodes gpus_per_node cpus_per_gpu time partition account python" "$@"
for name in nodes gpus_per_node cpus_per_gpu; do
    positive "$name"
done
have sbatch "run this where jobs are submitted"
main_command "$python"
name=$(job_name)

# Every task must see all GPUs of its node: JAX takes the GPU with the task's number.
# Slurm sends SIGTERM two minutes before the limit and on preemption, and the job saves.
# A requeued job continues from there.
submit=(sbatch "--job-name=$name" --dependency=singleton "--nodes=$nodes"
    "--ntasks-per-node=$gpus_per_node" "--gres=gpu:$gpus_per_node"
    "--cpus-per-task=$cpus_per_gpu" --signal=TERM@120 --requeue --open-mode=append
    "--output=$name.log")
for option in time partition account; do
    [ -z "${!option}" ] || submit+=("--$option=${!option}")
done
step="exec srun --kill-on-bad-exit=1 --gpu-bind=none --cpus-per-task=$cpus_per_gpu $(quoted "${command[@]}")"

if [ -z "$dry_run" ]; then
    queued=$(squeue --noheader --user="$(id -un)" --name="$name" --format="%i %T") ||
        die "squeue does not answer: try again when Slurm does."
    if [ -n "$queued" ]; then
        echo "the job of $workdir is already there ($name: $queued): nothing to do."
        exit 0
    fi
fi
run "${submit[@]}" --wrap="$step"
