#!/usr/bin/env bash
# Prepare a corpus with arrays of jobs on a Slurm cluster, on a disk that all nodes share.
#
#   bash launch/prepare_slurm.sh SHARDS CONFIG [--config.x.y=value ...]
#
# Submits five rounds, an array of SHARDS jobs and then one job, each when the one before has
# ended well. A round too many does nothing. One that failed, or was cancelled, keeps the rest from
# starting: cancel them and give the command again, which goes on where it was.
#
# SBATCH     options for all jobs, such as "--partition=cpu --cpus-per-task=8 --mem=32G"
# MERGE      options for the single jobs beside, which fit tokenizer, embedder and centroids
# VENV       the environment with soup-jax (default .venv if it has one, else the PATH)
# DRY_RUN=1  print the commands, submit nothing
set -euo pipefail

fail() { echo "prepare_slurm.sh: $1" >&2; exit 2; }

(($# >= 2)) || fail "usage: bash launch/prepare_slurm.sh SHARDS CONFIG [--config.x.y=value ...]"
shards=$1 config=$2
shift 2
[[ "$shards" =~ ^[1-9][0-9]*$ ]] || fail "SHARDS is a number of jobs, not '$shards'"
[[ -n "${VENV:-}" || ! -x .venv/bin/soup-jax ]] || VENV=.venv
command=("${VENV:+$VENV/bin/}soup-jax" prepare "--config=$config" "$@")
printf -v quoted '%q ' "${command[@]}"

last=""
submit() {  # submit OPTIONS COMMAND: after the job before; its number goes to `last`
  local options after=()
  [[ -z "$last" ]] || after=("--dependency=afterok:$last")
  read -ra options <<< "${SBATCH:-} $1"
  set -- sbatch --parsable --job-name=soup_jax_prepare ${after[@]+"${after[@]}"} \
    ${options[@]+"${options[@]}"} --wrap "$2"
  printf '+'; printf ' %q' "$@"; printf '\n'
  if [[ -n "${DRY_RUN:-}" ]]; then last=JOB; else last=$("$@"); fi
  last=${last%%;*}  # a cluster of several says which one behind the number
}

for round in 1 2 3 4 5; do
  submit "--array=0-$((shards - 1))" "$quoted--shard=\$SLURM_ARRAY_TASK_ID/$shards"
  # 75: more rounds are needed. After the last one that is an error, which what depends on it sees.
  unfinished=" || [ \$? -eq 75 ]"
  submit "${MERGE:-}" "$quoted--merge$([[ $round == 5 ]] || echo "$unfinished")"
done
