"""The collector on small fake trees: the held-out rule, the guards, determinism."""

import hashlib
import importlib.util
import json
import pathlib
import sys
import textwrap

import pytest

from soup_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]


def _load():
    spec = importlib.util.spec_from_file_location("collect_text", ROOT / "launch/collect_text.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["collect_text"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


collect_text = _load()


def words(seed: str, num_lines: int = 12) -> str:
    """Text that depends on `seed` alone, in lines longer than 40 characters."""
    digests = [hashlib.sha256(f"{seed} {i}".encode()).hexdigest() for i in range(num_lines)]
    table = str.maketrans("0123456789", "ghijklmnop")
    return "\n".join(" ".join([d[:7], d[7:19], d[19:33], d[33:]]).translate(table) for d in digests)


@pytest.fixture
def tree(tmp_path):
    """Two fake packages with files of several kinds, specialist and generic."""
    texts = {
        "pyarrow/include/parquet/a.h": words("parquet a"),
        "pyarrow/include/parquet/b.h": words("parquet b"),
        "pyarrow/include/arrow/a.h": words("arrow a"),
        "pyarrow/include/arrow/copy.h": words("parquet a"),
        "pyarrow/include/arrow/late_copy.h": words("own start", 12) + "\n" + words("parquet b"),
        "pyarrow/include/arrow/holds_copy.h": words("long", 200) + "\n" + words("parquet b"),
        "pyarrow/include/arrow/wrapped_copy.h": words("other start", 3)
        + words("parquet b").replace(" ", "\n"),
        "pyarrow/_vendor/x.py": words("vendored"),
        "optax/sgd.py": words("optax"),
        "jax/core.py": words("core", 800),
        "jax/again.py": words("core", 800),
        "jax/short.py": "x = 1\n",
        "jax/table.csv": "1,2,3\n" * 200,
        "jax/tests/core_test.py": words("test"),
        "jax-1.0.dist-info/RECORD": words("record"),
        "jax-1.0.dist-info/licenses/LICENSE": words("licence"),
    }
    for name, text in texts.items():
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (tmp_path / "tree/jax/latin.py").write_bytes(words("latin").encode() + b"\xe9")
    return tmp_path / "tree"


def collected(tree: pathlib.Path, **options):
    sources = collect_text.folder_sources(str(tree), "")
    options = {"max_bytes": 1e6, "min_specialist_bytes": 100, **options}
    return collect_text.collect(sources, **options)


def test_specialists_share_nothing_with_generic(tree):
    generic, specialists, skipped = collected(tree)
    sources = {kind: [d.source for d in documents] for kind, documents in generic.items()}
    held_out = {name: [d.source for d in documents] for name, documents in specialists.items()}
    assert sources["c_family"] == ["pyarrow/include/arrow/a.h"]
    assert sources["tests"] == ["jax/tests/core_test.py"]
    assert set(sources["packages"]) == {"jax/again.py"}  # jax/core.py has the same text
    assert held_out["parquet_headers"] == [f"pyarrow/include/parquet/{x}.h" for x in "ab"]
    assert held_out["optax_code"] == ["optax/sgd.py"]
    assert held_out["licences"] == ["jax-1.0.dist-info/licenses/LICENSE"]
    assert set(sources) == {"c_family", "tests", "packages"}
    assert skipped["near-copies of specialist documents"] == 4
    assert skipped["files not in UTF-8"] == 1
    texts = [d.text for documents in generic.values() for d in documents]
    held_out_lines = {x for ds in specialists.values() for d in ds for x in d.text.split("\n")}
    assert not held_out_lines & {x for text in texts for x in text.split("\n")}


def test_documents_have_200_to_20000_characters_and_lose_nothing(tree):
    generic, _, _ = collected(tree)
    documents = generic["packages"]
    assert len(documents) > 1
    assert all(200 <= len(d.text) <= 20_000 for d in documents)
    assert "\n".join(d.text for d in documents) == words("core", 800)


def test_the_result_depends_on_the_files_alone(tree):
    first, second = (collected(tree)[:2] for _ in range(2))
    assert first == second
    reverse = list(collect_text.folder_sources(str(tree), ""))[::-1]
    third = collect_text.collect(reverse, max_bytes=1e6, min_specialist_bytes=100)[:2]
    assert first == third


def test_a_small_specialist_set_is_left_out_and_stays_out_of_generic(tree, capsys):
    generic, specialists, _ = collected(tree, min_specialist_bytes=900)
    assert "parquet_headers" in specialists
    assert "optax_code" not in specialists
    assert "optax_code is left out" in capsys.readouterr().out
    assert not any(d.source.startswith("optax") for ds in generic.values() for d in ds)


def test_kinds():
    kinds = {
        "numpy/lib/x.py": "packages",
        "python/json/decoder.py": "stdlib",
        "python/test/test_json.py": "tests",
        "jax/experimental/x_test.py": "tests",
        "google/x_pb2.py": "",
        "pip/_vendor/rich/text.py": "",
        "numpy/x.so": "",
        "doc/git/README": "system_docs",
        "doc/git/changelog.gz": "",
        "doc/git/copyright": "",
        "scipy/special/_basic.py": "",
        "python/_sysconfigdata__linux.py": "",
        "torch.dist-info/METADATA": "prose",
    }
    assert {label: collect_text.kind_of(label) for label in kinds} == kinds


def test_specialist_rules_do_not_depend_on_spelling():
    names = [f"{x}.dist-info/METADATA" for x in ("scikit_learn", "scikit-learn", "Scikit.Learn")]
    assert len({collect_text.specialist_of(x) for x in names}) == 1
    assert collect_text.specialist_of("numpy/__init__.pyi") == "numpy_stubs"
    assert collect_text.specialist_of("scipy/stats/_stats.py") == ""
    assert collect_text.specialist_of("jax.dist-info/RECORD") == ""


def test_long_docstrings_are_cut_out_of_the_code():
    long = "First line.\n\n" + textwrap.indent("word " * 100, "    ").rstrip()
    rest = f'    return """{long}"""\n\ndef g():\n    """Short."""\n'
    source = f'def f():\n    r"""{long}\n    """\n{rest}'
    code, docstrings = collect_text.split_docstrings(source)
    assert code == f'def f():\n    """First line."""\n{rest}'
    assert docstrings == ["First line.\n\n" + ("word " * 100).rstrip()]
    assert collect_text.split_docstrings('# """\n' + source) == ('# """\n' + source, [])


@pytest.mark.parametrize(
    "header",
    ["# Copyright 2024 X\n#\n# Licensed\n\n", "// Licensed to Y\n", "/*\n * Copyright\n */\n"],
)
def test_licence_headers_are_stripped(header):
    assert collect_text.strip_licence_header(header + "code = 1\n").strip() == "code = 1"
    assert collect_text.strip_licence_header("# About x\ncode = 1\n") == "# About x\ncode = 1\n"


def test_fair_shares():
    shares = collect_text.fair_shares({"a": 1, "b": 100, "c": 100}, 31, {"b": 2.0})
    assert shares == {"a": 1, "b": 20, "c": 10}
    assert collect_text.fair_shares({"a": 1, "b": 2}, 10, {}) == {"a": 1, "b": 2}


def test_run_writes_once_and_refuses_what_is_not_its_own(tree, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        collect_text, "find_sources", lambda: list(collect_text.folder_sources(str(tree), ""))
    )
    out = tmp_path / "out"
    with pytest.raises(UserError, match="too little text"):
        collect_text.run(out, 40.0)
    monkeypatch.setattr(collect_text, "MIN_GENERIC_BYTES", 100)
    monkeypatch.setattr(collect_text, "MIN_SPECIALISTS", 0)
    collect_text.run(out, 40.0)
    lines = (out / "generic" / "c_family.jsonl").read_text("utf-8").splitlines()
    assert [sorted(json.loads(x)) for x in lines] == [["source", "text"]]
    before = (out / "manifest.json").read_bytes()
    collect_text.run(out, 40.0)
    assert "is complete" in capsys.readouterr().out
    assert (out / "manifest.json").read_bytes() == before
    with pytest.raises(UserError, match="--max-mb"):
        collect_text.run(out, 20.0)
    with pytest.raises(UserError, match="other files"):
        collect_text.run(tree, 40.0)
