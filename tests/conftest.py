"""What holds for every test: 8 simulated CPU devices, compiled code kept between runs.

pytest                 all but the slow tests
pytest --fast          only the files of FAST
pytest --run-slow      all tests
"""

import hashlib
import json
import os
import pathlib
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

NUM_DEVICES = 8
# Updates, merges, the plan of batches, checkpoints and configs: what a change breaks most often,
# and where other releases of jax, optax and orbax differ.
FAST = (
    "checkpoint_test.py",
    "config_test.py",
    "meta_distribution_test.py",
    "import_order_test.py",
    "merge_test.py",
    "apply_test.py",
    "router_test.py",
    "sampling_test.py",
    "tree_test.py",
)
# What takes longest starts first, so that no process works alone at the end.
LONGEST = (
    "loop_test.py",
    "topology_test.py",
    "contract_test.py",
    "launch_test.py",
    "low_rank_test.py",
    "step_test.py",
    "stages_test.py",
    "plan_test.py",
    "place_test.py",
    "checkpoint_test.py",
)


def _compilation_cache() -> pathlib.Path:
    # Compiled code fits one CPU and one jaxlib only, and a checkout may be on a shared disk.
    from jaxlib import version

    try:
        cpu = re.search(
            r"^(flags|Features)\s*:.*$", pathlib.Path("/proc/cpuinfo").read_text(), re.M
        )
    except OSError:
        cpu = None
    machine = platform.machine() + platform.processor() + (cpu[0] if cpu else platform.node())
    name = f"xla-{version.__version__}-{hashlib.sha256(machine.encode()).hexdigest()[:12]}"
    return pathlib.Path(__file__).parents[1] / ".pytest_cache" / name


def _set_environment() -> None:
    # Before jax is imported, and in the environment, so that subprocesses of tests have it too.
    from jaxlib import version

    if "jax" in sys.modules:
        raise RuntimeError("jax was imported before tests/conftest.py could set the device count")
    # Tests compile much and compute little: without LLVM's optimisations a step compiles in half
    # the time. What it moves and keeps is decided before.
    flags = {
        "--xla_force_host_platform_device_count": str(NUM_DEVICES),
        "--xla_backend_optimization_level": "0",
    }
    if version.__version_info__[:2] == (0, 10):  # later ones have no such flag, and abort at it
        flags["--xla_cpu_use_fusion_emitters"] = "false"  # a third of the compile time
    kept = [f for f in os.environ.get("XLA_FLAGS", "").split() if f.partition("=")[0] not in flags]
    os.environ["XLA_FLAGS"] = " ".join([*kept, *("=".join(flag) for flag in flags.items())])
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["MPLBACKEND"] = "agg"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_compilation_cache()))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


_set_environment()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="only the files of FAST in conftest.py")
    parser.addoption("--run-slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden")


def pytest_ignore_collect(collection_path: pathlib.Path, config: pytest.Config) -> bool | None:
    name = collection_path.name
    if config.getoption("--fast") and name.endswith("_test.py") and name not in FAST:
        return True
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    rank = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))
    if config.getoption("--run-slow"):
        return
    skip = pytest.mark.skip(reason="slow; run it with --run-slow or `bash launch/test.sh --all`")
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def _devices() -> None:
    import jax

    assert jax.device_count() == NUM_DEVICES
    assert jax.default_backend() == "cpu"


TOPICS = {
    "cooking": "butter flour oven bake sugar dough simmer garlic onion pepper roast whisk",
    "sailing": "wind harbour keel tack mast anchor tide rudder sail hull compass storm",
    "algebra": "ring ideal module kernel group lemma proof morphism field basis tensor rank",
    "python": "def return import class self yield lambda tuple assert except raise print",
}


def topic_text(topic: str, seed: int, *, num_words: int = 120) -> str:
    """A document whose words are mostly of one topic: separable, and never the same twice."""
    import numpy as np

    rng = np.random.default_rng([seed, len(topic), ord(topic[0])])
    words = [*TOPICS[topic].split(), "the", "a", "of", "and", "to"]
    return " ".join(rng.choice(words, num_words)) + f" ({topic} {seed})."


def tiny_config(**fields):
    """A config whose runs take seconds: 6 domains, 4 experts, a base network of about 30,000."""
    from soup_jax.experiments import base

    cfg = base.get_config()
    cfg.update_from_flattened_dict(
        {
            "name": "tiny",
            "num_domains": 6,
            "num_experts": 4,
            "num_mixtures": 2,
            "vocab_size": 400,
            "seq_len": 32,
            "batch_size": 16,
            "num_steps": 12,
            "corpus.num_workers": 1,
            "corpus.validation_fraction": 0.1,
            "embed.dim": 8,
            "model.dim": 32,
            "model.hidden_dim": 48,
            "model.num_heads": 2,
            "model.num_kv_heads": 2,
            "domain_weights.support_size": 2,
            "domain_weights.min_support_size": 1,
            "experts.init_scale": 0.1,
            "optimizer.warmup_steps": 2,
            "checkpoint.every_steps": 5,
            "log.every_steps": 4,
            "log.trackers": (),
            "evaluate.max_windows": 8,
            "evaluate.batch_size": 8,
        }
        | fields
    )
    return cfg


def made_once(factory: pytest.TempPathFactory, name: str, make) -> pathlib.Path:
    """The folder that `make(folder)` fills, for all processes of the test run; to be read only."""
    import filelock

    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    with filelock.FileLock(root / f"{name}.lock"):
        if not (root / f"{name}.made").exists():
            make(root / name)
            (root / f"{name}.made").touch()
    return root / name


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """generic.jsonl with 160 documents of four topics, and one file of 30 for two of them."""

    def make(folder: pathlib.Path) -> None:
        folder.mkdir()
        sets = {"generic": [(t, i) for i in range(40) for t in TOPICS]}
        sets |= {t: [(t, 1000 + i) for i in range(30)] for t in ("cooking", "python")}
        for name, documents in sets.items():
            lines = [json.dumps({"text": topic_text(t, i)}) + "\n" for t, i in documents]
            (folder / f"{name}.jsonl").write_text("".join(lines))

    return made_once(tmp_path_factory, "tiny_text", make)


@pytest.fixture(scope="session")
def tiny_corpus(tiny_text: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a prepared corpus that fits `tiny_config`."""
    from soup_jax.data.prepare.stages import prepare

    def make(folder: pathlib.Path) -> None:
        sources = (str(tiny_text / "generic.jsonl"),)
        prepare(tiny_config(**{"corpus.dir": str(folder), "corpus.sources": sources}))

    return str(made_once(tmp_path_factory, "tiny_corpus", make))


@pytest.fixture(scope="session")
def tiny_run(
    tiny_text: pathlib.Path, tiny_corpus: str, tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
    """The folder of a trained soup, evaluated twice on the way; to be read, not written."""
    from soup_jax.training import loop as train

    fields = {
        "corpus.dir": tiny_corpus,
        "evaluate.every_steps": 8,
        "evaluate.specialists": (str(tiny_text / "cooking.jsonl"), str(tiny_text / "python.jsonl")),
    }
    return made_once(
        tmp_path_factory, "soup", lambda folder: train.train(tiny_config(**fields), folder)
    )


@pytest.fixture(scope="module")
def trained(tiny_run: pathlib.Path) -> Any:
    """`tiny_run`, opened."""
    from soup_jax.specialists.open import load

    return load(tiny_run)


@pytest.fixture(scope="module")
def texts(tiny_text: pathlib.Path) -> list[str]:
    """The documents of one of its specialists."""
    lines = (tiny_text / "cooking.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


@pytest.fixture(scope="session")
def generic_run(tiny_corpus: str, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder of a trained generic model (no experts), never evaluated; to be read only."""
    from soup_jax.training import loop as train

    fields = {
        "name": "generic",
        "corpus.dir": tiny_corpus,
        "num_experts": 0,
        "num_mixtures": 1,
        "domain_weights.sparse": 0.0,
        "domain_weights.generic": 1.0,
    }
    return made_once(
        tmp_path_factory, "generic", lambda folder: train.train(tiny_config(**fields), folder)
    )


@pytest.fixture(scope="module")
def address(tiny_run: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a server process of `tiny_run` answers."""
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [sys.executable, "-m", "soup_jax.cli", "serve", f"--run={tiny_run}", "--port=0"]
    with log.open("w") as f:
        server = subprocess.Popen(command, stdout=f, stderr=f)
    try:
        for _ in range(600):
            found = [x for x in log.read_text().splitlines() if x.startswith("serving on ")]
            if found:
                break
            time.sleep(0.2)
        yield found[0].split()[2]
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)


@pytest.fixture
def browser(tmp_path: pathlib.Path) -> Iterator:
    """Chromium without a window; downloads go to `tmp_path`, and its log has all requests."""
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    service = webdriver.ChromeService(shutil.which("chromedriver"), env=os.environ)
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()
