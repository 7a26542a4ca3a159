#!/usr/bin/env bash
# Train on this machine: one process on all its devices, or several to rehearse a cluster.
#
#   bash launch/local.sh CONFIG WORKDIR [--config.section.field=value ...]
#
# On a CPU, after `bash launch/quickstart.sh --fast`, four processes with two devices each:
#
#   PROCESSES=4 CPU_DEVICES=2 bash launch/local.sh experiments/quickstart.py:fast runs/rehearsal \
#     --config.corpus.dir=runs/quickstart-fast/corpus
#
# PROCESSES    default 1. More talk over loopback and share the NVIDIA GPUs evenly, in order; the
#              chips of a TPU host belong to one process
# CPU_DEVICES  simulate so many CPU devices in each process, whatever else the machine has
# PORT         of process 0 (default: a free one)
# VENV         the environment with soup-jax (default .venv if it has one, else the PATH)
# DRY_RUN=1    print the commands, run nothing
#
# Paths count from the repository root. Ctrl-C or SIGTERM saves and stops; the same command goes on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

show() { printf '+'; printf ' %q' "$@"; printf '\n'; }
fail() { echo "local.sh: $1" >&2; exit 2; }

(($# >= 2)) || fail "usage: bash launch/local.sh CONFIG WORKDIR [--config.section.field=value ...]"
config=$1 workdir=$2
shift 2
processes=${PROCESSES:-1}
[[ "$processes" =~ ^[1-9][0-9]*$ ]] || fail "PROCESSES=$processes is not a number from 1 on"
[[ -n "${VENV:-}" || ! -x .venv/bin/soup-jax ]] || VENV=.venv
bin=${VENV:+$VENV/bin/}

# On a CPU: keep freed memory for the next step (glibc), about a fifth of its CPU time.
if ! compgen -e MALLOC_ && ! compgen -G '/dev/nvidia[0-9]*' && ! compgen -G '/dev/accel*' &&
  ! compgen -G '/dev/vfio/[0-9]*' && ! compgen -G /dev/kfd; then
  export MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0
  export MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_TOP_PAD_=67108864
fi >/dev/null

train=("${bin}soup-jax" train --config="$config" --workdir="$workdir")
settings=(env)  # of every process
if [[ -n "${CPU_DEVICES:-}" ]]; then
  count=--xla_force_host_platform_device_count=$CPU_DEVICES
  settings+=(JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }$count")
fi

if ((processes == 1)); then
  # Off, because inside an allocation of a cluster "auto" would wait for the other tasks.
  train=("${settings[@]}" "${train[@]}" --distributed=off "$@")
  show "${train[@]}"
  [[ -z "${DRY_RUN:-}" ]] || exit 0
  exec "${train[@]}"  # so that a SIGTERM to this script reaches the program
fi

gpus=()
if [[ -z "${CPU_DEVICES:-}" ]]; then
  listed=${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null |
    paste -s -d , - || true)}
  IFS=, read -r -a gpus <<< "$listed" || true
fi
share=$((${#gpus[@]} / processes))
((share * processes == ${#gpus[@]})) ||
  fail "${#gpus[@]} GPUs cannot be shared evenly by PROCESSES=$processes"

free_port='import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
port=${PORT:-$("${bin}python3" -c "$free_port")}
# Who knows it may take part in the run. Exported, so that no command line shows it.
export SOUP_JAX_SECRET=${SOUP_JAX_SECRET:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}
pids=() signalled=""
# In the background the shell makes children deaf to Ctrl-C until they listen for it themselves.
trap 'signalled=1; kill -TERM ${pids[@]+"${pids[@]}"} 2>/dev/null || true' INT TERM
for ((i = 0; i < processes; i++)); do
  one=("${settings[@]}" SOUP_JAX_COORDINATOR="127.0.0.1:$port"
    SOUP_JAX_NUM_PROCESSES="$processes" SOUP_JAX_PROCESS_ID="$i")
  if ((share)); then
    own=("${gpus[@]:i * share:share}")
    one+=(CUDA_VISIBLE_DEVICES="$(IFS=,; echo "${own[*]}")")
  fi
  one+=("${train[@]}" "$@")
  show "${one[@]}"
  [[ -n "${DRY_RUN:-}" ]] || { "${one[@]}" & pids+=("$!"); }
done

worst=0
for pid in ${pids[@]+"${pids[@]}"}; do
  while :; do
    signalled="" status=0
    wait "$pid" || status=$?
    [[ -n "$signalled" ]] || break  # the trap cut the wait short: this was not the exit status
  done
  ((status == 0)) || echo "local.sh: a process ended with status $status" >&2
  ((status <= worst)) || worst=$status
done
exit "$worst"
