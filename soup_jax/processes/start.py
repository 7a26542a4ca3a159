"""Start and end of a run over many processes; what they are to each other in between is a `group`.

    with start.processes(cfg, found, workdir=workdir) as group:   # found: place.find_place(...)
        loop.train(cfg, workdir)                                  # finds it by start.current()

Before jax touches a device, in this order:

1. All processes connect to the coordinator, a thread of process 0 at the address that was given,
   and prove that they know the secret of the run (`secret`). If one does not come, the error names
   it.
2. They compare code, versions and config, field by field.
3. jax's own service starts on a free port of the same host and finds the devices. They must be
   alike on all processes and of the platform that `mesh.platform` names; each process prints them.

At the end all wait for each other. A process that fails tells the others, and all end with a
non-zero status: nobody waits for it for ever. jax can only abort then, so a process of a failed
group ends without unwinding.
"""

import contextlib
import hashlib
import importlib.util
import logging
import os
import pathlib
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

import soup_jax
from soup_jax.config import schema as config_lib
from soup_jax.errors import UserError
from soup_jax.hardware import mesh
from soup_jax.processes import watchdog
from soup_jax.processes.coordinator import Coordinator
from soup_jax.processes.group import STATUS_FAILED, STATUS_USER, Group, Solo
from soup_jax.processes.lobby import listen
from soup_jax.processes.place import Place
from soup_jax.processes.secret import Secret, find_secret

_log = logging.getLogger(__name__)

# jax aborts without a word of ours when its own heartbeats stop; ours shall be noticed first.
_JAX_LATER_SECS = 30
# Fields that may differ between the processes of a run: paths of a machine.
_OWN_FIELDS = ("corpus.dir",)

_current: Group | None = None


def current() -> Solo:
    """The group of this process: that of the enclosing `processes`, or a group of one.

    Raises:
      UserError: jax knows of several processes, but they were not started by `processes`.
    """
    if _current is not None:
        return _current
    if jax.process_count() > 1:
        raise UserError(
            f"jax runs over {jax.process_count()} processes that soup_jax did not start: use "
            "soup_jax.processes.start.processes instead of jax.distributed.initialize"
        )
    return Solo()


@contextlib.contextmanager
def processes(
    cfg: ConfigDict, place: Place | None, *, workdir: pathlib.Path | None = None
) -> Iterator[Solo]:
    """Connects the processes of a run for the time of the block; with many, see the module.

    Args:
      place: None for a single process.
      workdir: of the run, seen by all processes: process 0 leaves the secret there while they
        start. None: SOUP_JAX_SECRET must be set on all.

    Raises:
      UserError: processes are missing or differ, or the devices are not those of the config.
    """
    global _current
    _choose_platform(cfg)
    if place is None:
        _local_devices(cfg)
        yield Solo()
        return
    secret = find_secret(workdir)
    try:
        group = _connect(cfg, place, secret)
    except BaseException as e:
        secret.remove()
        if not isinstance(e, UserError):
            raise
        # Not unwound: the coordinator's thread may still have something to say to the others.
        watchdog.leave(f"process {place.process_id}: {e}", STATUS_USER)
    try:
        _start_jax(cfg, place, group)
        _current = group
        yield group
        group.meet("end", timeout=_end_timeout(cfg))
        jax.distributed.shutdown()
    except BaseException as e:
        _fail(group, e)
    _current = None
    group.close()
    group.wait_for_others()


def _end_timeout(cfg: ConfigDict) -> float:
    # Process 0 draws the learning curve before it comes.
    return max(cfg.distributed.init_timeout_secs, cfg.checkpoint.async_timeout_secs)


def _connect(cfg: ConfigDict, place: Place, secret: Secret) -> Group:
    settings, coordinator = cfg.distributed, None
    reserved: socket.socket | None = None
    if place.process_id == 0:
        host, _, port = place.coordinator.rpartition(":")
        try:
            listeners = listen(host, int(port))
        except OSError as e:
            raise UserError(f"the coordinator's port {port} cannot be used here: {e}") from e
        # Held until everybody is there, then given to jax.
        reserved = socket.socket()
        reserved.bind(("", 0))
        coordinator = Coordinator(
            listeners,
            secret=secret,
            num_processes=place.num_processes,
            jax_port=reserved.getsockname()[1],
            init_timeout=settings.init_timeout_secs,
            silence_timeout=settings.heartbeat_timeout_secs,
        )
        coordinator.start()
    others = _others(coordinator, secret)

    def on_down(text: str, status: int, dump: bool) -> None:
        if dump:
            watchdog.dump_stacks()
        watchdog.leave(f"process {place.process_id} stops: {text}", status, after=others)

    group = Group.connect(
        place.coordinator,
        process_id=place.process_id,
        num_processes=place.num_processes,
        timeout=settings.init_timeout_secs,
        secret=secret,
        silence_timeout=settings.heartbeat_timeout_secs,
        on_down=on_down,
    )
    group.wait_for_others = others
    secret.remove(folders=False)  # everybody is here; the run writes into the folder soon
    if reserved is not None:
        reserved.close()
    return group


def _start_jax(cfg: ConfigDict, place: Place, group: Group) -> None:
    timeout = cfg.distributed.init_timeout_secs
    group.require_same("code and config", _facts(cfg), timeout=timeout)
    group.at("connecting jax")
    # A signal is agreed on by the group, at once and not only by SIGTERM.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        f"{place.coordinator.rsplit(':', 1)[0]}:{group.jax_port}",
        place.num_processes,
        place.process_id,
        local_device_ids=place.local_device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=timeout,
        heartbeat_timeout_seconds=cfg.distributed.heartbeat_timeout_secs + _JAX_LATER_SECS,
    )
    group.at("finding devices")
    devices = _local_devices(cfg)
    kinds = f"{len(devices)} x {devices[0].platform} ({devices[0].device_kind})"
    _log.info(
        "process %d of %d (%s) on %s, pid %d: %s",
        place.process_id,
        place.num_processes,
        place.source,
        socket.gethostname(),
        os.getpid(),
        kinds,
    )
    _quiet(place)
    _, differences = group.meet("devices", {"local devices": kinds}, timeout=timeout)
    if differences:
        raise UserError(
            "the processes have different devices:\n  "
            + "\n  ".join(differences)
            + f"\nAll devices:\n{mesh.device_table(jax.devices())}"
        )
    group.at("setting up")


def _quiet(place: Place) -> None:
    logger = logging.getLogger("soup_jax")
    for handler in logger.handlers:
        form = f"%(asctime)s %(levelname).1s process {place.process_id}: %(message)s"
        handler.setFormatter(logging.Formatter(form, "%H:%M:%S"))
    if place.process_id:
        logger.setLevel(logging.WARNING)


def _facts(cfg: ConfigDict) -> dict[str, Any]:
    facts = {f"config.{n}": repr(v) for n, v in config_lib.flat_items(cfg) if n not in _OWN_FIELDS}
    version = ".".join(map(str, sys.version_info[:3]))
    return {**facts, "jax": jax.__version__, "python": version, "soup_jax code": code_hash()}


def code_hash() -> str:
    """Twelve hex digits of the SHA-256 of the library's source files, of all its packages."""
    root, digest = pathlib.Path(soup_jax.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _choose_platform(cfg: ConfigDict) -> None:
    # Left alone, jax takes the CPU where an accelerator does not start, with a warning at most.
    # Named, it says why. Where nothing is installed for it, `_local_devices` refuses the CPU.
    names = {"gpu": ("jax_cuda12_plugin", "jax_cuda13_plugin"), "tpu": ("libtpu",)}
    packages = names.get(cfg.mesh.platform, ())
    if not os.environ.get("JAX_PLATFORMS") and any(map(importlib.util.find_spec, packages)):
        jax.config.update("jax_platforms", {"gpu": "cuda,cpu", "tpu": "tpu,cpu"}[cfg.mesh.platform])


def _local_devices(cfg: ConfigDict) -> list[jax.Device]:
    wanted = cfg.mesh.platform
    try:
        devices = jax.local_devices()
    except RuntimeError as e:
        raise UserError(
            f"jax finds no device of the platform {wanted or os.environ.get('JAX_PLATFORMS')!r} "
            f"on {socket.gethostname()}: {str(e).splitlines()[0]}. Install soup_jax"
            f"[{wanted or 'gpu'}], or change mesh.platform"
        ) from e
    if wanted and devices[0].platform != wanted:
        raise UserError(
            f"mesh.platform = {wanted!r}, but jax found {devices[0].platform!r} on "
            f"{socket.gethostname()} (JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}):\n"
            f"{mesh.device_table(devices)}"
        )
    return devices


def _fail(group: Group, error: BaseException) -> None:
    user = isinstance(error, UserError)
    collective = isinstance(error, jax.errors.JaxRuntimeError)
    cause = "collective" if collective else "error"
    status = STATUS_USER if user else STATUS_FAILED
    first = str(error) if user else f"{type(error).__name__}: {error}"
    verdict = group.fail(first[:4000], status=status, cause=cause)
    if not user and not (collective and verdict):  # else it only follows from what the verdict says
        traceback.print_exception(error)
    watchdog.leave(
        f"process {group.process_id}: {verdict or first}", status, after=group.wait_for_others
    )


def _others(coordinator: Coordinator | None, secret: Secret) -> Callable[[], object]:
    def wait() -> None:
        if coordinator is not None:
            coordinator.drained.wait(5)
            secret.remove()

    return wait
