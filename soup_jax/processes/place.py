"""Which process of how many this is: from flags, variables, or the launcher's environment.

Explicit settings, on the command line or in the environment, win:

    --coordinator=HOST:PORT    SOUP_JAX_COORDINATOR       process 0, any free port of it
    --num_processes=N          SOUP_JAX_NUM_PROCESSES
    --process_id=I             SOUP_JAX_PROCESS_ID
    --local_device_ids=0,1     SOUP_JAX_LOCAL_DEVICE_IDS  accelerators of this machine; default
                                                          all

The launcher gives the rest: Slurm, Open MPI, GKE (by the variables of its TPU node pools) or a
Cloud TPU VM (by its metadata server). A Kubernetes job or JobSet of GPUs sets the first two itself;
the id is its completion index. Nothing here imports jax or starts anything: jax says who a process
is only once it is initialised, and the processes are compared before.
"""

import dataclasses
import importlib.util
import os
import pathlib
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from soup_jax.errors import UserError

MODES = ("auto", "on", "off")
DEFAULT_PORT = 8476
# Launchers that give no port: one from the upper end of the ephemeral range, so that two jobs that
# share a machine rarely meet.
_FIRST_PORT, _NUM_PORTS = 61440, 4096


@dataclasses.dataclass(frozen=True)
class Place:
    """This process among all.

    Attributes:
      coordinator: "HOST:PORT" of process 0.
      local_device_ids: of this machine's accelerators, those to use; None: all.
      source: who says so, for messages.
    """

    coordinator: str
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None
    source: str


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the user set; None where nothing was said."""

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: tuple[int, ...] | None = None


def settings(flags: Settings, env: Mapping[str, str] = os.environ) -> Settings:
    """`flags`, and what they leave open from the SOUP_JAX_* variables.

    Raises:
      UserError: a variable is not a number.
    """

    def number(name: str, given: int | None) -> int | None:
        text = env.get(name, "")
        if given is not None or not text:
            return given
        try:
            return int(text)
        except ValueError:
            raise UserError(f"{name} = {text!r} is not a number") from None

    index = number("SOUP_JAX_PROCESS_ID", flags.process_id)
    count = number("SOUP_JAX_NUM_PROCESSES", flags.num_processes)
    if index is None and count is not None:
        index = number("JOB_COMPLETION_INDEX", None)  # of an indexed Kubernetes job or JobSet
    ids = flags.local_device_ids
    if ids is None and env.get("SOUP_JAX_LOCAL_DEVICE_IDS"):
        ids = device_ids(env["SOUP_JAX_LOCAL_DEVICE_IDS"])
    return Settings(
        flags.coordinator or env.get("SOUP_JAX_COORDINATOR") or None,
        count,
        index,
        ids,
    )


def device_ids(text: str) -> tuple[int, ...]:
    """ "0,1" as numbers.

    Raises:
      UserError: it is something else.
    """
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise UserError(f"local device ids {text!r} are not numbers with commas, such as 0,1")
    return tuple(int(x) for x in text.split(","))


def find_place(mode: str, flags: Settings, env: Mapping[str, str] = os.environ) -> Place | None:
    """Where this process stands, or None if it is the only one.

    Args:
      mode: auto (many processes if somebody clearly says so), on (an error if nobody does), off.

    Raises:
      UserError: settings that contradict each other or are incomplete, or devices chosen for the
        only process.
    """
    if mode not in MODES:
        raise UserError(f"--distributed={mode} is none of {list(MODES)}")
    wanted = settings(flags, env)
    if mode == "off":
        if any(v is not None for v in dataclasses.astuple(flags)):
            raise UserError(
                "--distributed=off and --coordinator, --num_processes, --process_id or "
                "--local_device_ids contradict each other"
            )
        return None
    explicit = (wanted.coordinator, wanted.num_processes, wanted.process_id)
    found = None if None not in explicit else _detect(env)
    if found is None and all(v is None for v in explicit):
        if mode == "on":
            raise UserError(
                "--distributed=on, but no launcher was recognised (Slurm, Open MPI, GKE, Cloud TPU "
                "VM); set --coordinator=HOST:PORT --num_processes=N --process_id=I on each process"
            )
        place = None
    else:
        place = _checked(wanted, found)
    if place is None and wanted.local_device_ids is not None:
        raise UserError(
            "--local_device_ids (SOUP_JAX_LOCAL_DEVICE_IDS) says which devices one of many "
            "processes takes, and this is the only one: leave it out, and choose devices by "
            "CUDA_VISIBLE_DEVICES, ROCR_VISIBLE_DEVICES or TPU_VISIBLE_CHIPS"
        )
    return place


def _checked(wanted: Settings, found: Place | None) -> Place | None:
    def pick(name: str) -> Any:
        value = getattr(wanted, name)
        return getattr(found, name) if value is None and found else value

    values = {n: pick(n) for n in ("coordinator", "num_processes", "process_id")}
    missing = [f"--{name}" for name, value in values.items() if value is None]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} not set, and no launcher says it; --coordinator, "
            "--num_processes and --process_id (or the variables SOUP_JAX_COORDINATOR, "
            "SOUP_JAX_NUM_PROCESSES, SOUP_JAX_PROCESS_ID) go together"
        )
    coordinator, count, index = values.values()
    if count < 1 or not 0 <= index < count:
        raise UserError(
            f"process_id = {index} and num_processes = {count} do not fit: ids go from 0 to "
            "num_processes - 1"
        )
    if not re.fullmatch(r"(\[[0-9a-fA-F:.%]+\]|[^:\s\[\]]+):\d{1,5}", coordinator) or not (
        0 < int(coordinator.rsplit(":", 1)[1]) < 65536
    ):
        raise UserError(f"--coordinator={coordinator} is not HOST:PORT")
    source = "explicit settings" if found is None else found.source
    ids = wanted.local_device_ids
    if ids is None and found is not None:
        ids = found.local_device_ids
    return Place(coordinator, count, index, ids, source) if count > 1 else None


def _detect(env: Mapping[str, str]) -> Place | None:
    for detect in (_slurm, _open_mpi, _gke_tpu, _cloud_tpu_vm):
        try:
            place = detect(env)
        except (KeyError, ValueError, IndexError) as e:
            raise UserError(
                f"the environment of the launcher ({detect.__name__.strip('_')}) is incomplete: "
                f"{e!r}; set --coordinator, --num_processes and --process_id, or --distributed=off"
            ) from e
        if place is not None and place.num_processes > 1:
            return place
    return None


def _slurm(env: Mapping[str, str]) -> Place | None:
    # SLURM_STEP_NODELIST exists inside `srun` only: in the batch script itself there is one process
    # although SLURM_NTASKS tells of more.
    if "SLURM_STEP_NODELIST" not in env or "SLURM_PROCID" not in env:
        return None
    count = int(env.get("SLURM_STEP_NUM_TASKS") or env["SLURM_NTASKS"])
    job = int(env["SLURM_JOB_ID"])
    tasks = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE", "")
    return Place(
        f"{first_host(env['SLURM_STEP_NODELIST'])}:{_FIRST_PORT + job % _NUM_PORTS}",
        count,
        int(env["SLURM_PROCID"]),
        _device_of(int(env["SLURM_LOCALID"]), int(re.split(r"\D", tasks)[0] or 1), env),
        "Slurm",
    )


def first_host(node_list: str) -> str:
    """The first name of a Slurm node list: "gpu[007,009-12],x" -> "gpu007"."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", node_list)
    if not match:
        raise ValueError(f"node list {node_list!r}")
    return match[1] + (match[2] or "") + (match[3] or "")


def _open_mpi(env: Mapping[str, str]) -> Place | None:
    if "OMPI_COMM_WORLD_SIZE" not in env:
        return None
    local, size = int(env["OMPI_COMM_WORLD_LOCAL_RANK"]), int(env["OMPI_COMM_WORLD_LOCAL_SIZE"])
    uri = env.get("OMPI_MCA_orte_hnp_uri", "")
    address = re.search(r"tcp://([^,:]+)", uri)
    count = int(env["OMPI_COMM_WORLD_SIZE"])
    if address:
        host = address[1]
    elif count == size:
        host = "127.0.0.1"
    else:
        raise ValueError("the host of process 0 is unknown (no OMPI_MCA_orte_hnp_uri)")
    job = int(uri.split(".")[0]) >> 12 if uri else os.getppid()
    return Place(
        f"{host}:{_FIRST_PORT + job % _NUM_PORTS}",
        count,
        int(env["OMPI_COMM_WORLD_RANK"]),
        _device_of(local, size, env),
        "Open MPI",
    )


def _device_of(local_id: int, local_count: int, env: Mapping[str, str]) -> tuple[int, ...] | None:
    # One process per node takes all its devices. With several, each takes the one of its number,
    # unless the launcher has left it nothing else to see already.
    visible = env.get("CUDA_VISIBLE_DEVICES", env.get("ROCR_VISIBLE_DEVICES"))
    if local_count <= 1 or (visible is not None and len(visible.split(",")) < local_count):
        return None
    return (local_id,)


def _gke_tpu(env: Mapping[str, str]) -> Place | None:
    hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES", "")
    if not hosts or "TPU_WORKER_ID" not in env:
        return None
    return _tpu(hosts.split(","), int(env["TPU_WORKER_ID"]), env, "GKE")


def _tpu(hosts: list[str], worker: int, env: Mapping[str, str], source: str) -> Place:
    slices, index = int(env.get("MEGASCALE_NUM_SLICES") or 1), 0
    if slices > 1:
        index = int(env["MEGASCALE_SLICE_ID"])
    first = env.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]
    return Place(
        f"{first.split(':')[0]}:{DEFAULT_PORT}",
        len(hosts) * slices,
        index * len(hosts) + worker,
        None,
        source,
    )


def _cloud_tpu_vm(env: Mapping[str, str]) -> Place | None:
    chips = any(pathlib.Path(p).exists() for p in ("/dev/accel0", "/dev/vfio/0"))
    told = "GCE_METADATA_IP" in env
    here = told or (chips and importlib.util.find_spec("libtpu") is not None)
    if env.get("TPU_SKIP_MDS_QUERY") or not here:
        return None
    endpoints, worker = (
        _metadata("worker-network-endpoints", env),
        _metadata("agent-worker-number", env),
    )
    if endpoints is None or worker is None:
        return None
    # Two formats: names, or name:id:address triples.
    hosts = [e.split(":")[-1] for e in endpoints.split(",")]
    slices = dict(
        line.replace("'", "").split(": ", 1)
        for line in (_metadata("tpu-env", env) or "").splitlines()
        if line.startswith("MEGASCALE_") and ": " in line
    )
    return _tpu(hosts, int(worker), {**slices, **env}, "Cloud TPU VM")


def _metadata(key: str, env: Mapping[str, str]) -> str | None:
    host = env.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/instance/attributes/{key}",
        headers={"Metadata-Flavor": "Google"},
    )
    # No proxy ever: the server is link-local.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=10) as answer:
            return answer.read().decode().strip()
    except (urllib.error.URLError, OSError):
        return None
