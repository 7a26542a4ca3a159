#!/usr/bin/env bash
# Lint, format check and the tests on 8 simulated CPU devices, in an environment of their own.
#
#   bash launch/test.sh [--all] [pytest arguments, paths from the repository root]
#
# --all      also the tests marked slow
# PYTHON     the interpreter to use (default python3), 3.11 or newer
# WORKERS    test files run at a time (default: one a core, at most 4)
# DRY_RUN=1  print the commands, run nothing
#
# The first run installs the dependencies into .venv-test (about 1.5 GB, minutes, needs the
# network); later ones reuse it until pyproject.toml, setup.cfg or the interpreter changes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

run() {
  printf '+'; printf ' %q' "$@"; printf '\n'
  [[ -n "${DRY_RUN:-}" ]] || "$@"
}

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "soup_jax needs Python 3.11 or newer, and '$python' is not: set PYTHON=/path/to/python" >&2
  exit 2
fi

arguments=()
for argument in "$@"; do
  [[ "$argument" == --all ]] && argument=--run-slow
  arguments+=("$argument")
done

venv=.venv-test
stamp=$("$python" -c '
import hashlib, pathlib, sys
parts = [pathlib.Path(p).read_bytes() for p in ("pyproject.toml", "setup.cfg")]
print(hashlib.sha256(b"".join(parts) + (sys.version + sys.base_prefix).encode()).hexdigest())
')
if [[ "$(cat "$venv/stamp" 2>/dev/null)" != "$stamp" ]]; then
  run "$python" -m venv --clear "$venv"
  run "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e '.[test]'
  [[ -n "${DRY_RUN:-}" ]] || echo "$stamp" > "$venv/stamp"
fi

# The environments are excluded by name: without a .git folder ruff does not read .gitignore.
run "$venv/bin/ruff" check --extend-exclude '.venv-*' .
run "$venv/bin/ruff" format --check --extend-exclude '.venv-*' .
workers=${WORKERS:-$("$python" -c 'import os; print(min(4, os.cpu_count() or 1))')}
# By file: what the tests of one share is made once.
# The odd expansion keeps an empty list legal under `set -u` in the bash 3.2 of macOS.
run "$venv/bin/python" -m pytest -n "$workers" --dist=loadfile \
  ${arguments[@]+"${arguments[@]}"}
