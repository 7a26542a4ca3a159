"""The cache of compiled functions: where it is, when it is off, what a second start says."""

import errno
import os
import pathlib
import subprocess
import sys

import pytest
from jax._src import lru_cache

from soup_jax.hardware import sealed_cache

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
    # For another number of threads XLA may cut sums in other parts.
    other, third = start(XDG_CACHE_HOME=str(tmp_path), PJRT_NPROC="97")
    assert other != folder
    assert ", compiled in" in third


@pytest.mark.parametrize("home", ["/dev/null", "/proc/nowhere"])
def test_an_unwritable_home_is_a_warning(home):
    folder, log = start(XDG_CACHE_HOME=home)
    assert folder == "None"
    warning, line = log.splitlines()
    assert "are not kept" in warning
    assert home in warning
    assert "compiled in" in line


def test_a_folder_that_others_may_write_is_not_used(tmp_path):
    folder, _ = start(XDG_CACHE_HOME=str(tmp_path))
    assert pathlib.Path(folder).stat().st_mode & 0o077 == 0
    pathlib.Path(folder).chmod(0o777)
    nothing, log = start(XDG_CACHE_HOME=str(tmp_path))
    assert nothing == "None"
    assert f"{folder} is another user's, or others may write there" in log


def test_the_users_own_settings_win(tmp_path):
    own, other = str(tmp_path / "own"), str(tmp_path / "other")
    folder, _ = start(XDG_CACHE_HOME=other, JAX_COMPILATION_CACHE_DIR=own)
    assert folder == own
    assert os.listdir(tmp_path) == ["own"]
    folder, log = start(XDG_CACHE_HOME=other, JAX_ENABLE_COMPILATION_CACHE="false")
    assert folder == "None"
    assert "compiled in" in log
    assert os.listdir(tmp_path) == ["own"]


@pytest.fixture
def cache(tmp_path):
    return sealed_cache.SealedCache(str(tmp_path), max_size=1000)


def test_a_damaged_entry_counts_as_missing_and_is_replaced(cache, tmp_path, caplog):
    cache.put("key", b"the value")
    entry = tmp_path / "key-cache"
    sound = entry.read_bytes()
    for damaged in (b"The" + sound[3:], sound[:-1], b""):
        entry.write_bytes(damaged)
        assert cache.get("key") is None
        assert f"{entry} is damaged" in caplog.text
        cache.put("key", b"the value")
        assert cache.get("key") == b"the value"


def test_an_entry_without_its_time_stops_no_other(cache, tmp_path):
    """A process was killed between the two, or the disk was full."""
    (tmp_path / "half-cache").write_bytes(b"half an entry")
    cache.put("key", b"value")
    assert cache.get("key") == b"value"
    assert sorted(os.listdir(tmp_path)) == [".lockfile", "key-atime", "key-cache"]


def test_an_entry_that_does_not_fit_on_the_disk_leaves_nothing(cache, tmp_path, monkeypatch):
    def full(self, key, value):
        (tmp_path / f"{key}-cache").write_bytes(value[:4])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lru_cache.LRUCache, "put", full)
    with pytest.raises(OSError, match="No space"):
        cache.put("key", b"the value")
    assert os.listdir(tmp_path) == [".lockfile"]


def test_commands_check_what_they_read(tmp_path):
    folder, _ = start(XDG_CACHE_HOME=str(tmp_path))
    for entry in pathlib.Path(folder).glob("*-cache"):
        data = bytearray(entry.read_bytes())
        data[len(data) // 2] ^= 1
        entry.write_bytes(data)
    _, log = start(XDG_CACHE_HOME=str(tmp_path))
    assert ": compiling it again" in log
    assert "compiled in" in log
