"""Instantiates from a bank that is larger than the memory the process may have.

    python benchmarks/memory.py --config=experiments/quickstart.py --experts=200 --limit_mb=450 \\
        --documents=FILE

Makes a run of that config with a base network of 5.6M parameters and so many experts, at its
initial state; packs it into a soup folder; and instantiates from both, each in a process whose
memory a control group limits, in MiB (Linux, root; the kernel kills what takes more, and the exit
status is 1). The files are read once before, from the disk, for its speed. Printed are MB of the
bank, the limit, the peak of resident memory (code of libraries, which others share, is in it and
not in the limit), and seconds, beside those of reading the files alone.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import jax

from soup_jax import tree
from soup_jax.specialists.open import load
from soup_jax.specialists.pack import pack
from soup_jax.training import setup
from soup_jax.training.checkpoint import Checkpointer

LARGE = {
    "model.dim": 256,
    "model.num_layers": 6,
    "model.hidden_dim": 768,
    "model.num_heads": 4,
    "model.num_kv_heads": 4,
    "experts.init_scale": 0.1,  # zeros would be compressed to nothing
    "num_mixtures": 1,
    "batch_size": 1,
    "evaluate.specialists": (),
}
# Without these glibc keeps the memory of freed blocks of experts, in an arena for each thread.
HEAP = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "1048576"}
GROUP = pathlib.Path("/sys/fs/cgroup/memory/soup_jax_benchmark")
RUN = """
import resource, sys
from soup_jax.cli import main
status = main.run(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(status)
"""


def make_run(cfg, workdir: pathlib.Path) -> None:
    """A run's folder with the checkpoint of its initial state."""
    run = setup.setup(cfg, workdir)
    setup.claim_workdir(run)
    with Checkpointer(workdir / "checkpoints", cfg) as checkpointer:
        state = setup.restore_or_init(run, checkpointer)
        checkpointer.save(state, run.data_state(1))
    run.lock.close()


def from_disk(folder: pathlib.Path) -> tuple[int, float]:
    """(bytes, seconds) of reading all files, none of which is in memory."""
    paths = [p for p in folder.rglob("*") if p.is_file()]
    for path in paths:
        with open(path, "rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    begin, size = time.monotonic(), 0
    for path in paths:
        with open(path, "rb") as f:
            while piece := f.read(64 << 20):
                size += len(piece)
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return size, time.monotonic() - begin


def limited(arguments: list[str], limit: int) -> tuple[int, float, int]:
    """(status, seconds, peak in kB) of a command that may have so many bytes of memory."""
    GROUP.mkdir(exist_ok=True)
    (GROUP / "memory.limit_in_bytes").write_text(str(limit))

    def enter() -> None:
        (GROUP / "cgroup.procs").write_text(str(os.getpid()))

    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments],
        preexec_fn=enter,
        env=os.environ | HEAP,
        capture_output=True,
        text=True,
    )
    seconds = time.monotonic() - begin
    peak = [int(x.split()[1]) for x in done.stdout.splitlines() if x.startswith("peak ")]
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-2000:])
    return done.returncode, seconds, peak[-1] if peak else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--documents", required=True)
    parser.add_argument("--experts", type=int, default=200)
    parser.add_argument("--limit_mb", type=int, default=450)
    parser.add_argument("--folder", type=pathlib.Path, help="kept; default: a temporary one")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or pathlib.Path(temporary)
        run, soup = folder / "run", folder / "soup"
        if not (run / "config.json").exists():
            if os.fork() == 0:  # what it takes to make them does not count
                namespace: dict = {}
                exec(pathlib.Path(given.config).read_text(), namespace)
                cfg = namespace["get_config"]()
                cfg.update_from_flattened_dict(LARGE | {"num_experts": given.experts})
                make_run(cfg, run)
                os._exit(0)
            os.wait()
        if not (soup / "soup.json").exists():
            pack(run, soup)
        opened = load(soup)
        shapes = opened.arrays.shapes
        bank = tree.num_bytes([s for name, s in shapes.items() if name.startswith("bank/")])
        failed = False
        num, limit = opened.num_experts, given.limit_mb
        print(f"{num} experts, bank {bank / 1e6:,.0f} MB, limit {limit} MiB")
        for name, source, data in (("soup folder", soup, soup), ("run", run, run / "checkpoints")):
            size, alone = from_disk(data)
            out = folder / "specialist"
            arguments = ["instantiate", f"--run={source}", f"--documents={given.documents}"]
            status, seconds, peak = limited([*arguments, f"--out={out}"], given.limit_mb << 20)
            print(
                f"{name}: status {status}, peak {peak / 1e3:,.0f} MB, {seconds:.1f} s; the disk "
                f"alone {alone:.1f} s for {size / 1e6:,.0f} MB",
                flush=True,
            )
            failed |= status != 0
    return int(failed)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main())
