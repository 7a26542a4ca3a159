"""The Python of README and docs runs as it stands there, and what they name exists.

docs/python.md needs runs: tests/public_face_test.py has them.
"""

import contextlib
import os
import pathlib
import re

import pytest

from soup_jax.cli import main

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}


def blocks(text):
    return re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)


def anchors(text):
    """What GitHub makes of headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize(
    "page", [name for name, text in TEXTS.items() if blocks(text) and name != "docs/python.md"]
)
def test_python_blocks_run(page, tmp_path):
    namespace = {}
    with contextlib.chdir(tmp_path):
        for block in blocks(TEXTS[page]):
            exec(compile(block, page, "exec"), namespace)
    if page == "docs/models.md":
        assert namespace["theta"].keys() == namespace["params"]["shared"].keys()


@pytest.mark.parametrize("page", TEXTS)
def test_named_commands_and_files_exist(page):
    text, folder = TEXTS[page], os.path.dirname(ROOT / page)
    for command in re.findall(r"(?:`|^    )soup-jax (\w+)", text, re.M):
        assert command in main.SUBCOMMANDS, command
    for path, anchor in re.findall(r"\]\((?!http)([\w/.-]*)(?:#([\w-]+))?\)", text):
        target = pathlib.Path(folder, path) if path else ROOT / page
        assert target.exists(), path
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), anchor
    for script in re.findall(r"\b((?:launch|benchmarks|experiments|tests)/\w+\.\w+)", text):
        assert (ROOT / script).exists(), script


def test_readme_links_all_pages():
    for page in TEXTS.keys() - {"README.md"}:
        assert f"]({page}" in TEXTS["README.md"], page
