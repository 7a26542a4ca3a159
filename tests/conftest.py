"""What holds for every test: 8 simulated CPU devices, compiled code kept between runs.

pytest                 all but the slow tests
pytest --run-slow      all tests
"""

import hashlib
import os
import pathlib
import platform
import re
import sys

import pytest

NUM_DEVICES = 8


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
    if "jax" in sys.modules:
        raise RuntimeError("jax was imported before tests/conftest.py could set the device count")
    flag = "--xla_force_host_platform_device_count"
    kept = [f for f in os.environ.get("XLA_FLAGS", "").split() if not f.startswith(flag)]
    os.environ["XLA_FLAGS"] = " ".join([*kept, f"{flag}={NUM_DEVICES}"])
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["MPLBACKEND"] = "agg"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_compilation_cache()))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


_set_environment()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
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
