"""The README's Python runs as it stands there, and the commands it names exist."""

import pathlib
import re

from soup_jax.cli import main

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run():
    blocks = re.findall(r"^```python\n(.*?)^```$", README, re.M | re.S)
    assert blocks
    for block in blocks:
        namespace = {}
        exec(compile(block, "README.md", "exec"), namespace)
        assert namespace["theta"].keys() == namespace["params"]["shared"].keys()


def test_named_commands_and_files_exist():
    for command in re.findall(r"`soup-jax (\w+)", README):
        assert command in main.SUBCOMMANDS, command
    for path in re.findall(r"\]\((?!http)([\w/.]+)\)", README):
        assert (ROOT / path).exists(), path
    for script in re.findall(r"bash (launch/\S+\.sh)", README):
        assert (ROOT / script).exists(), script
