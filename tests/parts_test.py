"""One `prepare` by many: shards that share a folder, Apache Beam; the same bytes."""

import fcntl
import os
import pathlib
import threading

import pytest
from stages_test import Killed, config, content, write_sources

from soup_jax.cli import main as cli
from soup_jax.data import windows
from soup_jax.data.prepare import shards, stages
from soup_jax.data.prepare import work as work_lib
from soup_jax.data.prepare.work import Part
from soup_jax.errors import UserError

MERGE = Part(number=0)
CONFIG = f"--config={pathlib.Path(__file__).parents[1]}/experiments/base.py"


@pytest.fixture(scope="module", autouse=True)
def small_pieces():
    """Several groups of files, shards and window files, from little text."""
    patch = pytest.MonkeyPatch()
    patch.setattr(shards, "SHARD_DOCUMENTS", 25)
    patch.setattr(shards, "GROUP_FILES", 1)
    patch.setattr(windows, "FILE_BYTES", 5000)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    path = tmp_path_factory.mktemp("sources") / "text"
    write_sources(path)
    return path


CLEANED = {"corpus__near_duplicates": 0.9}


@pytest.fixture(scope="module")
def whole(sources, tmp_path_factory):
    """What one process makes."""
    return stages.prepare(config(sources, tmp_path_factory.mktemp("one") / "corpus", **CLEANED))


def rounds(cfg, number: int) -> int:
    """Shards and merges in turns until the corpus is there; how many."""
    for count in range(1, 10):
        for index in reversed(range(number)):
            assert stages.prepare_part(cfg, Part(index, number, merges=False)) is None
        if stages.prepare_part(cfg, MERGE) is not None:
            return count
    raise AssertionError("it never ended")


@pytest.mark.parametrize("number", [1, 3])
def test_shards_make_the_corpus_that_one_process_makes(sources, whole, tmp_path, number):
    cfg = config(sources, tmp_path / "corpus", **CLEANED)
    assert rounds(cfg, number) == (4 if number == 1 else 5)
    assert content(tmp_path / "corpus") == content(whole.path)
    # A round too many does nothing.
    assert stages.prepare_part(cfg, Part(0, 3, merges=False)) is not None


def test_one_process_makes_what_several_files_in_one_group_make(
    sources, whole, tmp_path, monkeypatch
):
    monkeypatch.setattr(shards, "GROUP_FILES", 4096)
    made = stages.prepare(config(sources, tmp_path / "corpus", **CLEANED))
    assert made.fingerprint == whole.fingerprint


def test_each_part_says_what_is_missing(sources, tmp_path, capsys):
    cfg = config(sources, tmp_path / "corpus")
    flags = [f"--config.corpus.sources={sources}", f"--config.corpus.dir={tmp_path / 'corpus'}"]

    def said(*arguments: str, status: int = 0) -> str:
        assert cli.run(["prepare", CONFIG, *flags, *arguments]) == status
        return capsys.readouterr().err

    left = "hashing the sources: 5 of 5 outputs are still to be made by shards"
    assert left in said("--merge", status=75)
    assert "reading documents: 3 of 5 outputs" in said("--shard=0/3")
    assert "reading documents: 1 of 5 outputs" in said("--shard=1/3")
    assert "choosing the documents that are kept is for `--merge`" in said("--shard=0/1")
    # What others have done is not thrown away for a flag that was forgotten.
    for part in (Part(0, 3, merges=False), MERGE):
        with pytest.raises(UserError, match=r"unfinished work for other settings \(.*delete it"):
            stages.prepare_part(cfg, part)
    assert (tmp_path / "corpus" / ".work" / "documents").exists()
    for given in ("3/3", "1", "a/2", "-1/2", "0/0"):
        assert cli.run(["prepare", CONFIG, f"--shard={given}", *flags]) == 2
        assert f"--shard={given} must be i/n" in capsys.readouterr().err
    assert cli.run(["prepare", CONFIG, "--shard=0/2", "--merge", *flags]) == 2
    assert "--shard and --merge do not go together" in capsys.readouterr().err


STAGES = {
    "hash_files": 0, "read_group": 0, "sign_shard": 0, "keep_shard": 1, "encode_shard": 2,
    "group_shard": 3, "write_window_file": 4,
}  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_a_shard_killed_in_a_stage_changes_nothing(sources, whole, tmp_path, monkeypatch, stage):
    cfg, killed = config(sources, tmp_path / "corpus", **CLEANED), []
    run_jobs = work_lib.run_jobs

    def dying(work, function, jobs, name, **how):
        if function.__name__ == stage and not killed and work.part.owns(1):
            function(*jobs[1].arguments)  # one of its jobs, and then
            killed.append(name)
            raise KeyboardInterrupt
        return run_jobs(work, function, jobs, name, **how)

    for module in ("stages", "clean"):
        monkeypatch.setattr(f"soup_jax.data.prepare.{module}.run_jobs", dying)
    with pytest.raises(KeyboardInterrupt):
        rounds(cfg, 2)
    assert killed
    assert rounds(cfg, 2) == 5 - STAGES[stage]
    assert content(tmp_path / "corpus") == content(whole.path)


@pytest.mark.parametrize("stage", ["_hash", "_fit_tokenizer", "_fit_centroids", "write_manifest"])
def test_a_merge_killed_after_a_stage_changes_nothing(sources, whole, tmp_path, monkeypatch, stage):
    cfg = config(sources, tmp_path / "corpus", **CLEANED)
    original = getattr(stages, stage)

    def die(work, *args):
        original(work, *args)
        if work.part.merges:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(stages, stage, die)
        with pytest.raises(Killed):
            rounds(cfg, 2)
    rounds(cfg, 2)
    assert content(tmp_path / "corpus") == content(whole.path)


def test_shards_that_begin_at_once_describe_the_work_once(sources, tmp_path):
    cfg = config(sources, tmp_path / "corpus")
    errors = []

    def run(index):
        try:
            stages.prepare_part(cfg, Part(index, 8, merges=False))
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert sorted(p.name for p in (tmp_path / "corpus" / ".work" / "hashes").iterdir()) == [
        f"{i:06d}.json" for i in range(5)
    ]


def test_parts_that_merge_are_alone(sources, tmp_path):
    cfg, folder = config(sources, tmp_path / "corpus"), tmp_path / "corpus"
    folder.mkdir()
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)
    with pytest.raises(UserError, match="another `soup-jax prepare`"):
        stages.prepare_part(cfg, MERGE)
    assert stages.prepare_part(cfg, Part(0, 2, merges=False)) is None
    os.unlink(folder / ".work" / "request.json")
    with pytest.raises(UserError, match=r"has no request.json: what is there was not finished"):
        stages.prepare_part(cfg, Part(0, 2, merges=False))
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another `soup-jax prepare`"):
        stages.prepare_part(cfg, Part(0, 2, merges=False))
    os.close(handle)


def test_a_job_that_is_given_twice_is_done_once(sources, tmp_path):
    # As a runner does that gives up on a worker which goes on.
    cfg = config(sources, tmp_path / "corpus", **CLEANED)

    def twice(function, jobs, *, num_workers):
        for job in [*jobs, *jobs]:
            function(*job)
        return [None] * len(jobs)

    stages.prepare(cfg, map=twice)
    with pytest.raises(FileNotFoundError):  # but for one whose input is really gone
        work_lib._once(shards.hash_files.__globals__["load"], (tmp_path / "x",), (tmp_path / "y",))


def test_a_disk_that_holds_half_of_it_already_is_large_enough(sources, tmp_path, monkeypatch):
    cfg = config(sources, tmp_path / "corpus")
    assert stages.prepare_part(cfg, Part(0, 2, merges=False)) is None
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100})())
    assert stages.prepare_part(cfg, Part(1, 2, merges=False)) is None
    with pytest.raises(UserError, match="make room"):
        stages.prepare_part(config(sources, tmp_path / "new"), Part(1, 2, merges=False))


def test_apache_beam_makes_the_same_corpus(sources, whole, tmp_path):
    pytest.importorskip("apache_beam")
    from soup_jax.data.prepare.beam import beam_map

    cfg = config(sources, tmp_path / "corpus", **CLEANED)
    stages.prepare(cfg, map=beam_map("--runner=DirectRunner"))
    assert content(tmp_path / "corpus") == content(whole.path)
    with pytest.raises(UserError, match="--beam='--runner=Nobody'"):
        stages.prepare(config(sources, tmp_path / "other"), map=beam_map("--runner=Nobody"))


def _gone():
    raise OSError("the worker is gone")


@pytest.mark.parametrize("stage", STAGES)
def test_a_worker_of_beam_that_dies_changes_nothing(sources, whole, tmp_path, stage):
    pytest.importorskip("apache_beam")
    from soup_jax.data.prepare.beam import beam_map

    beam, died = beam_map("--runner=DirectRunner"), []

    def dying(function, jobs, *, num_workers):
        if jobs[0][0].__name__ == stage and not died:
            died.append(stage)
            beam(function, jobs[:1], num_workers=1)
            beam(function, [(_gone, (tmp_path / "nothing",), ())], num_workers=1)
        return beam(function, jobs, num_workers=num_workers)

    cfg = config(sources, tmp_path / "corpus", **CLEANED)
    with pytest.raises(Exception, match="the worker is gone"):
        stages.prepare(cfg, map=dying)
    stages.prepare(cfg, map=dying)
    assert content(tmp_path / "corpus") == content(whole.path)


def test_beam_that_is_missing_is_said(sources, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "apache_beam", None)
    flags = [f"--config.corpus.sources={sources}", f"--config.corpus.dir={tmp_path / 'corpus'}"]
    arguments = ["prepare", CONFIG, *flags, "--beam=--runner=DirectRunner"]
    assert cli.run(arguments) == 2
    assert "pip install 'soup_jax[beam]'" in capsys.readouterr().err
    arguments[3] = "--config.corpus.dir=gs://bucket/corpus"
    assert cli.run(arguments) == 2
    assert "the workers of --beam need a disk that they share" in capsys.readouterr().err
    assert not (tmp_path / "corpus").exists()
