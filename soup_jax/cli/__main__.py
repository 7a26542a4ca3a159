"""The entry point: `soup-jax SUBCOMMAND ...`, also `python -m soup_jax.cli SUBCOMMAND ...`."""

import sys


def main() -> None:
    """Run the command; an interrupt while it is still being imported is one line, too."""
    try:
        from soup_jax.cli.main import run

        status = run(sys.argv[1:])
    except KeyboardInterrupt:
        print("soup-jax: error: interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


if __name__ == "__main__":
    main()
