#!/usr/bin/env bash
# Train the points of a sweep with an array of jobs on a Slurm cluster, on a disk that all nodes share.
#
#   bash launch/sweep_slurm.sh JOBS CONFIG WORKDIR [--sweep.x.y=A,B ...] [--config.x.y=value ...]
#
# Submits an array of JOBS jobs, each of which trains every JOBS-th point, one after another on what
# Slurm gives it, and then a job that prints the table. The same command goes on where it was; add
# --retry_failed for points that failed.
#
# SBATCH     options for the array, such as "--partition=gpu --gpus=1 --cpus-per-task=8 --mem=32G"
# TABLE      options for the job of the table beside, which needs no GPU; default "--output=WORKDIR.txt"
# VENV       the environment with soup-jax (default .venv if it has one, else the PATH)
# DRY_RUN=1  print the commands, submit nothing
set -euo pipefail

fail() { echo "sweep_slurm.sh: $1" >&2; exit 2; }

(($# >= 3)) || fail "usage: bash launch/sweep_slurm.sh JOBS CONFIG WORKDIR [--sweep.x.y=A,B ...]"
jobs=$1 config=$2 workdir=$3
shift 3
[[ "$jobs" =~ ^[1-9][0-9]*$ ]] || fail "JOBS is a number of jobs, not '$jobs'"
[[ -n "${VENV:-}" || ! -x .venv/bin/soup-jax ]] || VENV=.venv
soup_jax="${VENV:+$VENV/bin/}soup-jax"
command=("$soup_jax" sweep "--config=$config" "--workdir=$workdir" "$@")
printf -v quoted '%q ' "${command[@]}"
printf -v table '%q ' "$soup_jax" sweep "--workdir=$workdir" --table

run() {
  printf '+'; printf ' %q' "$@"; printf '\n'
  if [[ -n "${DRY_RUN:-}" ]]; then last=JOB; else last=$("$@"); fi
  last=${last%%;*}  # a cluster of several says which one behind the number
}

# A mistake is told here, and not by every job of the array.
[[ -n "${DRY_RUN:-}" ]] || "${command[@]}" --dry_run
read -ra options <<< "${SBATCH:-}"
run sbatch --parsable --job-name=soup_jax_sweep "--array=0-$((jobs - 1))" \
  ${options[@]+"${options[@]}"} --wrap "$quoted--shard=\$SLURM_ARRAY_TASK_ID/$jobs"
# Whether points failed or not.
read -ra options <<< "${TABLE:---output=$workdir.txt}"
run sbatch --parsable --job-name=soup_jax_table "--dependency=afterany:$last" \
  ${options[@]+"${options[@]}"} --wrap "$table"
