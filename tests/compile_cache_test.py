"""The cache of compiled functions: where it is, when it is off, what a second start says."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import logging
import jax, jax.numpy as jnp
logging.basicConfig(format="%(message)s")
logging.getLogger("soup_jax").setLevel(logging.INFO)
from soup_jax.hardware import compile_cache
print(compile_cache.enable())
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
x = jnp.arange(16.0)
compile_cache.compiled("function", jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x)), x)
"""


def start(**variables: str) -> tuple[str, str]:
    """(folder, log) of a process with these variables and no other of the cache's."""
    env = {k: v for k, v in os.environ.items() if "_CACHE_" not in k} | variables
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return done.stdout.strip(), done.stderr


def test_a_second_start_reads_what_the_first_compiled(tmp_path):
    folder, first = start(XDG_CACHE_HOME=str(tmp_path))
    assert folder.startswith(str(tmp_path / "soup_jax" / "xla"))
    assert "function: traced in" in first
    assert ", compiled in" in first
    entries = list(tmp_path.rglob("*-cache"))
    assert entries
    same, second = start(XDG_CACHE_HOME=str(tmp_path))
    assert same == folder
    # Nothing but that line: a cached function is loaded without complaints about the machine.
    assert len(second.splitlines()) == 1
    assert "read from the cache" in second
    assert list(tmp_path.rglob("*-cache")) == entries


@pytest.mark.parametrize("home", ["/dev/null", "/proc/nowhere"])
def test_an_unwritable_home_is_a_warning(home):
    folder, log = start(XDG_CACHE_HOME=home)
    assert folder == "None"
    warning, line = log.splitlines()
    assert "are not kept" in warning
    assert home in warning
    assert "compiled in" in line


def test_the_users_own_settings_win(tmp_path):
    own, other = str(tmp_path / "own"), str(tmp_path / "other")
    folder, _ = start(XDG_CACHE_HOME=other, JAX_COMPILATION_CACHE_DIR=own)
    assert folder == own
    assert os.listdir(tmp_path) == ["own"]
    folder, log = start(XDG_CACHE_HOME=other, JAX_ENABLE_COMPILATION_CACHE="false")
    assert folder == "None"
    assert "compiled in" in log
    assert os.listdir(tmp_path) == ["own"]


def test_what_a_killed_process_left_is_dropped(tmp_path):
    folder, _ = start(XDG_CACHE_HOME=str(tmp_path))
    half = os.path.join(folder, "half-cache")
    with open(half, "wb") as file:
        file.write(b"half an entry")
    start(XDG_CACHE_HOME=str(tmp_path))
    assert os.path.exists(half)  # another process may be writing it
    os.utime(half, (0, 0))
    start(XDG_CACHE_HOME=str(tmp_path))
    assert not os.path.exists(half)
