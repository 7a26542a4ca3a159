"""Who this process is, what is refused at the start, and the watchdog; with real processes."""

import http.server
import signal
import subprocess
import sys
import threading

import pytest
from conftest import tiny_config
from processes import start, write_config

from soup_jax.errors import UserError
from soup_jax.processes import place as cluster
from soup_jax.processes import start as distributed
from soup_jax.processes.place import Place, Settings, find_place

EXPLICIT = Settings("host:1234", 4, 2)
SLURM = {
    "SLURM_JOB_ID": "1000000",
    "SLURM_STEP_NODELIST": "gpu[007,009-12],other",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
GKE = {"TPU_WORKER_HOSTNAMES": "a-0.svc,a-1.svc", "TPU_WORKER_ID": "1"}
SLICES = {
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "b-0.svc:8080",
}


@pytest.mark.parametrize(
    ("env", "place"),
    [
        ({}, None),
        (SLURM, Place("gpu007:62016", 8, 5, (1,), "Slurm")),
        (
            SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x8)"},
            Place("gpu007:62016", 8, 5, None, "Slurm"),
        ),
        # The launcher shows each process one device: there is no device 1.
        (SLURM | {"CUDA_VISIBLE_DEVICES": "3"}, Place("gpu007:62016", 8, 5, None, "Slurm")),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, Place("gpu007:62016", 8, 5, (1,), "Slurm")),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        # The batch script itself, outside `srun`.
        ({k: v for k, v in SLURM.items() if "STEP" not in k}, None),
        (OPEN_MPI, Place("10.96.0.1:62624", 4, 3, (1,), "Open MPI")),
        (GKE, Place("a-0.svc:8476", 2, 1, None, "GKE")),
        (GKE | SLICES, Place("b-0.svc:8476", 4, 3, None, "GKE")),
        (GKE | {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
    ],
)
def test_launchers_are_recognised_only_with_more_than_one_process(env, place):
    assert find_place("auto", Settings(), env) == place
    assert find_place("off", Settings(), env) is None


@pytest.mark.parametrize(
    ("node_list", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[001-15],m", "n001"),
        ("a-b[3,5]", "a-b3"),
        ("r[1-2]-x", "r1-x"),
    ],
)
def test_first_host_of_a_slurm_node_list(node_list, first):
    assert cluster.first_host(node_list) == first


@pytest.mark.parametrize("endpoints", ["10.0.0.2,10.0.0.3", "w0:8470:10.0.0.2,w1:8470:10.0.0.3"])
def test_a_cloud_tpu_vm_is_asked_who_it_is(endpoints):
    answers = {
        "worker-network-endpoints": endpoints,
        "agent-worker-number": "1",
        "tpu-env": "TYPE: 'V5E'\nMEGASCALE_NUM_SLICES: '1'\n",
    }

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.headers["Metadata-Flavor"] == "Google"
            answer = answers[self.path.rsplit("/", 1)[1]].encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        env = {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}
        place = find_place("auto", Settings(), env)
        server.shutdown()
    assert place == Place("10.0.0.2:8476", 2, 1, None, "Cloud TPU VM")


def test_explicit_settings_win_and_flags_over_variables():
    assert find_place("auto", EXPLICIT, SLURM) == Place(
        "host:1234", 4, 2, None, "explicit settings"
    )
    env = {"SOUP_JAX_COORDINATOR": "other:1", "SOUP_JAX_NUM_PROCESSES": "9"}
    env |= {"SOUP_JAX_PROCESS_ID": "8", "SOUP_JAX_LOCAL_DEVICE_IDS": "0,2"}
    assert find_place("auto", Settings(), env) == Place(
        "other:1", 9, 8, (0, 2), "explicit settings"
    )
    assert find_place("auto", EXPLICIT, env).coordinator == "host:1234"
    job = {**env, "JOB_COMPLETION_INDEX": "3"}
    assert find_place("auto", Settings(), job).process_id == 8
    del job["SOUP_JAX_PROCESS_ID"]
    assert find_place("auto", Settings(), job).process_id == 3
    # One of them alone completes what the launcher says.
    place = find_place("on", Settings(coordinator="node:77"), SLURM)
    assert (place.coordinator, place.num_processes, place.process_id) == ("node:77", 8, 5)
    assert find_place("auto", Settings("h:1", 1, 0), {}) is None


@pytest.mark.parametrize(
    ("mode", "flags", "env", "message"),
    [
        ("on", Settings(), {}, "no launcher was recognised"),
        ("off", EXPLICIT, {}, "contradict each other"),
        ("auto", Settings(num_processes=2), {}, "--coordinator and --process_id not set"),
        ("auto", Settings("h:1", 2, 2), {}, "process_id = 2 and num_processes = 2 do not fit"),
        ("auto", Settings("h:1", 0, 0), {}, "num_processes = 0"),
        ("auto", Settings("h", 2, 1), {}, "--coordinator=h is not HOST:PORT"),
        ("auto", Settings("h:99999", 2, 1), {}, "is not HOST:PORT"),
        ("auto", Settings(), {"SOUP_JAX_PROCESS_ID": "one"}, "SOUP_JAX_PROCESS_ID = 'one'"),
        ("auto", Settings(local_device_ids=(7,)), {}, "this is the only one: leave it out"),
        ("auto", Settings("h:1", 1, 0), {"SOUP_JAX_LOCAL_DEVICE_IDS": "0"}, "the only one"),
        ("auto", EXPLICIT, {"SOUP_JAX_LOCAL_DEVICE_IDS": "a"}, "local device ids 'a'"),
        ("auto", Settings(), {**OPEN_MPI, "OMPI_COMM_WORLD_RANK": "x"}, "open_mpi.* is incomplete"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_starts(mode, flags, env, message):
    with pytest.raises(UserError, match=message):
        find_place(mode, flags, env)


@pytest.fixture(scope="module")
def cfg(tiny_corpus):
    return tiny_config(**{"corpus.dir": tiny_corpus, "distributed.init_timeout_secs": 60})


def test_a_missing_process_is_named_in_time(cfg, tmp_path):
    config = write_config(tmp_path, cfg)
    # Long enough for the two that come on a busy machine; the third never does.
    flags = ["--config.distributed.init_timeout_secs=12"]
    with start(config, tmp_path / "run", 3, *flags, only=(0, 2)) as processes:
        statuses, outputs = processes.join()
    assert statuses == [2, 2], outputs
    for output in outputs:
        assert "process 1 of 3 did not connect within 12 s" in output
        assert "connected: process 0 (" in output
    assert not (tmp_path / "run").exists()


def test_processes_with_different_configs_are_refused_with_the_field(cfg, tmp_path):
    config = write_config(tmp_path, cfg)
    text = config.read_text() + "\n\nold = get_config\n\n\ndef get_config():\n    cfg = old()\n"
    text += "    cfg.seed = int(os.environ['SOUP_JAX_PROCESS_ID'])\n    return cfg\n"
    config.write_text(text)
    with start(config, tmp_path / "run", 2) as processes:
        statuses, outputs = processes.join()
    assert statuses == [2, 2], outputs
    for output in outputs:
        assert "the processes do not agree (code and config)" in output
        assert "process 1 (" in output
        assert "config.seed = '1', process 0: '0'" in output
    assert not (tmp_path / "run").exists()


def test_a_platform_that_is_not_there_is_an_error_and_never_the_cpu(cfg, monkeypatch):
    cfg = cfg.copy_and_resolve_references()
    cfg.mesh.platform = "gpu"
    table = r"mesh.platform = 'gpu', but jax found 'cpu' [\s\S]*process 0: 8 x cpu"
    entered = []
    with pytest.raises(UserError, match=table), distributed.processes(cfg, None):
        entered.append(True)
    assert not entered


PROGRAM = """
import pathlib, sys, time
from soup_jax.processes import watchdog
from soup_jax.processes.group import Solo

group = Solo()
folder, allowance = pathlib.Path(sys.argv[1]), float(sys.argv[2])


def stuck_in_a_collective():
    time.sleep(allowance or 60)


with watchdog.watch(group, folder, limit=0.5, allowances={"saving": 60.0}):
    for step in range(20):
        assert group.enter(step)
        time.sleep(0.05)  # longer than the limit in all
    group.at("saving" if allowance else "training")
    stuck_in_a_collective()
print("done")
"""


@pytest.mark.parametrize("allowance", [0.0, 1.5])
def test_the_watchdog_ends_a_process_that_stands_still(allowance, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), str(allowance)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    stacks = tmp_path / "stacks_0.txt"
    if allowance:  # such a phase may take longer
        assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
        assert not stacks.exists()
        return
    assert done.returncode == 1
    assert "process 0 made no progress for " in done.stderr
    assert "in step 19, training (0.5 s allowed: distributed.step_timeout_secs)" in done.stderr
    for text in (done.stderr, stacks.read_text()):
        assert "in stuck_in_a_collective" in text


@pytest.mark.slow
def test_a_hang_of_one_process_ends_all_and_names_it(cfg, tmp_path):
    config, workdir = write_config(tmp_path, cfg), tmp_path / "run"
    flags = ["--config.distributed.step_timeout_secs=10"]
    with start(config, workdir, 2, *flags, process="1", what="hang", step=4) as processes:
        statuses, outputs = processes.join(240)
    assert statuses == [1, 1], outputs
    for i, output in enumerate(outputs):
        assert "made no progress for " in output, output
        assert "): step 4, reading data, for " in output, output  # where process 1 stands
        assert (workdir / f"stacks_{i}.txt").exists()
    assert "to_device" in (workdir / "stacks_1.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "statuses", "told"),
    [
        ({"process": "1", "what": "raise"}, [1, 1], "OSError: no space left on device"),
        (
            {"process": "0", "what": "SIGKILL"},
            [-signal.SIGKILL, 1],
            "process 0, the coordinator, is",
        ),
    ],
)
def test_what_happens_to_one_ends_the_other(trouble, statuses, told, cfg, tmp_path):
    config = write_config(tmp_path, cfg)
    with start(config, tmp_path / "run", 2, step=4, **trouble) as processes:
        found, outputs = processes.join(240)
    assert found == statuses, outputs
    assert told in outputs[1 if trouble["process"] == "0" else 0]
