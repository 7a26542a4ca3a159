"""Sources, documents and corpora in object storage, against servers that speak its protocols.

Run where the drivers and the servers are installed: `bash launch/test.sh --servers`.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import time

import jax
import llamas
import numpy as np
import processes
import pytest
from bucket_proxy import Faults, give_up_soon, proxy
from conftest import TOPICS, tiny_config, topic_text

from soup_jax import inputs, places, remote
from soup_jax.cli import main as cli
from soup_jax.data import corpus_cache
from soup_jax.data.corpus import artefacts_of, open_corpus
from soup_jax.data.prepare import stages
from soup_jax.data.prepare.work import Part
from soup_jax.errors import UserError
from soup_jax.evaluation.sample import read_sample
from soup_jax.specialists import trained
from soup_jax.training import loop, setup, workdir
from soup_jax.training.loop import train

moto = pytest.importorskip("moto.server")
pytest.importorskip("s3fs")
gcsfs = pytest.importorskip("gcsfs")
emulator = pytest.importorskip("gcp_storage_emulator.server")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module", params=["s3", "gs"])
def bucket(request, tmp_path_factory):
    """(address of an empty bucket, its faults)."""
    patch, faults, port = pytest.MonkeyPatch(), Faults(), free_port()
    patch.setattr(remote, "PAUSE", remote.PAUSE)
    patch.setattr(gcsfs.retry, "asyncio", gcsfs.retry.asyncio)
    give_up_soon()
    # Tensorstore opens more connections at once than the five that a server of Python's lets wait.
    patch.setattr(socketserver.TCPServer, "request_queue_size", 128)
    remote._driver.cache_clear()
    if request.param == "s3":
        server = moto.ThreadedMotoServer("127.0.0.1", port)
        server.start()
    else:
        server = emulator.create_server("127.0.0.1", port, in_memory=True)
        server.start()
    front = proxy(port, faults)
    url = f"http://127.0.0.1:{front.server_port}"
    for name, value in {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "testing",
        "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")),
    }.items():
        patch.setenv(name, value)
    remote._driver(request.param).mkdir("soup")
    yield f"{request.param}://soup", faults
    front.shutdown()
    server.stop()
    remote._driver.cache_clear()
    patch.undo()
    # What takes an address for a path makes such a folder where we are.
    assert not [name for name in os.listdir() if name.endswith(":")]


def put(address: str, data: bytes) -> None:
    remote._call(address, lambda driver, path: driver.pipe_file(path, data))


def dying_put(number: int):
    """`remote.put` that is interrupted instead of writing its `number`-th object."""
    whole, calls = remote.put, []

    def put_or_die(source, target):
        calls.append(target)
        if len(calls) == number:
            raise KeyboardInterrupt
        return whole(source, target)

    return put_or_die


def lines(texts) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.fixture(scope="module")
def sources(bucket):
    """The address of a folder of sources, and the texts in them."""
    address, _ = bucket
    texts = [topic_text(topic, seed) for seed in range(40) for topic in TOPICS]
    put(f"{address}/text/a.jsonl", lines(texts[:70]))
    put(f"{address}/text/below/b.jsonl", lines(texts[70:]))
    put(f"{address}/text/below/.hidden.jsonl", lines(["hidden"]))
    put(f"{address}/text/below/picture.png", b"?")
    return f"{address}/text", texts


def config(sources: str, directory, **changes):
    return tiny_config(
        **{"corpus.sources": (sources,), "corpus.dir": str(directory), "num_steps": 4} | changes
    )


def test_objects_are_found_and_read_at_any_place(bucket, sources):
    address, _ = bucket
    data = np.random.default_rng(0).bytes(3 * remote.BLOCK_BYTES + 17)
    put(f"{address}/large.bin", data)
    with inputs.open_file(f"{address}/large.bin") as f:
        assert f.read() == data
        for at in (0, remote.BLOCK_BYTES - 5, 3 * remote.BLOCK_BYTES + 10):
            f.seek(at)
            assert f.read(11) == data[at : at + 11]
        f.seek(-4, os.SEEK_END)
        assert f.read() == data[-4:]
    names = [found.address.rpartition("/")[2] for found in remote.find(sources[0])]
    assert names == ["a.jsonl", ".hidden.jsonl", "b.jsonl", "picture.png"]
    assert [f.size for f in remote.find(f"{sources[0]}/*.jsonl")] == [len(lines(sources[1][:70]))]
    # A folder that a glob matches is all that is in it, as on a disk.
    assert len(remote.find(f"{sources[0]}/*")) == len(remote.find(f"{sources[0]}/**")) == 4
    assert remote.find(f"{sources[0]}/nothing") == []
    with pytest.raises(UserError, match=r"/nothing.json does not exist"):
        inputs.read_text(f"{address}/nothing.json")


@pytest.mark.parametrize(("kind", "number"), [("503", 4), ("cut", 3)])
def test_what_fails_for_the_moment_is_tried_again(bucket, sources, kind, number):
    _, faults = bucket
    with faults.of(kind, number):
        assert inputs.read_text(f"{sources[0]}/a.jsonl").encode() == lines(sources[1][:70])
        assert faults.left == 0


def test_a_connection_that_falls_silent_is_tried_again(bucket, sources, monkeypatch):
    import s3fs

    _, faults = bucket
    monkeypatch.setattr(remote, "SILENCE", 0.3)
    monkeypatch.setattr(s3fs.S3FileSystem, "read_timeout", 0.3)
    remote._driver.cache_clear()
    with faults.of("stall", 2):
        assert inputs.read_text(f"{sources[0]}/a.jsonl").encode() == lines(sources[1][:70])
        assert faults.left == 0
    assert not faults.stalled
    remote._driver.cache_clear()


def test_a_server_that_never_answers_is_one_sentence(bucket, sources, monkeypatch):
    _, faults = bucket
    monkeypatch.setattr(remote, "ATTEMPTS", 1)
    with faults.of("503", 10_000), pytest.raises(UserError, match=r"a.jsonl: no answer after 1"):
        inputs.read_text(f"{sources[0]}/a.jsonl")


def test_an_outage_is_no_property_of_a_source(bucket, sources, tmp_path, monkeypatch):
    _, faults = bucket
    monkeypatch.setattr(remote, "ATTEMPTS", 1)
    original = stages._hash

    def outage(work):
        original(work)
        faults.kind, faults.left = "503", 10_000

    with monkeypatch.context() as patch, faults.of("", 0):
        patch.setattr(stages, "_hash", outage)
        with pytest.raises(UserError, match="no answer"):
            stages.prepare(config(sources[0], tmp_path / "corpus"))
    made = stages.prepare(config(sources[0], tmp_path / "corpus"))
    assert made.manifest["counts"]["documents"] == len(sources[1])
    assert made.manifest["counts"]["damaged"] == 0
    assert all(source["sha256"] for source in made.manifest["request"]["sources"])


def test_documents_of_a_specialist_lie_there_too(bucket, sources):
    sample = read_sample([f"{sources[0]}/**/b.jsonl"], text_field="text")
    assert [d.text for d in sample.documents] == sources[1][70:]


def test_a_corpus_is_prepared_there_and_trained_on(bucket, sources, tmp_path, capsys):
    address, faults = bucket
    local = stages.prepare(config(sources[0], tmp_path / "local"))
    place = f"{address}/corpora/tiny"
    with faults.of("503", 3):
        made = stages.prepare(config(sources[0], place))
    assert made.fingerprint == local.fingerprint
    names = {f.address.removeprefix(f"{place}/") for f in remote.find(place)}
    assert names == {"manifest.json", *artefacts_of(local.manifest)}
    capsys.readouterr()
    assert stages.prepare(config(sources[0], place)).fingerprint == local.fingerprint
    assert f"{place} is already prepared" in capsys.readouterr().err
    with pytest.raises(UserError, match=rf"{place} was prepared from other settings .*seq_len"):
        stages.prepare(config(sources[0], place, seq_len=16))
    # On another machine: only what is read is copied.
    cache = str(tmp_path / "cache")
    opened = open_corpus(place, cache_dir=cache)
    folder = corpus_cache.folder_of(place, cache)
    assert not (folder / "windows").exists()
    rows = np.arange(5)
    expected = local.read_windows("train", rows)
    np.testing.assert_array_equal(opened.read_windows("train", rows), expected)
    assert [p.name for p in (folder / "windows").glob("[!.]*")] == [
        file["name"] for file in local.manifest["window_files"]["train"]
    ]
    seen = faults.seen
    np.testing.assert_array_equal(opened.read_windows("train", rows), expected)
    assert faults.seen == seen
    opened.verify()
    assert opened.summary()[1:] == local.summary()[1:]
    assert len(opened.source("validation")) == local.offsets["validation"][-1]
    train(config(sources[0], place, **{"corpus.cache_dir": cache}), tmp_path / "run")


def test_every_command_keeps_its_copies_where_the_variable_says(
    bucket, sources, tmp_path, monkeypatch, capsys, tiny_text
):
    address, _ = bucket
    place, home = f"{address}/corpora/copies", tmp_path / "home"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    monkeypatch.setenv("SOUP_JAX_CACHE_DIR", str(tmp_path / "copies"))
    cfg = config(sources[0], place)
    stages.prepare(cfg)
    name = corpus_cache.folder_of(place).name
    for number, command in enumerate(
        (
            ["domains", f"--corpus={place}"],
            ["histogram", f"--documents={tiny_text / 'cooking.jsonl'}", f"--corpus={place}"],
            ["verify", place],
        )
    ):
        copies = tmp_path / f"copies{number}"
        monkeypatch.setenv("SOUP_JAX_CACHE_DIR", str(copies))
        ran(capsys, *command)
        assert (copies / "corpora" / name / "offsets.safetensors").exists()
    source = llamas.specialist(tmp_path / "source", sizes={"vocab_size": 400, "seq_len": 32})
    source.save(f"{address}/made/copied")
    assert places.local(f"{address}/made/copied").parent == copies / "folders"
    # A run's own folder of copies may be one of another machine.
    cfg.corpus.cache_dir = "/nowhere/copies"
    assert trained.open_corpus_of(place, tmp_path, None, cfg).path == copies / "corpora" / name
    cfg.corpus.cache_dir = str(tmp_path / "training")
    pathlib.Path(cfg.corpus.cache_dir).mkdir()
    opened = trained.open_corpus_of(place, tmp_path, None, cfg)
    assert opened.path == tmp_path / "training" / name
    monkeypatch.setenv("SOUP_JAX_CACHE_DIR", f"{address}/copies")
    assert "SOUP_JAX_CACHE_DIR=" in ran(capsys, "verify", place, status=2)
    assert not (home / "soup_jax" / "corpora").exists()
    assert not (home / "soup_jax" / "folders").exists()


def test_a_damaged_copy_is_refused_and_another_corpus_replaces_it(bucket, sources, tmp_path):
    address, _ = bucket
    place, cache = f"{address}/corpora/other", str(tmp_path / "cache")
    stages.prepare(config(sources[0], place))
    opened = open_corpus(place, cache_dir=cache)
    file = opened.manifest["window_files"]["train"][0]["name"]
    good = inputs.open_file(f"{place}/windows/{file}").read()
    put(f"{place}/windows/{file}", good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(UserError, match=rf"windows/{file} is not what its manifest says"):
        opened.read_windows("train", [0])
    put(f"{place}/windows/{file}", good)
    before = open_corpus(place, cache_dir=cache).read_windows("train", [0])
    for found in remote.find(place):
        remote.remove(found.address)
    with pytest.raises(UserError, match=r"is not a prepared corpus"):
        open_corpus(place, cache_dir=cache)
    stages.prepare(config(sources[0], place, seq_len=16, **{"corpus.cache_dir": cache}))
    after = open_corpus(place, cache_dir=cache).read_windows("train", [0])
    assert (before.shape[1], after.shape[1]) == (33, 17)


@pytest.mark.parametrize("stage", ["_encode", "_publish"])
def test_a_kill_changes_nothing(bucket, sources, tmp_path, monkeypatch, stage):
    address, _ = bucket
    place = f"{address}/corpora/killed{stage}"
    original = getattr(stages, stage)

    def die(work):
        original(work)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages, stage, die)
        with pytest.raises(KeyboardInterrupt):
            stages.prepare(config(sources[0], place))
    with monkeypatch.context() as patch:
        patch.setattr(remote, "put", dying_put(4))
        with pytest.raises(KeyboardInterrupt):
            stages.prepare(config(sources[0], place))
    with pytest.raises(UserError, match="is not a prepared corpus"):
        open_corpus(place, cache_dir=str(tmp_path))
    if stage == "_publish":  # other settings: nothing of what was copied may stay
        shutil.rmtree(corpus_cache.folder_of(place))
        made = stages.prepare(config(sources[0], place, **{"embed.max_chars": 200}))
    else:
        made = stages.prepare(config(sources[0], place))
    made.verify()
    open_corpus(place, cache_dir=str(tmp_path)).verify()


def test_soups_and_specialists_live_there(
    bucket, tiny_run, tiny_text, tmp_path, monkeypatch, capsys
):
    address, _ = bucket
    soup, made, documents = f"{address}/soups/a", f"{address}/made/a", tiny_text / "cooking.jsonl"

    def ran(*arguments: str) -> str:
        assert cli.run(list(arguments)) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    ran("pack", f"--run={tiny_run}", f"--out={soup}")
    assert not remote.find(f"{soup}/.soup_jax-uploading")
    for out in (made, str(tmp_path / "made")):
        ran("instantiate", f"--run={soup}", f"--documents={documents}", f"--out={out}")
    here = {p.name: p.read_bytes() for p in (tmp_path / "made").iterdir()}
    there = {f.address.rpartition("/")[2]: inputs.open_file(f.address) for f in remote.find(made)}
    assert {name: f.read() for name, f in there.items()} == here
    prompt = ("--prompt=butter", "--max_tokens=5")
    generated = ran("generate", f"--model={made}", *prompt)
    assert generated == ran("generate", f"--model={tmp_path / 'made'}", *prompt)
    assert "soup folder of step" in ran("verify", soup)
    assert "specialist of step" in ran("verify", made)
    ran("export", f"--model={made}", "--format=hf", f"--out={address}/made/hf")
    assert f"{address}/made/hf/config.json" in {
        f.address for f in remote.find(f"{address}/made/hf")
    }
    # Over itself: killed, it is refused as it lies there, and the same command makes it whole.
    again = ["instantiate", f"--run={soup}", f"--documents={documents}", f"--out={made}"]
    with monkeypatch.context() as patch:
        patch.setattr(remote, "put", dying_put(3))
        assert cli.run(again) == 130
    assert cli.run(["generate", f"--model={made}", *prompt]) == 2
    assert "not all of it was copied there" in capsys.readouterr().err
    ran(*again)
    assert ran("generate", f"--model={made}", *prompt) == generated
    # What is not ours is not replaced; a run is no soup folder.
    put(f"{address}/thesis/text.txt", b"precious")
    again[-1] = f"--out={address}/thesis"
    assert cli.run(again) == 2
    assert "/thesis exists and is not a specialist" in capsys.readouterr().err
    put(f"{address}/run/config.json", b"{}")
    assert cli.run(["generate", f"--model={address}/run", *prompt]) == 2
    assert "not all of it was copied there" in capsys.readouterr().err


def test_a_soup_starts_from_a_model_of_transformers_there(bucket, tiny_corpus, tmp_path):
    address, _ = bucket
    source = llamas.specialist(tmp_path / "source", sizes={"vocab_size": 400, "seq_len": 32})
    source.save(tmp_path / "hf", format="hf")
    place = f"{address}/models/llama"
    for path in (tmp_path / "hf").iterdir():
        if path.name != "recipe.json":  # by which a folder of ours is known
            put(f"{place}/{path.name}", path.read_bytes())
    put(f"{place}/pytorch_model.bin", b"the same in another format")
    put(f"{place}/original/params.json", b"{}")
    fields = {f"model.{name}": value for name, value in llamas.MODEL.items()}
    fields |= {"corpus.dir": str(tiny_corpus), "checkpoint.init_from": place}
    run = setup.setup(tiny_config(**fields), tmp_path / "run")
    with run.lock:
        setup.read_initial(run)
    jax.tree.map(np.testing.assert_array_equal, run.initial["shared"], source.params)
    _, origin = run.changes["checkpoint.init_from"]
    assert origin["model"] == place
    copied = {path.name for path in places.local(place, models=True).iterdir()}
    assert "model.safetensors" in copied
    assert not {"pytorch_model.bin", "original"} & copied
    fields["checkpoint.init_from"] = f"{address}/models/none"
    run = setup.setup(tiny_config(**fields), tmp_path / "other")
    with run.lock, pytest.raises(UserError, match=r"models/none holds neither .* config\.json"):
        setup.read_initial(run)
    with pytest.raises(UserError, match="holds neither"):  # no command but train takes one
        places.local(place)


@pytest.fixture
def gs(bucket):
    """(address, faults) of the bucket that orbax can write to."""
    if not bucket[0].startswith("gs:"):
        pytest.skip("orbax writes gs:// only")
    return bucket


def ran(capsys, *arguments: str, status: int = 0) -> str:
    assert cli.run(list(arguments)) == status, capsys.readouterr().err
    shown = capsys.readouterr()
    return shown.err if status else shown.out


def metrics_of(run: str) -> list[dict]:
    rows = [json.loads(line) for line in inputs.read_text(f"{run}/metrics.jsonl").splitlines()]
    kept = ("step", "kind", "loss", "batch_hash", "average")
    return [{name: row[name] for name in kept if name in row} for row in rows]


def test_a_run_lies_there_killed_and_resumed(gs, sources, tiny_text, tmp_path, capsys, monkeypatch):
    address, faults = gs
    corpus, documents = f"{address}/corpora/run", str(tiny_text / "*.jsonl")
    stages.prepare(config(sources[0], corpus))
    fields = {
        "num_steps": 6,
        "checkpoint.every_steps": 2,
        "log.every_steps": 1,
        "log.trackers": ("tensorboard",),
        "evaluate.every_steps": 3,
        "evaluate.specialists": (documents,),
        "corpus.cache_dir": str(tmp_path / "cache"),
    }
    cfg, run, local = config(sources[0], corpus, **fields), f"{address}/runs/a", tmp_path / "local"
    train(cfg, local)
    # Killed in the middle: between two saves, with lines that no save has.
    original = workdir._Bucket.publish
    calls: list[int] = []

    def die(self):
        calls.append(1)
        if len(calls) == 4:  # those of the claim, of its settling, of step 2
            raise KeyboardInterrupt
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(workdir._Bucket, "publish", die)
        with pytest.raises(KeyboardInterrupt):
            train(cfg, run)
    with faults.of("503", 3):
        train(cfg, run)
    assert metrics_of(run) == metrics_of(str(local))
    names = {f.address.removeprefix(f"{run}/") for f in remote.find(run)}
    assert {"config.json", "metrics.jsonl", "parameters.txt", "domains/map.json"} <= names
    assert ".claim" not in names
    assert any(name.startswith("tensorboard/") for name in names)
    for name in ("config.json", "parameters.txt"):
        assert inputs.open_file(f"{run}/{name}").read() == (local / name).read_bytes()
    # All that reads a run reads it there.
    tables = []
    capsys.readouterr()
    for place in (run, str(local)):
        evaluated = ran(capsys, "evaluate", f"--workdir={place}", f"--specialists={documents}")
        tables.append(evaluated.partition("numbers:")[0])
        assert f"numbers: {place}/evaluation.json" in evaluated
        assert f"learning curve: {place}/learning_curve.png" in evaluated
    assert tables[0] == tables[1]
    lines = ran(capsys, "verify", run)
    assert f"{run}/checkpoints/6: " in lines
    assert "2 checkpoints" in lines
    sample = f"--documents={tiny_text / 'cooking.jsonl'}"
    for place, out in ((run, "there"), (str(local), "here")):
        ran(capsys, "instantiate", f"--run={place}", sample, f"--out={tmp_path / out}")
    weights = [tmp_path / out / "params.safetensors" for out in ("there", "here")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    recipe = json.loads((tmp_path / "there" / "recipe.json").read_text())
    assert recipe["run"] == run
    ran(capsys, "pack", f"--run={run}", f"--out={address}/soups/of_run")
    # A new run starts from it.
    train(config(sources[0], corpus, **{**fields, "checkpoint.init_from": run}), tmp_path / "next")
    # A newest checkpoint that cannot be read is set aside, and the run goes on from the one before.
    for found in remote.find(f"{run}/checkpoints/6/params"):
        if "/d/" in found.address:
            remote.remove(found.address)
    train(cfg, run)
    assert metrics_of(run) == metrics_of(str(local))
    assert remote.find(f"{run}/checkpoints/unreadable_6")


def test_nothing_of_a_run_stays_here(gs, sources, tmp_path, monkeypatch):
    address, _ = gs
    corpus, run = f"{address}/corpora/tidy", f"{address}/runs/tidy"
    stages.prepare(config(sources[0], corpus))
    cfg = config(sources[0], corpus, **{"corpus.cache_dir": str(tmp_path / "cache")})
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    kept = []  # the objects themselves live on

    def failing(error):
        def claim(run, **_):
            kept.append(run)
            assert run.workdir.parent == temporary
            assert run.workdir.is_dir()
            raise error

        return claim

    for error in (UserError("no"), KeyboardInterrupt()):
        with monkeypatch.context() as patch:
            patch.setattr(loop, "claim_workdir", failing(error))
            with pytest.raises(type(error)):
                train(cfg, run)
        assert not list(temporary.iterdir())
    at = workdir.at
    monkeypatch.setattr(workdir, "at", lambda place: kept.append(at(place)) or kept[-1])
    with pytest.raises(UserError, match="is not a prepared corpus"):
        train(config(sources[0], f"{address}/nothing"), run)
    assert not list(temporary.iterdir())
    with pytest.raises(UserError, match=r"no such bucket|there is no bucket"):
        train(cfg, "gs://nobody/run")
    assert not list(temporary.iterdir())
    train(cfg, run)
    assert kept[-1].place == run
    assert not list(temporary.iterdir())


def test_a_run_that_was_taken_over_saves_nothing_more(gs, sources, tmp_path, monkeypatch):
    address, _ = gs
    corpus, run = f"{address}/corpora/taken", f"{address}/runs/taken"
    stages.prepare(config(sources[0], corpus))
    cache = str(tmp_path / "cache")
    fields = {"num_steps": 4, "checkpoint.every_steps": 2, "corpus.cache_dir": cache}
    cfg, original = config(sources[0], corpus, **fields), workdir._Bucket.publish
    calls: list[int] = []
    other = {"host": "elsewhere", "pid": 7, "since": "noon"}

    def other_start(self):
        calls.append(1)
        if len(calls) == 4:  # at the save of step 4
            put(f"{run}/.claim", json.dumps(other).encode())
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(workdir._Bucket, "publish", other_start)
        with pytest.raises(UserError, match="process 7 on elsewhere"):
            train(cfg, run)
    assert remote.find(f"{run}/checkpoints/2")
    assert not remote.find(f"{run}/checkpoints/4")
    assert remote.stat(f"{run}/.claim")  # not ours: it stays
    train(cfg, run)
    assert remote.find(f"{run}/checkpoints/4")


@pytest.mark.parametrize(
    ("claim", "says"),
    [
        (b"no json", "is not valid JSON"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"[1]", "it is a list, expected an object"),
        (b'{"host": "h", "pid": "7", "since": "noon"}', "pid is a text"),
        (b'{"pid": 7}', "host is missing"),
        (b'{"host": "h", "pid": 7, "since": "noon"}', "process 7 on h, since noon"),
        (None, r"\(ended\)"),
    ],
)
def test_a_claim_that_is_not_ours_ends_the_run_whatever_it_holds(gs, claim, says):
    address, _ = gs
    place = f"{address}/runs/claims"
    for _ in range(2):  # a start takes over whatever is there
        home = workdir.at(place)
        with contextlib.closing(home), home.claimed(0):
            home.publish()
            if claim is None:
                remote.remove(f"{place}/.claim")
            else:
                put(f"{place}/.claim", claim)
            with pytest.raises(UserError, match=rf"{place}.*{says}") as caught:
                home.publish()
            assert "saves nothing more" in str(caught.value)
        assert bool(remote.stat(f"{place}/.claim")) == (claim is not None)


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """An empty folder, which we are in, and one for temporary files; both stay empty."""
    folders = [tmp_path / "empty", tmp_path / "temporary"]
    for folder in folders:
        folder.mkdir()
    monkeypatch.chdir(folders[0])
    monkeypatch.setenv("TMPDIR", str(folders[1]))
    monkeypatch.setenv("SOUP_JAX_CACHE_DIR", str(tmp_path / "copies"))
    yield
    assert [list(folder.iterdir()) for folder in folders] == [[], []]


def command(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "soup_jax.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def joined(*arguments, **trouble) -> tuple[list[int], str]:
    """(statuses, all that the processes said)."""
    with processes.start(*arguments, **trouble) as running:
        statuses, said = running.join(300)
    return statuses, "\n".join(said)


@pytest.mark.slow
def test_all_of_it_by_command_line_from_an_empty_folder(gs, sources, tiny_text, tmp_path, empty):
    address, _ = gs
    place = f"{address}/all"
    run, made, documents = f"{place}/run", f"{place}/made", f"{place}/documents"
    for name in ("cooking", "python"):
        put(f"{documents}/{name}.jsonl", (tiny_text / f"{name}.jsonl").read_bytes())
    fields = {"num_steps": 8, "checkpoint.every_steps": 2, "log.every_steps": 1}
    cfg = processes.write_config(tmp_path, config(sources[0], f"{place}/corpus", **fields))
    command("prepare", f"--config={cfg}")
    statuses, said = joined(cfg, run, 1, process="0", what="SIGKILL", step=5)
    assert statuses == [-signal.SIGKILL], said
    assert remote.stat(f"{run}/.claim")
    statuses, said = joined(cfg, run, 1)
    assert statuses == [0], said
    assert re.search(r"starting at step [24]\b", said), said
    statuses, said = joined(cfg, f"{place}/never_killed", 1)
    assert statuses == [0], said
    assert metrics_of(run) == metrics_of(f"{place}/never_killed")
    said = command("evaluate", f"--workdir={run}", f"--specialists={documents}/*.jsonl")
    assert f"numbers: {run}/evaluation.json" in said
    sample = f"--documents={documents}/cooking.jsonl"
    command("instantiate", f"--run={run}", sample, f"--out={made}")
    assert command("generate", f"--model={made}", "--prompt=butter", "--max_tokens=5")
    for what in (f"{place}/corpus", run, made):
        command("verify", what)


@pytest.mark.slow
def test_several_processes_of_a_run_there(gs, sources, tmp_path, empty, monkeypatch):
    address, _ = gs
    place = f"{address}/several"
    fields = {"num_steps": 8, "checkpoint.every_steps": 2, "log.every_steps": 1}
    made = config(sources[0], f"{place}/corpus", **fields)
    stages.prepare(made)
    cfg, run = processes.write_config(tmp_path, made), f"{place}/run"
    monkeypatch.setenv("SOUP_JAX_SECRET", "known to all processes of it")
    statuses, said = joined(cfg, run, 2, process="1", what="SIGKILL", step=5)
    assert statuses[1] == -signal.SIGKILL, said
    assert statuses[0] > 0, said
    statuses, said = joined(cfg, run, 2)
    assert statuses == [0, 0], said
    assert re.search(r"starting at step [24]\b", said), said
    statuses, said = joined(cfg, f"{place}/never_killed", 2)
    assert statuses == [0, 0], said
    assert metrics_of(run) == metrics_of(f"{place}/never_killed")
    assert [row["step"] for row in metrics_of(run)] == list(range(1, 9))
    assert not remote.stat(f"{run}/.claim")
    # And on as one process.
    made.num_steps = 10
    cfg = processes.write_config(tmp_path, made)
    statuses, said = joined(cfg, run, 1, "--accept_changes")
    assert statuses == [0], said
    assert "starting at step 8" in said


@pytest.mark.parametrize(
    ("only", "says"),
    [
        (b"commit_success", r"runs/outage\d/checkpoints: no answer: HttpError, 503"),
        pytest.param(
            b"ocdbt",
            r"outage\d/checkpoints: no answer: All 2 retry attempts failed: Service Unavailable",
            marks=pytest.mark.slow,
        ),
        # The process ends at once, though tensorstore would try on.
        pytest.param(
            b"checkpoints/4", r"outage\d/checkpoints: no answer: .*503", marks=pytest.mark.slow
        ),
        pytest.param(b"", r"runs/outage\d/.* no answer.*503", marks=pytest.mark.slow),
    ],
)
def test_an_outage_at_a_save_is_one_sentence_and_the_run_goes_on_later(
    gs, sources, tmp_path, empty, only, says
):
    address, faults = gs
    number = len(only) % 10
    corpus, run = f"{address}/corpora/outage", f"{address}/runs/outage{number}"
    fields = {"num_steps": 6, "checkpoint.every_steps": 2, "log.every_steps": 1}
    made = config(sources[0], corpus, **fields)
    stages.prepare(made)
    cfg = processes.write_config(tmp_path, made)
    soon = f"give_up_soon(arrays={only != b'checkpoints/4'})"
    cfg.write_text(
        f"import sys\nsys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})\n"
        f"import bucket_proxy\nbucket_proxy.{soon}\n{cfg.read_text()}"
    )
    with processes.start(cfg, run, 1, slow=1.0) as running:
        end = time.monotonic() + 200
        while not remote.stat(f"{run}/checkpoints/2/commit_success.txt"):
            assert time.monotonic() < end
            assert running[0].poll() is None, running[0].communicate()
            time.sleep(0.1)
        with faults.of("503", 1_000_000, only):
            (status,), (said,) = running.join(200)
    assert status == 2, said
    (line,) = [x for x in said.splitlines() if x.startswith("soup-jax: error: ")]
    assert re.search(says, line), line
    assert "he same command goes on from" in line
    assert "Traceback" not in said
    statuses, said = joined(cfg, run, 1)
    assert statuses == [0], said
    assert "starting at step 2" in said
    assert "unreadable" not in said
    assert [row["step"] for row in metrics_of(run)] == list(range(1, 7))
    command("verify", run)


def test_an_outage_is_no_damage_of_a_checkpoint(gs, sources, tmp_path, monkeypatch):
    address, faults = gs
    corpus, run = f"{address}/corpora/readable", f"{address}/runs/readable"
    stages.prepare(config(sources[0], corpus))
    fields = {"num_steps": 4, "checkpoint.every_steps": 2}
    cfg = config(sources[0], corpus, **fields)
    train(cfg, run)
    before = {found.address for found in remote.find(f"{run}/checkpoints")}
    cfg.num_steps = 6
    newest = f"{run.removeprefix('gs://soup/')}/checkpoints/4".encode()
    with faults.of("503", 1_000_000, newest), pytest.raises(UserError, match="no answer"):
        train(cfg, run, accept_changes=True)
    assert {found.address for found in remote.find(f"{run}/checkpoints")} == before
    train(cfg, run, accept_changes=True)
    assert not remote.find(f"{run}/checkpoints/unreadable_4")


def test_where_no_run_can_lie_is_one_sentence(bucket, sources, tmp_path, capsys, monkeypatch):
    address, _ = bucket
    scheme = address.partition(":")[0]
    arguments = ["train", "--config=experiments/quickstart.py"]
    if scheme == "s3":
        message = ran(capsys, *arguments, f"--workdir={address}/run", status=2)
        assert "orbax writes no checkpoints to s3://" in message
        return
    message = ran(capsys, *arguments, "--workdir=gs://nobody/run", status=2)
    assert "there is no such bucket" in message
    message = ran(capsys, "generate", f"--model={address}/nothing", "--prompt=x", status=2)
    assert "holds neither recipe.json nor soup.json" in message
    monkeypatch.delenv("SOUP_JAX_SECRET", raising=False)
    several = ("--coordinator=127.0.0.1:1", "--num_processes=2", "--process_id=0")
    message = ran(capsys, *arguments, *several, f"--workdir={address}/run", status=2)
    assert "need SOUP_JAX_SECRET on all of them" in message


def test_what_cannot_be_is_one_sentence(bucket, sources, tmp_path):
    address, _ = bucket
    scheme = address.partition(":")[0]
    for call, message in (
        (lambda: stages.prepare(config(f"{scheme}://nobody/x", tmp_path)), "no bucket 'nobody'"),
        (lambda: stages.prepare(config(f"{address}/none", tmp_path)), "matches no file"),
        (lambda: stages.prepare(config(f"{address}/text/below/picture.png", tmp_path)), "suffix"),
        (
            lambda: stages.prepare(config(sources[0], f"{scheme}://nobody/c")),
            rf"corpus.dir={scheme}://nobody/c: there is no such bucket",
        ),
        (
            lambda: stages.prepare_part(
                config(sources[0], f"{address}/c"), Part(0, 2, merges=False)
            ),
            "shards need a disk that they share",
        ),
        (lambda: open_corpus(f"{address}/nothing"), "/nothing is not a prepared corpus"),
        (lambda: inputs.open_file("ftp://host/x"), "ftp://host/x is an address that cannot be"),
    ):
        with pytest.raises(UserError, match=message):
            call()


@pytest.mark.parametrize("status", ["401", "403"])
def test_a_denied_permission_is_one_sentence(bucket, sources, tmp_path, status):
    address, faults = bucket
    login = "aws configure" if address.startswith("s3") else "gcloud auth"
    for call in (
        lambda: inputs.read_text(f"{sources[0]}/a.jsonl"),
        lambda: stages.prepare(config(sources[0], tmp_path / "corpus")),
        lambda: open_corpus(f"{address}/nothing"),
    ):
        with faults.of(status, 10_000), pytest.raises(UserError) as found:
            call()
        assert "permission denied" in str(found.value)
        assert login in str(found.value)
        assert "\n" not in str(found.value)


def test_missing_credentials_and_drivers_are_one_sentence(tmp_path, monkeypatch, capsys):
    remote._driver.cache_clear()
    for name in [n for n in os.environ if n.startswith(("AWS_", "GOOGLE_", "STORAGE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"s3://soup/x: no credentials were found .*aws configure"):
        inputs.open_file("s3://soup/x")

    def missing(name, **_):
        raise ImportError(f"install the driver of {name}")

    monkeypatch.setattr("fsspec.filesystem", missing)
    remote._driver.cache_clear()
    arguments = ["histogram", "--documents=s3://soup/x.jsonl", "--corpus=c"]
    assert cli.run(arguments) == 2
    assert "pip install 'soup_jax[s3]'" in capsys.readouterr().err
    remote._driver.cache_clear()
