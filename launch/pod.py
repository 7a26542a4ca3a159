"""Train in a container: one process of a Kubernetes JobSet. See launch/gke_jobset_*.yaml.

    python launch/pod.py CONFIG WORKDIR [--config.section.field=value ...]

Exit status: 75 if the run was told to stop and has steps left, else that of `soup-jax train`. The
difference matters because Kubernetes counts a pod that ends with 0 as done for ever, even when it
ended because it was evicted. DRY_RUN=1 prints the command and runs nothing.
"""

import os
import shlex
import signal
import subprocess
import sys

from finished import is_finished

SAVED_NOT_FINISHED = 75  # EX_TEMPFAIL: try again later


def main(arguments: list[str]) -> int:
    """Run, pass signals on, and give the exit status its meaning for a restart policy."""
    if len(arguments) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    config, workdir, *flags = arguments
    command = ["soup-jax", "train", f"--config={config}", f"--workdir={workdir}", *flags]
    print("+", shlex.join(command), flush=True)
    if os.environ.get("DRY_RUN"):
        return 0
    started: list[subprocess.Popen] = []

    def pass_on(number: int, _: object) -> None:
        if not started:
            sys.exit(SAVED_NOT_FINISHED)
        started[0].send_signal(number)

    # Before the start: the first process of a container is deaf to signals that it has no handler
    # for, and the kubelet sends them to no other.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    started.append(subprocess.Popen(command))
    status = started[0].wait()
    if status < 0:
        status = 128 - status
    if status == 0 and not is_finished(workdir):
        return SAVED_NOT_FINISHED
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
