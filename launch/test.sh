#!/usr/bin/env bash
# Lint, format check, types and the tests on 8 simulated CPU devices, in environments of their own.
#
#   bash launch/test.sh [--fast | --all | --lowest | --hf | --servers] [pytest arguments, paths from the root]
#
# (nothing)  all but the tests marked slow; then, on Python 3.12 with the newest jax, the fast ones
# --fast     the test files that find most mistakes in about two minutes (FAST in conftest.py)
# --all      also the tests marked slow
# --lowest   the fast ones, with the lowest releases that pyproject.toml allows; no lint
# --hf       against transformers, torch, llama.cpp and lm_eval, which are installed for it; no lint
# --servers  likewise against Apache Beam and servers of S3 and GCS; their drivers and lm_eval ask for
#            different releases of fsspec; with --all, the slow ones of these, too
# PYTHON     the interpreter to use (default python3), 3.11 or newer
# PYTHON312  the second one (default: python3.12, or pyenv's); nothing else is given to pytest there,
#            so it is left out where there are pytest arguments, and `none` leaves it out always
# WORKERS    test files run at a time (default: one a core, at most 4)
# DRY_RUN=1  print the commands, run nothing
#
# The first run installs the dependencies into .venv-test (about 1.5 GB, minutes, needs the
# network), and .venv-test-3.12, -lowest, -hf or -servers; later ones reuse them until pyproject.toml, setup.cfg
# or the interpreter changes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

run() {
  printf '+'; printf ' %q' "$@"; printf '\n'
  [[ -n "${DRY_RUN:-}" ]] || "$@"
}

# is_python INTERPRETER CONDITION, as Python reads it with v = sys.version_info
is_python() { "$1" -c "import sys; v = sys.version_info; sys.exit(not ($2))" 2>/dev/null; }

# environment FOLDER INTERPRETER EXTRAS [pip arguments]: made anew where anything changed.
environment() {
  local venv=$1 python=$2 extras=$3 stamp
  shift 3
  stamp=$("$python" -c '
import hashlib, pathlib, sys
parts = [pathlib.Path(p).read_bytes() for p in ("pyproject.toml", "setup.cfg")]
print(hashlib.sha256(b"".join(parts) + (sys.version + sys.base_prefix).encode()).hexdigest())
')
  [[ "$(cat "$venv/stamp" 2>/dev/null)" == "$stamp" ]] && return
  run "$python" -m venv --clear "$venv"
  run "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e ".[$extras]" "$@"
  [[ -n "${DRY_RUN:-}" ]] || echo "$stamp" > "$venv/stamp"
}

python=${PYTHON:-python3}
if ! is_python "$python" 'v >= (3, 11)'; then
  echo "soup_jax needs Python 3.11 or newer, and '$python' is not: set PYTHON=/path/to/python" >&2
  exit 2
fi
workers=${WORKERS:-$("$python" -c 'import os; print(min(4, os.cpu_count() or 1))')}

tests() {
  local venv=$1
  shift
  # By file: what the tests of one share is made once. In the order of conftest.py.
  run "$venv/bin/python" -m pytest -n "$workers" --dist=loadfile --no-loadscope-reorder "$@"
}

arguments=() options=() lowest='' hf='' servers=''
for argument in "$@"; do
  case "$argument" in
    --fast) options+=(--fast) ;;
    --all) options+=(--run-slow) ;;
    --lowest) lowest=1 ;;
    --hf) hf=1 ;;
    --servers) servers=1 ;;
    *) arguments+=("$argument") ;;
  esac
done

if [[ -n "$lowest" ]]; then
  constraints=$(mktemp)
  trap 'rm -f "$constraints"' EXIT
  "$python" -c '
import tomllib
for requirement in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]:
    print(requirement.replace(">=", "=="))
' > "$constraints"
  environment .venv-test-lowest "$python" test -c "$constraints"
  tests .venv-test-lowest --fast ${arguments[@]+"${arguments[@]}"}
  exit
fi

if [[ -n "$hf" ]]; then
  environment .venv-test-hf "$python" test,hf,gguf,lm-eval xllamacpp
  tests .venv-test-hf tests/{hf,gguf,lm_eval,minilm}_test.py ${arguments[@]+"${arguments[@]}"}
  exit
fi

if [[ -n "$servers" ]]; then
  environment .venv-test-servers "$python" test,beam,servers
  tests .venv-test-servers tests/{parts,object_storage}_test.py ${options[@]+"${options[@]}"} \
    ${arguments[@]+"${arguments[@]}"}
  exit
fi

environment .venv-test "$python" test
# The environments are excluded by name: without a .git folder ruff does not read .gitignore.
run .venv-test/bin/ruff check --extend-exclude '.venv-*' .
run .venv-test/bin/ruff format --check --extend-exclude '.venv-*' .
run .venv-test/bin/mypy
# The odd expansion keeps an empty list legal under `set -u` in the bash 3.2 of macOS.
tests .venv-test ${options[@]+"${options[@]}"} ${arguments[@]+"${arguments[@]}"}

# Only the whole suite is followed by the newest jax, which asks for Python 3.12.
if [[ ${#arguments[@]} -gt 0 || " ${options[*]-} " == *" --fast "* ]]; then exit; fi
if is_python .venv-test/bin/python 'v >= (3, 12)'; then exit; fi
for newer in ${PYTHON312:-python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12.*/bin/python3.12}; do
  if is_python "$newer" 'v[:2] == (3, 12)'; then  # the shims of pyenv exist, and may not start
    environment .venv-test-3.12 "$newer" test
    tests .venv-test-3.12 --fast
    exit
  fi
done
echo "no Python 3.12 (PYTHON312): the tests with the newest jax are skipped"
