"""`prepare` from end to end: what goes in comes out, once, whatever happens on the way."""

import collections
import fcntl
import gzip
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.numpy
import tensorflow_datasets as tfds
import zstandard
from ml_collections import ConfigDict

from soup_jax import inputs, storage
from soup_jax.data import domains, tokenizer, windows
from soup_jax.data import sources as corpus
from soup_jax.data.corpus import Corpus, artefacts_of, fingerprint_of, open_corpus
from soup_jax.data.damage import DAMAGE
from soup_jax.data.embed.tfidf_svd import TfidfSvd
from soup_jax.data.prepare import describe, shards
from soup_jax.data.prepare import stages as prepare
from soup_jax.data.readers import text_hash
from soup_jax.errors import UserError
from soup_jax.experiments import base

TOPICS = [
    "kernel module device driver interrupt memory scheduler thread",
    "flour butter sugar oven dough yeast recipe bake",
    "goal match striker league penalty referee season coach",
    "schöne grüße straße über müde käse größe löffel",
]


def make_texts(num: int) -> list[str]:
    rng = random.Random(0)
    return [
        f"{i}: " + " ".join(rng.choices(TOPICS[i % 4].split(), k=rng.randint(1, 40)))
        for i in range(num)
    ]


TEXTS = make_texts(120)


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()


def write_sources(folder: pathlib.Path) -> None:
    """TEXTS in order over four kinds of file; 20 duplicates and 5 damaged records among them."""
    folder.mkdir()
    first = json_lines(TEXTS[:30]) + b'{"text": "cut\n' + json_lines([*TEXTS[30:50], *TEXTS[10:20]])
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(first + b"[]\n"))
    second = b"{}\n" + json_lines([*TEXTS[40:90], " "])
    (folder / "b.jsonl.zst").write_bytes(zstandard.compress(second))
    table = pyarrow.table({"text": [*TEXTS[90:100], None, *TEXTS[100:118]]})
    pyarrow.parquet.write_table(table, folder / "c.parquet")
    (folder / "d").mkdir()
    for i, text in enumerate(TEXTS[118:]):
        (folder / "d" / f"{i}.md").write_bytes(text.encode())


def config(sources: pathlib.Path | tuple, path: pathlib.Path, **changes) -> ConfigDict:
    cfg = base.get_config()
    cfg.corpus.sources = sources if isinstance(sources, tuple) else (str(sources),)
    cfg.corpus.dir = str(path)
    cfg.corpus.num_workers = 1
    cfg.corpus.validation_fraction = 0.2
    cfg.num_domains, cfg.vocab_size, cfg.seq_len = 4, 300, 16
    cfg.embed.dim, cfg.embed.max_features, cfg.tokenizer.train_bytes = 8, 500, 8000
    for name, value in changes.items():
        cfg.update_from_flattened_dict({name.replace("__", "."): value})
    return cfg


def content(folder: pathlib.Path) -> dict[str, bytes]:
    """All files but the one that says how long it took."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != "timings.json"
    }


def documents_of(prepared: Corpus, split: str) -> list[list[str]]:
    """Texts of each domain in order, rebuilt from the windows."""
    result, tokens = [], prepared.tokenizer()
    offsets, pad = prepared.offsets[split], prepared.pad[split]
    for k in range(prepared.num_domains):
        rows = prepared.read_windows(split, np.arange(offsets[k], offsets[k + 1]))
        stream = rows[:, 1:].ravel()[: rows[:, 1:].size - pad[k]]
        texts, text = [], []
        for token in stream:
            if token == prepared.eos_id:
                texts.append(tokens.decode(text))
                text = []
            else:
                text.append(token)
        assert not text  # every document ends with EOS
        result.append(texts)
    return result


def texts_of(prepared: Corpus, split: str) -> list[str]:
    return list(itertools.chain(*documents_of(prepared, split)))


@pytest.fixture(scope="module", autouse=True)
def small_pieces():
    """Several shards and several window files, from little text."""
    patch = pytest.MonkeyPatch()
    patch.setattr(shards, "SHARD_DOCUMENTS", 25)
    patch.setattr(windows, "FILE_BYTES", 5000)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("sources") / "text"
    write_sources(path)
    return path


@pytest.fixture(scope="module")
def prepared(sources, tmp_path_factory) -> Corpus:
    """The corpus prepared without any incident."""
    return prepare.prepare(config(sources, tmp_path_factory.mktemp("plain") / "corpus"))


def test_every_document_comes_out_once_in_its_split_and_domain(prepared):
    expected = collections.defaultdict(list)
    for text in TEXTS:
        expected[corpus.split_of(text_hash(text), 0.2, 0)].append(text)
    assert set(prepared.offsets) == {"train", "validation"}
    for split in prepared.offsets:
        found = documents_of(prepared, split)
        assert sorted(itertools.chain(*found)) == sorted(expected[split])
        for k, texts in enumerate(found):
            assert [t for t in expected[split] if t in set(texts)] == texts  # corpus order
            if texts:
                rows = prepared.embedder().embed(texts)
                assert set(domains.assign(rows, prepared.centroids())[0]) == {k}
    assert all(texts for texts in documents_of(prepared, "train"))


def test_the_manifest_and_the_domains_count_what_is_there(prepared):
    counts = prepared.manifest["counts"]
    assert counts["documents"] == 140
    assert counts["duplicates"] == 20
    assert counts["damaged"] == 5
    assert counts["too_short"] == counts["cut"] == 0
    for split in prepared.offsets:
        texts = texts_of(prepared, split)
        tokens = sum(len(ids) + 1 for ids in prepared.tokenizer().encode_batch(texts))
        assert counts["splits"][split] == {
            "documents": len(texts),
            "bytes": sum(len(t.encode()) for t in texts),
            "tokens": tokens,
            "windows": prepared.offsets[split][-1],
        }
        for k, entry in enumerate(prepared.domains):
            assert entry["domain"] == k
            assert entry["documents"][split] == len(documents_of(prepared, split)[k])
            assert entry["windows"][split] == np.diff(prepared.offsets[split])[k]
        assert sum(entry["tokens"][split] for entry in prepared.domains) == tokens
    labels = " ".join(prepared.label(k) for k in range(4)).split()
    assert len(labels) == 12
    assert set(labels) < set(" ".join(TOPICS).split())
    quantiles = list(prepared.similarity_quantiles().values())
    assert quantiles == sorted(quantiles)
    assert 0 < quantiles[0] <= 1
    prepared.verify()


def test_documents_without_a_known_word_are_counted_and_told(sources, prepared, tmp_path, capsys):
    assert prepared.manifest["counts"]["unknown"] == 0
    assert prepared.unknown() == ""
    odd = tmp_path / "odd.jsonl"
    odd.write_bytes(json_lines(["\U0001f35e" * n for n in range(3, 15)]))
    both = (str(sources), str(odd))
    made = prepare.prepare(config(both, tmp_path / "corpus"))
    shown = capsys.readouterr()
    assert made.manifest["counts"]["unknown"] == 12
    total = sum(made.domains[0]["documents"].values())
    said = f"12 documents (9.1%) have no word that the embedder knows: they are {12 / total:.0%} of"
    assert f"  {said}" in shown.out
    assert f"warning: {said}" in shown.err
    assert made.unknown(least=12 / total) == ""
    # A corpus of an earlier version does not say, and is the same corpus.
    manifest = {name: x for name, x in made.manifest.items() if name != "seal"}
    del manifest["counts"]["unknown"]
    storage.write_json(made.path / "manifest.json", storage.sealed(manifest))
    again = prepare.prepare(config(both, tmp_path / "corpus"))
    assert "already prepared" in capsys.readouterr().err
    assert (again.unknown(), again.fingerprint) == ("", made.fingerprint)


def test_the_folder_is_a_tfds_data_set_and_nothing_else_is_left(prepared):
    names = {p.name for p in prepared.path.iterdir()}
    assert names == {
        "windows", "offsets.safetensors", "domains.json", "centroids.safetensors", "manifest.json",
        "tokenizer.json", "embedder.json", "embedder.safetensors", "report.json",
        "train_hashes.safetensors", "timings.json",
    }  # fmt: skip
    assert set(content(prepared.path)) == {"manifest.json", *artefacts_of(prepared.manifest)}
    assert not [name for name in content(prepared.path) if name.endswith((".tmp", ".pkl", ".npy"))]
    source = tfds.builder_from_directory(prepared.path / "windows").as_data_source("train")
    assert len(prepared.manifest["window_files"]["train"]) > 1
    rows = np.stack([source[i]["tokens"] for i in range(len(source))])
    np.testing.assert_array_equal(rows, prepared.read_windows("train", range(len(source))))


def test_hashes_sorted_in_passes_are_the_same_file(sources, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(describe, "_HASHES", 7)
    made = prepare.prepare(config(sources, tmp_path / "corpus"))
    name = "train_hashes.safetensors"
    assert (made.path / name).read_bytes() == (prepared.path / name).read_bytes()
    hashes = safetensors.numpy.load_file(prepared.path / name)["hashes"]
    assert (prepared.path / name).read_bytes() == safetensors.numpy.save({"hashes": hashes})
    assert (np.diff(hashes.astype(object)) > 0).all()


def test_what_is_fitted_on_has_the_least_hashes(tmp_path):
    rng, paths, all_of_them = np.random.default_rng(0), [], []
    for number, size in enumerate((40, 0, 300, 7)):
        hashes = rng.integers(0, 256, (size, 16), np.uint8)
        hashes[:, 8:11] = np.where(rng.random((size, 1)) < 0.5, hashes[:, 8:11], 5)  # one range
        hashes[1:2] = hashes[:1]  # pieces of one document
        split = rng.integers(0, 2, size).astype(np.uint8)
        lengths = rng.integers(0, 50, size)
        tensors = {"hash": hashes, "split": split, "offsets": np.cumsum([0, *lengths])}
        paths.append(tmp_path / f"{number}.safetensors")
        shards.save(paths[-1], tensors)
        all_of_them += [
            (hashes[i, 8:].tobytes(), number, i, lengths[i]) for i in np.flatnonzero(split == 0)
        ]
    all_of_them.sort(key=lambda document: document[0])
    sizes = np.array([document[3] for document in all_of_them])
    before = np.cumsum(sizes) - sizes
    for amount in (1, 60, 500, 10**6):
        for given, count in (
            ({"num_documents": amount}, amount),
            ({"num_bytes": amount}, int((before < amount).sum())),
        ):
            found = shards.choose(paths, **given)
            pairs = {(number, i) for number, rows in enumerate(found) for i in rows}
            assert pairs == {document[1:3] for document in all_of_them[:count]}
            assert all((np.diff(rows) > 0).all() for rows in found)


def test_it_tells_where_its_time_went(sources, tmp_path, capsys, monkeypatch):
    def half_a_line(work, *args):
        with (work.path / "timings.jsonl").open("a") as file:
            file.write('{"stage": "wri\n')
        return original(work, *args)

    original = prepare.write_manifest
    monkeypatch.setattr(prepare, "write_manifest", half_a_line)
    made = prepare.prepare(config(sources, tmp_path / "corpus"))
    told = json.loads((made.path / "timings.json").read_text())
    assert set(told["seconds"]) >= {"reading and cleaning", "writing windows"}
    assert all(seconds >= 0 for seconds in told["seconds"].values())
    assert told["text_bytes"] == sum(
        split["bytes"] for split in made.manifest["counts"]["splits"].values()
    )
    shown = capsys.readouterr().err
    assert "MB/s; " in shown
    assert " groups of source files; as many files" in shown


def test_a_corpus_knows_its_train_documents(prepared, tmp_path):
    texts = [*TEXTS, TEXTS[0] + " ", "another"]
    found = prepared.trained_on([text_hash(text) for text in texts])
    train = set(texts_of(prepared, "train"))
    assert found.tolist() == [text in train for text in texts]
    assert 50 < found.sum() < len(TEXTS)
    assert prepared.trained_on([]).shape == (0,)
    # What it knows beside is not what it is: a corpus prepared anew continues the runs of the old.
    assert fingerprint_of(prepared.manifest | {"extras": {}}) == prepared.fingerprint
    shutil.copytree(prepared.path, tmp_path / "copy")
    with (tmp_path / "copy" / "train_hashes.safetensors").open("r+b") as f:
        f.seek(-1, os.SEEK_END)
        f.write(b"?")
    with pytest.raises(UserError, match=r"damaged: train_hashes\.safetensors differ"):
        open_corpus(tmp_path / "copy").verify()


class FirstLetter:
    """An embedder from outside, which tells texts apart by their first letter."""

    name, dim = "first-letter", 64

    @classmethod
    def fit(cls, cfg, texts, *, num_workers=1):
        return cls()

    def embed(self, texts):
        return np.eye(64, dtype=np.float32)[[ord(text.split(": ")[-1][0]) % 64 for text in texts]]

    def contents(self):
        return {}, {}

    @classmethod
    def load(cls, settings, tensors):
        return cls()


def test_an_embedder_from_outside_cuts_the_corpus(sources, tmp_path):
    kind = f"{__name__}:FirstLetter"
    made = prepare.prepare(config(sources, tmp_path / "corpus", embed__kind=kind))
    assert isinstance(made.embedder(), FirstLetter)
    assert made.manifest["embedder"] == "first-letter"
    for texts in documents_of(made, "train"):
        assert texts
    with pytest.raises(UserError, match="did you mean tfidf_svd"):
        prepare.prepare(config(sources, tmp_path / "other", embed__kind="tfidf"))
    assert not (tmp_path / "other").exists()


class Killed(BaseException):
    """As little handled as SIGKILL."""


@pytest.mark.parametrize("stride", [4, 5, 6, 7])
def test_a_run_killed_anywhere_continues_to_the_same_bytes(
    sources, prepared, tmp_path, monkeypatch, stride
):
    # Everything that lasts goes through os.replace: die before or after the n-th one, again and
    # again, until a run gets through. Four replacements are the most that a run repeats.
    replace, cfg = os.replace, config(sources, tmp_path / "corpus")
    deaths = []

    def dying(n: int, *, after: bool):
        count = 0

        def die(source, target):
            nonlocal count
            count += 1
            if count == n:
                if after:
                    replace(source, target)
                deaths.append(pathlib.Path(target).name)
                raise Killed
            replace(source, target)

        return die

    for attempt in range(60):
        monkeypatch.setattr(os, "replace", dying(stride, after=(stride + attempt) % 2 == 1))
        try:
            prepare.prepare(cfg)
        except Killed:
            if not (tmp_path / "corpus" / "manifest.json").exists():
                with pytest.raises(UserError, match="not finished"):
                    open_corpus(cfg.corpus.dir)
        else:
            break
    monkeypatch.undo()
    assert len(deaths) > 3, deaths
    assert content(tmp_path / "corpus") == content(prepared.path)
    assert not (tmp_path / "corpus" / ".work").exists()


STAGES = (
    "_hash", "_read", "_fit_tokenizer", "_fit_embedder", "_encode", "_fit_centroids", "_group",
    "_write_windows", "describe_domains", "write_train_hashes", "write_manifest", "_publish",
)  # fmt: skip


def dying_after(stage: str):
    whole = getattr(prepare, stage)

    def die(*args, **kwargs):
        whole(*args, **kwargs)
        raise Killed

    return die


@pytest.mark.parametrize("first", [0, 1])
def test_a_run_that_dies_after_stages_continues_to_the_same_bytes(
    sources, prepared, tmp_path, monkeypatch, first
):
    # After each stage, and after every second one, so that a start also does two stages at once.
    cfg = config(sources, tmp_path / "corpus")
    for stage in STAGES[first :: 1 + first]:
        with monkeypatch.context() as patch:
            patch.setattr(prepare, stage, dying_after(stage))
            with pytest.raises(Killed):
                prepare.prepare(cfg)
    found = prepare.prepare(cfg)
    assert found.fingerprint == prepared.fingerprint
    assert content(tmp_path / "corpus") == content(prepared.path)


# A stage in a process of its own loads libraries, and limits their threads, in another order.
STAGE_PROGRAM = """
import pathlib, sys
sys.path.insert(0, {tests!r})
import stages_test
from soup_jax.data import windows
from soup_jax.data.prepare import shards
from soup_jax.data.prepare import stages as prepare
shards.SHARD_DOCUMENTS, windows.FILE_BYTES = 25, 5000
setattr(prepare, {stage!r}, stages_test.dying_after({stage!r}))
try:
    prepare.prepare(stages_test.config(pathlib.Path({sources!r}), pathlib.Path({path!r})))
except stages_test.Killed:
    sys.exit(7)
"""


@pytest.mark.slow
def test_every_stage_in_a_process_of_its_own_gives_the_same_bytes(sources, prepared, tmp_path):
    for stage in STAGES:
        program = STAGE_PROGRAM.format(
            tests=str(pathlib.Path(__file__).parent),
            sources=str(sources),
            path=str(tmp_path / "corpus"),
            stage=stage,
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
        assert done.returncode == 7, done.stderr.decode()
    assert content(tmp_path / "corpus") == content(prepared.path)


# Runs `prepare`, and is killed by SIGKILL when stage `stage` has given its first result.
KILLED_PROGRAM = """
import os, signal, sys
from soup_jax.data.embed import parallel
from soup_jax.data.prepare import stages as prepare
from soup_jax.data.readers import text_hash
from soup_jax.data.prepare import shards
from soup_jax.data import windows
sys.path.insert(0, {tests!r})
import stages_test
shards.SHARD_DOCUMENTS, windows.FILE_BYTES = 25, 5000
parallel_map, stage = parallel.parallel_map, 0
def killing(function, jobs, *, num_workers):
    global stage
    stage += 1
    for result in parallel_map(function, jobs, num_workers=num_workers):
        yield result
        if stage == {stage}:
            os.kill(os.getpid(), signal.SIGKILL)
parallel.parallel_map = killing
import pathlib
cfg = stages_test.config(pathlib.Path({sources!r}), pathlib.Path({path!r}))
cfg.corpus.num_workers = 2
prepare.prepare(cfg)
"""


# Of parallel work: reading, moving, encoding, writing windows.
@pytest.mark.parametrize("stage", [2, 3, 5, 7])
def test_sigkill_amid_workers(sources, prepared, tmp_path, stage):
    program = KILLED_PROGRAM.format(
        tests=str(pathlib.Path(__file__).parent),
        sources=str(sources),
        path=str(tmp_path / "corpus"),
        stage=stage,
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert (tmp_path / "corpus" / ".work").exists()
    prepare.prepare(config(sources, tmp_path / "corpus"))
    assert content(tmp_path / "corpus") == content(prepared.path)


def test_the_number_of_workers_changes_no_byte(sources, prepared, tmp_path):
    prepare.prepare(config(sources, tmp_path / "corpus", corpus__num_workers=2))
    assert content(tmp_path / "corpus") == content(prepared.path)


def test_a_finished_corpus_is_left_alone_and_other_settings_are_refused(sources, tmp_path, capsys):
    path = tmp_path / "corpus"
    first = prepare.prepare(config(sources, path))
    stamps = {p: p.stat().st_mtime_ns for p in path.rglob("*")}
    (path / ".work" / "final").mkdir(parents=True)  # as if killed before tidying up
    capsys.readouterr()
    moved = tmp_path / "moved"
    os.symlink(sources, moved)  # the same bytes elsewhere are the same sources
    again = prepare.prepare(config(moved, path, corpus__num_workers=2))
    assert "already prepared" in capsys.readouterr().err
    assert again.fingerprint == first.fingerprint
    for changes, message in [
        ({"seq_len": 32}, "seq_len: 16, now 32"),
        ({"num_domains": 5}, "num_domains: 4, now 5"),
        ({"corpus__min_chars": 9}, "corpus.min_chars: 1, now 9"),
        ({"embed__dim": 9}, "embed.dim: 8, now 9"),
    ]:
        with pytest.raises(UserError, match=rf"{message}.*another --config\.corpus\.dir"):
            prepare.prepare(config(sources, path, **changes))
    with pytest.raises(UserError, match=r"sources removed: .*a\.jsonl\.gz"):
        prepare.prepare(config(sources / "b.jsonl.zst", path))
    reverse = tuple(str(sources / n) for n in ("d", "c.parquet", "b.jsonl.zst", "a.jsonl.gz"))
    with pytest.raises(UserError, match="sources: in another order"):
        prepare.prepare(config(reverse, path))
    assert {p: p.stat().st_mtime_ns for p in path.rglob("*")} == stamps


def test_sources_are_read_again_only_if_size_or_time_differ(tmp_path, capsys, monkeypatch):
    folder, path = tmp_path / "text", tmp_path / "corpus"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.jsonl").write_bytes(json_lines(TEXTS[30 * i : 30 * (i + 1)]))
    hashed, whole = [], inputs.sha256_file

    def sha256_file(name):
        hashed.append(pathlib.Path(name).name)
        return whole(name)

    def prepared_again() -> set[str]:
        hashed.clear()
        made = prepare.prepare(config(folder, path))
        assert "is already prepared (sources whose size and time" in capsys.readouterr().err
        assert made.fingerprint == fingerprint
        return {name for name in hashed if name.endswith(".jsonl")}

    monkeypatch.setattr(inputs, "sha256_file", sha256_file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "_encode", dying_after("_encode"))
        with pytest.raises(Killed):
            prepare.prepare(config(folder, path))
    assert sum(name.endswith(".jsonl") for name in hashed) == 4
    hashed.clear()
    fingerprint = prepare.prepare(config(folder, path)).fingerprint  # goes on
    assert not [name for name in hashed if name.endswith(".jsonl")]
    capsys.readouterr()
    assert prepared_again() == set()
    os.utime(folder / "2.jsonl", ns=(1, 1))
    assert prepared_again() == {"2.jsonl"}
    (folder / "1.jsonl").write_bytes(json_lines(TEXTS[30:59]))
    with pytest.raises(UserError, match=r"sources changed: .*1\.jsonl\)"):
        prepare.prepare(config(folder, path))


def test_unfinished_work_for_other_settings_is_dropped(
    sources, prepared, tmp_path, capsys, monkeypatch
):
    path = tmp_path / "corpus"
    monkeypatch.setattr(prepare, "_publish", lambda work: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        prepare.prepare(config(sources, path, seq_len=8))
    monkeypatch.undo()
    # Worse: killed amid moving, with a stale windows folder already in place.
    os.replace(path / ".work" / "final" / "windows", path / "windows")
    prepare.prepare(config(sources, path))
    assert "dropped, it was for other settings: seq_len: 8, now 16" in capsys.readouterr().err
    assert content(path) == content(prepared.path)


def test_the_order_of_sources_moves_no_document_to_another_split(sources, prepared, tmp_path):
    reverse = tuple(str(sources / n) for n in ("d", "c.parquet", "b.jsonl.zst", "a.jsonl.gz"))
    other = prepare.prepare(config(reverse, tmp_path / "corpus"))
    assert other.fingerprint != prepared.fingerprint
    for split in prepared.offsets:
        assert sorted(texts_of(other, split)) == sorted(texts_of(prepared, split))


def test_damage_is_reported_and_does_not_stop_the_run(tmp_path, capsys):
    folder = tmp_path / "text"
    folder.mkdir()
    broken = b'{"text": "cut\n{"text": 3}\n{"text": ""}\n{"text": "\xff"}\n'
    for i in range(0, 60, 20):  # damage in several shards
        (folder / f"a{i:02d}.jsonl").write_bytes(json_lines(TEXTS[i : i + 20]) + broken)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(json_lines(TEXTS[60:]), mtime=0)[:-200])
    (folder / "c.parquet").write_bytes(b"PAR1")
    (folder / "d.txt").symlink_to(folder / "nowhere")
    (folder / "e.txt").write_bytes(b"\xff\xfe")
    result = prepare.prepare(config(folder, tmp_path / "corpus"))
    report = json.loads((tmp_path / "corpus" / "report.json").read_text())
    assert report["counts"] == {
        "broken_json": 3, "no_text": 3, "empty": 3, "invalid_utf8": 4, "truncated": 1,
        "unreadable": 2,
    }  # fmt: skip
    assert {(os.path.basename(e["source"]), e["line"]) for e in report["entries"]["no_text"]} == {
        ("a00.jsonl", 22),
        ("a20.jsonl", 22),
        ("a40.jsonl", 22),
    }
    assert result.manifest["counts"]["damaged"] == 16
    texts = [text for split in result.offsets for text in texts_of(result, split)]
    assert 60 < len(texts) < 120
    assert sorted(texts) == sorted(TEXTS[: len(texts)])
    last_lines = capsys.readouterr().out.splitlines()[-7:]
    assert last_lines[0].strip() == "damaged: 16 (all in report.json)"
    expected = [meaning for kind, meaning in DAMAGE.items() if kind in report["counts"]]
    for line, meaning in zip(last_lines[1:], expected, strict=True):
        assert meaning in line


def test_windows_that_are_mostly_padding_are_refused(sources, tmp_path):
    longest = 0
    for seq_len in (1024, 2048, 4096, 8192, 16384, 1 << 20):
        cfg = config(sources, tmp_path / f"{seq_len}", seq_len=seq_len)
        try:
            found = prepare.prepare(cfg)
        except UserError as e:
            assert "would be padding, and half is the most" in str(e)  # noqa: PT017
            assert not (tmp_path / f"{seq_len}" / ".work" / "final" / "windows").exists()
            continue
        targets = found.offsets["train"][-1] * seq_len
        assert found.pad["train"].sum() <= targets / 2
        longest = seq_len
    assert 1024 <= longest < 16384
    # By the bytes before anything is encoded, and by the tokens before windows are written.
    assert not (tmp_path / f"{1 << 20}" / ".work" / "encoded").exists()
    assert (tmp_path / f"{2 * longest}" / ".work" / "grouped").exists()


@pytest.mark.parametrize("texts", [["word"] * 9, ["word" + " " * i for i in range(30)]])
def test_texts_of_one_word_are_refused(tmp_path, texts):
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts))
    with pytest.raises(UserError, match=r"fewer than num_domains|the one word 'word"):
        prepare.prepare(config(tmp_path / "a.jsonl", tmp_path / "corpus", embed__max_features=1))
    with pytest.raises(UserError, match=r"num_domains|the one word 'word"):
        prepare.prepare(config(tmp_path / "a.jsonl", tmp_path / "other"))


@pytest.mark.parametrize(("encoding", "hint"), [("utf-16", "iconv"), ("utf-8", "jq -c")])
def test_a_refusal_says_what_was_damaged(tmp_path, encoding, hint):
    nested = "".join(json.dumps({"data": {"text": t}}) + "\n" for t in TEXTS)
    (tmp_path / "a.jsonl").write_bytes(nested.encode(encoding))
    (tmp_path / "b.jsonl").write_bytes(json_lines(TEXTS[:2]))  # some can be read
    with pytest.raises(UserError, match=rf"num_domains = 4 \(2 documents read, .*{hint}"):
        prepare.prepare(config(tmp_path, tmp_path / "corpus"))


def test_names_of_sources_need_not_be_utf8(tmp_path, prepared, capsys):
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(json_lines(TEXTS))
    with open(os.fsencode(folder) + b"/\xff.jsonl", "wb") as f:
        f.write(json_lines(TEXTS[:5]) + b"broken\n")
    cfg = config(folder, tmp_path / "corpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "_encode", dying_after("_encode"))
        with pytest.raises(Killed):
            prepare.prepare(cfg)
    capsys.readouterr()
    made = prepare.prepare(cfg)
    assert "continuing" in capsys.readouterr().err
    assert made.manifest["counts"]["duplicates"] == 5
    assert made.manifest["request"]["sources"][1]["path"] == f"{folder}/\udcff.jsonl"
    assert "\\udcff.jsonl:6" in made.summary()[-1]
    made.verify()
    assert prepare.prepare(cfg).fingerprint == made.fingerprint


def test_long_documents_are_cut_and_short_ones_dropped(sources, tmp_path):
    result = prepare.prepare(
        config(sources, tmp_path / "corpus", corpus__min_chars=60, corpus__max_chars=100)
    )
    kept = [text for text in TEXTS if len(text) >= 60]
    counts = result.manifest["counts"]
    assert counts["too_short"] + counts["duplicates"] + len(kept) == counts["documents"]
    assert counts["cut"] == sum(len(text) > 100 for text in kept) > 10
    pieces = [text[i : i + 100] for text in kept for i in range(0, len(text), 100)]
    found = {split: texts_of(result, split) for split in result.offsets}
    assert sorted(itertools.chain(*found.values())) == sorted(pieces)
    for text in kept:  # all pieces of a document are in its split
        split = corpus.split_of(text_hash(text), 0.2, 0)
        assert text[-(len(text) % 100 or 100) :] in found[split]
        assert text[:100] in found[split]


def test_a_held_out_split_and_no_validation(sources, prepared, tmp_path):
    result = prepare.prepare(
        config(
            sources,
            tmp_path / "corpus",
            corpus__validation_fraction=0.0,
            corpus__held_out_fraction=0.2,
        )
    )
    assert list(result.offsets) == ["train", "validation", "held_out"]
    # The same hashes, another name for the same part of them.
    assert sorted(texts_of(result, "held_out")) == sorted(texts_of(prepared, "validation"))
    assert len(result.source("validation")) == 0
    assert len(result.source("held_out")) == result.offsets["held_out"][-1] > 0


def test_a_given_tokenizer_is_taken(sources, tmp_path):
    given = tokenizer.train_tokenizer(["ab ab abc"] * 5, 280)
    given.save(tmp_path / "given.json")
    cfg = config(sources, tmp_path / "corpus", tokenizer__path=str(tmp_path / "given.json"))
    result = prepare.prepare(cfg)
    assert result.tokenizer().hash == given.hash
    assert result.vocab_size == given.vocab_size < cfg.vocab_size
    cfg.vocab_size = 257
    with pytest.raises(UserError, match="more than vocab_size = 257"):
        prepare.prepare(cfg)


def test_too_little_text_for_the_vocabulary_is_said(sources, tmp_path, capsys):
    cfg = config(sources, tmp_path / "corpus", vocab_size=70_000)
    result = prepare.prepare(cfg)
    assert result.vocab_size < 2000
    assert f"only {result.vocab_size} tokens" in capsys.readouterr().err
    assert windows.token_dtype(result.vocab_size) == np.uint16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_domains": 119}, r"hold \d+ train documents, fewer than num_domains = 119"),
        ({"num_domains": 200, "embed__fit_documents": 100}, "raise --config.embed.fit_documents"),
        ({"vocab_size": 256}, "at least 257"),
        ({"corpus__sources": ("nothing-here",)}, "matches no file"),
        (
            {"corpus__text_field": "body"},
            r"hold \d train documents, fewer than .*no field 'body'; the fields are 'text'.*"
            r"give --config\.corpus\.text_field=text\. ",
        ),
        ({"corpus__min_chars": 9, "corpus__max_chars": 8}, "must be at most corpus.max_chars = 8"),
        ({"corpus__min_chars": 999}, "hold 0 train documents, .* 140 too short ones dropped"),
        ({"seq_len": 10_000_000}, r"seq_len = 10000000 is too long .* 100% would be padding"),
        ({"embed__max_features": 1}, r"the one word '\w+' .*embed.max_features = 1"),
        ({"embed__kind": "other"}, "'other'; known are"),
        ({"tokenizer__path": "nothing.json"}, "nothing.json does not exist"),
        ({"corpus__dir": "/proc/nothing/corpus"}, "cannot be written: /proc"),
    ],
)
def test_what_cannot_work_says_what_to_do(sources, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        prepare.prepare(config(sources, tmp_path / "corpus", **changes))


def test_a_folder_of_something_else_is_not_touched(sources, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match=r"holds 'thesis\.txt'"):
        prepare.prepare(config(sources, tmp_path))
    assert content(tmp_path) == {"thesis.txt": b"precious"}


def test_two_runs_in_one_folder_do_not_meet(sources, tmp_path):
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another `soup-jax prepare`"):
        prepare.prepare(config(sources, tmp_path))
    os.close(handle)
    assert content(tmp_path) == {}


def test_preparing_needs_no_jax():
    program = "import sys, soup_jax.data.prepare.stages; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_sample_for_fitting_is_of_train_documents_and_of_the_asked_size(
    sources, tmp_path, monkeypatch
):
    seen = {}
    train, fit = tokenizer.train_tokenizer, TfidfSvd.fit

    def spy_train(texts, vocab_size):
        seen["tokenizer"] = list(texts)
        return train(seen["tokenizer"], vocab_size)

    def spy_fit(cfg, texts, **kwargs):
        seen["embedder"] = list(texts)
        return fit(cfg, texts, **kwargs)

    monkeypatch.setattr(tokenizer, "train_tokenizer", spy_train)
    monkeypatch.setattr(TfidfSvd, "fit", spy_fit)
    changes = {"embed__fit_documents": 40, "tokenizer__train_bytes": 4000, "embed__max_chars": 50}
    result = prepare.prepare(config(sources, tmp_path / "corpus", **changes))
    texts = set(texts_of(result, "train"))
    assert set(seen["tokenizer"]) < texts
    assert len(seen["embedder"]) == 40
    assert set(seen["embedder"]) < {text[:50] for text in texts}
    size = sum(len(text.encode()) for text in seen["tokenizer"])
    longest = max(len(text.encode()) for text in texts)
    assert 4000 <= size < 4000 + longest
