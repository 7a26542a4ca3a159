"""The entry point: `soup-jax SUBCOMMAND ...`, also `python -m soup_jax.cli SUBCOMMAND ...`."""

import os
import sys
import threading


def main() -> None:
    """Run the command; an interrupt while it is still being imported is one line, too."""
    try:
        from soup_jax.cli.main import run

        status = run(sys.argv[1:])
    except KeyboardInterrupt:
        print("soup-jax: error: interrupted", file=sys.stderr)
        status = 130
    if status and _is_saving():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _is_saving() -> bool:
    # What is left of a save that failed, and was told: parts of it go on trying to reach a bucket
    # for a quarter of an hour, and the interpreter would wait for them.
    return any(
        not t.daemon and type(t).__module__.startswith("orbax.") for t in threading.enumerate()
    )


if __name__ == "__main__":
    main()
