"""Freed memory is kept, in a process of its own: it cannot be undone."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import glob, mmap, resource, sys
from soup_jax.hardware import host_memory
if "accelerator" in sys.argv: glob.glob = lambda pattern: [pattern]
print(host_memory.keep_freed())
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(200 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults() * mmap.PAGESIZE < 20 << 20)
"""


def start(*arguments: str, **variables: str) -> list[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | variables
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_a_large_block_is_used_again():
    if start()[0] == "True":  # no accelerator here
        assert start() == ["True", "True"]


def test_nothing_is_done_beside_an_accelerator_or_the_users_own_settings():
    assert start("accelerator")[0] == "False"
    assert start(MALLOC_TOP_PAD_="1000")[0] == "False"
