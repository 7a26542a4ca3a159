"""Files and folders that appear whole or not at all, and places that cannot be written."""

import os
import pathlib
import re
import socket
import subprocess
import sys

import pytest

from soup_jax import inputs, remote, storage
from soup_jax.data.corpus_cache import folder_of
from soup_jax.errors import UnavailableError, UserError, explain

KILLED = """
import os, signal, sys
from soup_jax import storage
with storage.{kind}(sys.argv[1]) as new:
    if {folder}:
        (new / "half").write_text("half")
    else:
        new.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_while_writing(kind, path):
    code = KILLED.format(kind=kind, folder=kind.endswith("folder"))
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_killed_write_leaves_the_old_file_and_the_next_one_tidies(tmp_path):
    path = tmp_path / "x.json"
    storage.write_text(path, "old")
    kill_while_writing("atomic_path", path)
    assert path.read_text() == "old"
    assert len(names(tmp_path)) == 2
    storage.write_text(path, "new")
    assert (path.read_text(), names(tmp_path)) == ("new", ["x.json"])


def test_a_killed_folder_leaves_the_old_one_and_the_next_one_tidies(tmp_path):
    path = tmp_path / "made"
    with storage.atomic_folder(path) as new:
        (new / "a").write_text("old")
    kill_while_writing("atomic_folder", path)
    assert names(path) == ["a"]
    with storage.atomic_folder(path) as new:
        (new / "b").write_text("new")
    assert (names(path), names(tmp_path)) == (["b"], ["made"])


def test_a_folder_moved_away_by_a_killed_process_comes_back(tmp_path):
    path = tmp_path / "made"
    path.mkdir()
    (path / "a").write_text("old")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    path.rename(tmp_path / f".made.{storage._host()}.{dead.pid}.0.old")
    storage.recover_folder(path)
    assert (names(path), names(tmp_path)) == (["a"], ["made"])


def test_a_killed_process_of_the_same_number_is_another(tmp_path):
    # Which is the rule where each container starts one program.
    left = f".made.{storage._host()}.{os.getpid()}.0.tmp"
    (tmp_path / left).mkdir()
    with storage.atomic_folder(tmp_path / "made"):
        pass
    (tmp_path / "made" / left).write_text("half")
    assert storage.files_in(tmp_path) == []
    assert (names(tmp_path), names(tmp_path / "made")) == (["made"], [])


def test_a_temporary_folder_goes_at_once_or_with_the_next(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    kill_while_writing("temporary_folder", "x")
    (left,) = names(tmp_path)
    with storage.temporary_folder("x") as folder:
        assert names(tmp_path) == [folder.name] != [left]
        with storage.temporary_folder("x"):
            assert folder.exists()
    assert names(tmp_path) == []


def test_what_a_living_process_writes_is_left_alone(tmp_path):
    path = tmp_path / "x"
    with storage.atomic_path(path) as first:
        first.write_text("first")
        storage.write_text(path, "second")
        assert first.exists()
    assert path.read_text() == "first"


def test_files_are_listed_without_temporary_ones_and_those_of_the_dead_go(tmp_path):
    storage.write_text(tmp_path / "made" / "x.json", "x")
    kill_while_writing("atomic_path", tmp_path / "made" / "y.json")
    with storage.atomic_path(tmp_path / "z") as alive:
        alive.write_text("half")
        assert storage.files_in(tmp_path) == [tmp_path / "made" / "x.json"]
        assert alive.exists()
    assert names(tmp_path / "made") == ["x.json"]


def test_an_error_inside_leaves_no_trace(tmp_path):
    for make in (storage.atomic_path, storage.atomic_folder):
        with pytest.raises(KeyError), make(tmp_path / "x"):
            raise KeyError
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("/proc/x", "cannot be written"),
        ("/dev/null", "no regular file"),
        ("{here}", "is a folder"),
        ("{here}/file/x", "is no folder"),
    ],
)
def test_places_for_files_are_refused_before_work(place, message, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"--json=.*{message}"):
        storage.check_file_target(place.format(here=tmp_path), "--json")
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("place", "message"),
    [("/proc/x/y", "cannot be written"), ("/dev/null", "no folder"), ("{here}/file", "no folder")],
)
def test_places_for_folders_are_refused_before_work(place, message, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"--out=.*{message}"):
        storage.check_folder_target(place.format(here=tmp_path), "--out")
    storage.check_folder_target(tmp_path / "a" / "b", "--out")
    assert names(tmp_path) == ["file"]


def test_a_disk_without_room_is_refused(tmp_path):
    storage.check_room(tmp_path / "not" / "yet", 1, "this")
    with pytest.raises(UserError, match=r"this needs 1,000,000,000,000\.0 MB, and .* free"):
        storage.check_room(tmp_path / "not" / "yet", 10**18, "this")


def test_a_lock_is_held_by_one_and_freed_at_the_end(tmp_path):
    with storage.locked(tmp_path, "busy"):
        code = f"from soup_jax import storage\nwith storage.locked({str(tmp_path)!r}, 'busy'): pass"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "UserError: busy" in other.stderr
    with storage.locked(tmp_path, "busy"):
        pass


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "long").write_bytes(b"x" * 100)
    (tmp_path / "deep").write_text("[" * 100_000)
    (tmp_path / "nan").write_text("NaN")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    for name, message in (
        ("pipe", "no regular file"),
        ("folder", "is a folder"),
        ("socket", "cannot read"),
        ("gone", "does not exist"),
        ("a\0b", "cannot read"),
        ("latin", "not UTF-8"),
    ):
        for read in (inputs.read_text, inputs.sha256_file):
            if read is inputs.read_text or name != "latin":
                with pytest.raises(UserError, match=message):
                    read(tmp_path / name)
    with pytest.raises(UserError, match="more than 99 bytes"):
        inputs.read_text(tmp_path / "long", limit=99)
    for name in ("deep", "nan"):
        with pytest.raises(UserError, match="not valid JSON"):
            inputs.read_json(tmp_path / name)
    with pytest.raises(UserError, match="no regular file"):
        inputs.read_text(pathlib.Path("/dev/zero"))
    with pytest.raises(UserError, match="no safetensors file"):
        inputs.read_tensors(tmp_path / "long")


def test_failures_of_the_machine_are_explained_through_their_causes():
    error = ValueError("write failed")
    error.__cause__ = OSError(28, "No space left on device", "x/y")
    assert explain(error) == "x/y: the disk is full: make room, then the same command goes on"
    text = "RESOURCE_EXHAUSTED: [write] No space left on device"
    assert "disk is full" in explain(RuntimeError(text))
    assert "device is out of memory" in explain(RuntimeError("RESOURCE_EXHAUSTED: Out of memory"))
    text = "INTERNAL: Error dispatching computation: Out of memory allocating 584141789600 bytes."
    assert "device is out of memory" in explain(RuntimeError(text))
    assert explain(IsADirectoryError(21, "", "x")) == "x: a folder is where a file belongs"
    assert explain(KeyError("x")) == ""
    assert explain(FileNotFoundError(2, "No such file", "x")) == ""  # a bug, if nobody caught it


@pytest.mark.parametrize("path", ["gs://b/run", "https://h", "S3://b/*.jsonl", "file:///x"])
def test_addresses_are_refused_also_after_pathlib(path):
    for given in (path, pathlib.Path(path)):
        with pytest.raises(UserError, match=r"^--out=\w+://\S+ is an address"):
            storage.refuse_address(given, "--out")
    with pytest.raises(UserError, match=f"^{path.split(':')[0].lower()}://"):
        storage.refuse_address(path)


@pytest.mark.parametrize("kind", [str, pathlib.Path])
def test_an_address_never_becomes_a_folder_here(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"gs://b/x.json is an address"):
        storage.write_text(kind("gs://b/x.json"), "text")
    with (
        pytest.raises(UserError, match="gs://b/folder is an address"),
        storage.atomic_folder(kind("gs://b/folder")),
    ):
        pass
    with pytest.raises(UserError, match=r"corpus.cache_dir=gs://b/cache is an address"):
        folder_of("gs://b/corpus", str(kind("gs://b/cache")))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "path", ["run", "a:b/c", "C:/runs", "C:\\runs", "/x/gs:/y", "1s:/x", ":/x"]
)
def test_paths_are_no_addresses(path):
    storage.refuse_address(path)
    storage.refuse_address(pathlib.Path(path))


def test_what_appears_was_written_to_the_disk_before(tmp_path, monkeypatch):
    synced, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino))

    def checked(source, target):
        files = [p for p in (source, *pathlib.Path(source).rglob("*")) if pathlib.Path(p).is_file()]
        assert files
        assert {os.stat(p).st_ino for p in files} <= set(synced)
        replace(source, target)

    monkeypatch.setattr(os, "replace", checked)
    storage.write_text(tmp_path / "file", "text")
    assert synced[-1] == tmp_path.stat().st_ino  # the name, too
    with storage.atomic_folder(tmp_path / "folder") as new:
        (new / "below").mkdir()
        (new / "below" / "a").write_text("a")
        (new / "b").write_text("b")
    assert synced[-1] == tmp_path.stat().st_ino


class HttpError(Exception):
    """Of a driver."""

    __module__ = "gcsfs.retry"
    code = 503


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (HttpError(", 503"), "no answer: HttpError, 503"),
        (ConnectionResetError("peer"), "no answer: peer"),
        (
            ValueError('ABORTED: Opening "zarr": All 32 retry attempts failed: Unavailable [x'),
            "no answer: All 32 retry attempts failed: Unavailable",
        ),
        (ValueError("UNAVAILABLE: the server is down [x]"), "no answer: the server is down"),
        (ValueError("PERMISSION_DENIED: Forbidden"), "permission denied .*gcloud auth"),
        (ValueError("ABORTED: Generation mismatch"), ""),
        (ValueError("NOT_FOUND: no bucket there"), ""),
        (FileNotFoundError("x"), ""),
        (KeyError("x"), ""),
    ],
)
def test_what_cannot_be_reached_is_told_from_what_is_damaged(error, says):
    outer = RuntimeError("restoring failed")
    outer.__cause__ = error
    for raised in (error, outer):
        assert re.fullmatch(says + ".*" * bool(says), remote.no_answer(raised))
        expected = UnavailableError if says else type(raised)
        with (
            pytest.raises(expected, match=rf"^gs://b/run: {says}.*; go on$" if says else None),
            remote.reached("gs://b/run", "; go on"),
        ):
            raise raised
        with pytest.raises(type(raised)), remote.reached("a/folder"):
            raise raised
