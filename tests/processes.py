"""Runs of `soup-jax train` as one or several processes on this machine; killed at the end."""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

NUM_DEVICES = 8

# A config file of the test's own: fields as JSON, and what goes wrong at which process and step.
CONFIG = """
import json, os, signal, time
from soup_jax.data import loader
from soup_jax.experiments import base

TROUBLE = json.loads(os.environ.get("TEST_TROUBLE", "{{}}"))
original, seen = loader.to_device, [TROUBLE.get("start", 0)]


def to_device(*arguments):
    step = seen[0]
    seen[0] += 1
    time.sleep(TROUBLE.get("slow", 0.0))
    if step == TROUBLE.get("step") and os.environ["SOUP_JAX_PROCESS_ID"] == TROUBLE["process"]:
        if TROUBLE["what"] == "hang":
            time.sleep(600)
        elif TROUBLE["what"] == "raise":
            raise OSError("no space left on device")
        else:
            os.kill(os.getpid(), getattr(signal, TROUBLE["what"]))
    return original(*arguments)


loader.to_device = to_device


def get_config():
    cfg = base.get_config()
    cfg.update_from_flattened_dict(json.loads({fields!r}))
    return cfg
"""


def flat_fields(cfg) -> dict:
    """The fields of a config as JSON can hold them; experts.rules stays at its default."""
    from soup_jax.config import schema as config

    return {name: value for name, value in config.flat_items(cfg) if name != "experts.rules"}


def write_config(folder: pathlib.Path, cfg) -> pathlib.Path:
    path = folder / "config.py"
    path.write_text(CONFIG.format(fields=json.dumps(flat_fields(cfg))))
    return path


def free_port() -> int:
    # Below the range that the system hands out by itself: nobody takes it in between.
    for port in range(20_000 + os.getpid() % 10_000, 32_000):
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port
    raise OSError("no free port")


class Processes(list):
    """Popen objects of one run, in the order of their ids; `port` is the coordinator's."""

    port: int

    def join(self, seconds: float = 120) -> tuple[list[int], list[str]]:
        """(statuses, outputs) once all have ended by themselves."""
        end = time.monotonic() + seconds
        outputs = []
        for process in self:
            try:
                out, _ = process.communicate(timeout=max(end - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
                out = process.communicate()[0] + "\n(killed by the test: still running)"
            outputs.append(out)
        return [p.returncode for p in self], outputs


@contextlib.contextmanager
def start(
    config: pathlib.Path,
    workdir: pathlib.Path,
    num_processes: int,
    *flags: str,
    only: tuple[int, ...] | None = None,
    num_devices: int = NUM_DEVICES,
    **trouble,
) -> Iterator[Processes]:
    """Start the run; `only` those processes, with `trouble` as CONFIG reads it."""
    port = free_port()
    running = Processes()
    running.port = port
    try:
        for i in range(num_processes) if only is None else only:
            env = dict(os.environ)
            count = num_devices // num_processes
            flag = "--xla_force_host_platform_device_count="
            env["XLA_FLAGS"] = env["XLA_FLAGS"].replace(f"{flag}{NUM_DEVICES}", f"{flag}{count}")
            env["TEST_TROUBLE"] = json.dumps(trouble)
            env["SOUP_JAX_PROCESS_ID"] = str(i)
            if num_processes > 1:
                env["SOUP_JAX_NUM_PROCESSES"] = str(num_processes)
                env["SOUP_JAX_COORDINATOR"] = f"127.0.0.1:{port}"
            else:
                flags = (*flags, "--distributed=off")
            command = [sys.executable, "-m", "soup_jax.cli", "train"]
            command += [f"--config={config}", f"--workdir={workdir}", *flags]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            running.append(subprocess.Popen(command, env=env, **pipes))
        yield running
    finally:
        for process in running:
            process.kill()
        for process in running:
            process.communicate()
