#!/usr/bin/env bash
# Train on all hosts of a Cloud TPU VM slice; runs on your machine, over `gcloud ... ssh`.
#
#   TPU=NAME ZONE=ZONE bash launch/tpu_vm.sh --install    # the last commit, on every host
#   TPU=NAME ZONE=ZONE bash launch/tpu_vm.sh CONFIG WORKDIR [--config.section.field=value ...]
#   TPU=NAME ZONE=ZONE bash launch/tpu_vm.sh --log        # follow host 0 again
#   TPU=NAME ZONE=ZONE bash launch/tpu_vm.sh --stop       # save on all hosts, then stop
#
# TPU        name of the slice, ZONE where it is, PROJECT (optional) whose
# PYTHON     on the hosts, 3.11 or newer (default python3.11; installed by apt if it is not there)
# DRY_RUN=1  print the commands, run nothing
#
# The run does not need your connection: it goes on when you leave the log with Ctrl-C. Paths count
# from ~/soup_jax on the hosts; corpus and WORKDIR must be on a disk that all hosts have mounted. A
# spot slice that was taken away is made anew, then --install and the same command continue. At CPU
# size: launch/local.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

run() {
  printf '+'; printf ' %q' "$@"; printf '\n'
  [[ -n "${DRY_RUN:-}" ]] || "$@"
}
fail() { echo "tpu_vm.sh: $1" >&2; exit 2; }

usage="usage: TPU=NAME ZONE=ZONE bash launch/tpu_vm.sh --install | CONFIG WORKDIR [--config.x.y=value]"
[[ -n "${TPU:-}" && -n "${ZONE:-}" && $# -ge 1 ]] || fail "$usage"
where=(--zone="$ZONE")
[[ -z "${PROJECT:-}" ]] || where+=(--project="$PROJECT")
python=${PYTHON:-python3.11}

on_host() {  # on_host all|NUMBER COMMAND
  run gcloud compute tpus tpu-vm ssh "$TPU" "${where[@]}" --worker="$1" --command="$2"
}
# Expanded on the hosts, not here. What runs there is a shell that waits for the program, and a
# SIGTERM to a waiting shell would not reach it: --stop is for the shell's children.
# shellcheck disable=SC2016
{
  busy='kill -0 "$(cat train.pid 2>/dev/null)" 2>/dev/null'
  stop='cd soup_jax && pkill -TERM -P "$(cat train.pid)"'
  follow='cd soup_jax && tail -n +1 --pid="$(cat train.pid)" -F train.log'
}

case $1 in
  --install)
    archive=${TMPDIR:-/tmp}/soup_jax-$$.tar.gz
    trap 'rm -f "$archive"' EXIT
    run git archive --format=tar.gz --output="$archive" HEAD
    run gcloud compute tpus tpu-vm scp "$archive" "$TPU:soup_jax.tar.gz" "${where[@]}" --worker=all
    python=$(printf '%q' "$python")
    on_host all "set -e; mkdir -p soup_jax; tar -xzf soup_jax.tar.gz -C soup_jax; cd soup_jax; \
command -v $python || { sudo apt-get update; sudo apt-get install -y $python-venv; }; \
$python -m venv .venv; .venv/bin/python -m pip install --quiet -e '.[tpu]'"
    ;;
  --log) on_host 0 "$follow" ;;
  --stop) on_host all "$stop" ;;
  -*) fail "$usage" ;;
  *)
    (($# >= 2)) || fail "$usage"
    config=$1 workdir=$2
    shift 2
    train=$(printf ' %q' .venv/bin/soup-jax train --config="$config" --workdir="$workdir" \
      --config.mesh.platform=tpu "$@")
    train=${train# }
    job=$(printf '%q' "echo $(printf '%q' "+ $train"); $train; echo \"exit status \$?\"")
    # Who knows it may take part in the run. As a file, so that no command line shows it.
    secret=$(mktemp)
    trap 'rm -f "$secret"' EXIT
    echo "${SOUP_JAX_SECRET:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}" > "$secret"
    run gcloud compute tpus tpu-vm scp "$secret" "$TPU:soup_jax_secret" "${where[@]}" --worker=all
    echo "on every host: $train"
    on_host all "cd soup_jax || exit; \
export SOUP_JAX_SECRET=\$(cat ../soup_jax_secret); rm -f ../soup_jax_secret; \
if $busy; then echo 'a run is under way' >&2; exit 1; fi; \
nohup bash -c $job > train.log 2>&1 < /dev/null & echo \$! > train.pid"
    on_host 0 "$follow"
    ;;
esac
