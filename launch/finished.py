"""Exit with 0 if the run in WORKDIR has done all its steps, with 1 if it has not.

    python launch/finished.py WORKDIR

A run that was told to stop saves and ends with status 0, like one that is through; only this
difference tells a launcher whether to start it again. Needs nothing but Python 3.
"""

import json
import pathlib
import sys


def is_finished(workdir: str) -> bool:
    """Whether the checkpoint of the last step of the run's own config is there."""
    run = pathlib.Path(workdir)
    try:
        last = json.loads((run / "config.json").read_text("utf-8"))["num_steps"]
    except FileNotFoundError:  # stopped before it began
        return False
    return (run / "checkpoints" / str(last)).is_dir()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python launch/finished.py WORKDIR")
    sys.exit(0 if is_finished(sys.argv[1]) else 1)
