#!/usr/bin/env bash
# From nothing to a specialist on a CPU: text, corpus, soup, generic baseline, table, specialist.
#
#   bash launch/quickstart.sh [--fast]
#
# --fast     a tenth of the steps, into runs/quickstart-fast; too few to compare methods
# PYTHON     the interpreter that makes the environment (default python3), 3.11 or newer
# VENV       the environment (default .venv); made and filled if it has no soup-jax
# DRY_RUN=1  print the commands, run nothing
#
# The network is needed once, to install the dependencies (about 1.5 GB); the text comes from the
# installed packages themselves. Stopped or failed, run it again: what is finished is not redone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in
  "") soup=experiments/quickstart.py generic=$soup:generic dir=runs/quickstart ;;
  --fast)
    soup=experiments/quickstart.py:fast generic=experiments/quickstart.py:fast_generic
    dir=runs/quickstart-fast ;;
  *) echo "usage: bash launch/quickstart.sh [--fast]" >&2; exit 2 ;;
esac
python=${PYTHON:-python3}
venv=${VENV:-.venv}
corpus=--config.corpus.dir=$dir/corpus
specialist=$dir/text/specialists/parquet_headers.jsonl  # C++; see launch/collect_text.py
prompt=$'/// \\brief The column writer\nclass PARQUET_EXPORT '
times=""

run() {
  printf '+'; printf ' %q' "$@"; printf '\n'
  [[ -n "${DRY_RUN:-}" ]] || "$@"
}
stage() {  # stage NAME COMMAND...: run it and note how long it took
  local name=$1 start=$SECONDS
  shift
  printf '\n== %s\n' "$name"
  run "$@"
  times+=$(printf '%7d s  %s' $((SECONDS - start)) "$name")$'\n'
}

if [[ ! -x "$venv/bin/soup-jax" ]]; then
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "soup_jax needs Python 3.11 or newer, and '$python' is not: set PYTHON=/path/to/python" >&2
    exit 2
  fi
  run "$python" -m venv "$venv"
  stage "install" "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e .
fi
soup_jax=$venv/bin/soup-jax

# On a CPU: keep freed memory for the next step (glibc), about a fifth of its CPU time.
if ! compgen -e MALLOC_ && ! compgen -G '/dev/nvidia[0-9]*' && ! compgen -G '/dev/accel*' &&
  ! compgen -G '/dev/vfio/[0-9]*' && ! compgen -G /dev/kfd; then
  export MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0
  export MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_TOP_PAD_=67108864
fi >/dev/null

stage "collect text" "$venv/bin/python" launch/collect_text.py --out "$dir/text"
stage "prepare the corpus" "$soup_jax" prepare --config="$soup" "$corpus" \
  --config.corpus.sources="$dir/text/generic"
sets=--config.evaluate.specialists=$dir/text/specialists/*.jsonl
stage "train the soup" \
  "$soup_jax" train --config="$soup" --workdir="$dir/soup" "$corpus" "$sets"
stage "train the generic baseline" \
  "$soup_jax" train --config="$generic" --workdir="$dir/generic" "$corpus" "$sets"
stage "evaluate" "$soup_jax" evaluate --workdir="$dir/soup" --against="$dir/generic" \
  --specialists="$dir/text/specialists/*.jsonl" --max_windows=256 --text="$dir/evaluation.txt"
stage "instantiate a specialist" "$soup_jax" instantiate --run="$dir/soup" \
  --documents="$specialist" --out="$dir/specialist"
stage "generate with it" "$soup_jax" generate --model="$dir/specialist" --prompt="$prompt"

[[ -z "${DRY_RUN:-}" ]] || exit 0
printf '\nTime per stage:\n%s\n' "$times"
cat "$dir/evaluation.txt"
printf '\nNext, a specialist from documents of your own (one {"text": ...} a line, or plain text):\n'
printf '  %s instantiate --run=%s --documents=FILE --out=%s/mine\n' "$soup_jax" "$dir/soup" "$dir"
