"""Bad input of every command: one sentence, status 2, before work, and nothing is made.

Cases of the schema are generated: a wrong type and a value beyond each bound of each field.
benchmarks/bad_inputs.py runs the cases as processes, and measures their memory.
"""

import json
import math
import os
import sys

import pytest
from conftest import tiny_config

from soup_jax import remote
from soup_jax.cli import main
from soup_jax.config import schema
from soup_jax.errors import UserError

QUICKSTART = "--config=experiments/quickstart.py"
SEEDS = "--sweep.seed=0,1"


def wrong_values(field):
    """Values that the field refuses: other types, no numbers, beyond its bounds, no choice."""
    kind = type(field.default)
    others = {str: 7, int: "many", float: "much", bool: "perhaps", tuple: "a"}
    yield others[kind]
    yield None
    if kind is int:
        yield 1.5
        yield True
    if kind is float:
        yield from (math.nan, math.inf, -math.inf)
    step = 1 if kind is int else 1e-6
    if field.at_least is not None:
        yield kind(field.at_least - max(step, abs(field.at_least) * step))
    if field.above is not None:
        yield kind(field.above)
    if field.at_most is not None:
        yield kind(field.at_most + max(step, abs(field.at_most) * step))
    if field.below is not None:
        yield kind(field.below)
    if field.choices:
        yield "nonsense"


CASES = [(name, v) for name, field in schema.FIELDS.items() for v in wrong_values(field)]


@pytest.mark.parametrize(
    ("name", "value"), CASES, ids=[f"{name}={value!r}" for name, value in CASES]
)
def test_every_field_refuses_what_it_cannot_be(name, value):
    cfg = tiny_config().unlock()
    section, _, field = name.rpartition(".")
    with cfg.ignore_type():
        (cfg[section] if section else cfg)[field] = value
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        schema.check(cfg)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of every wrong kind; commands run in it."""
    return make_folder(tmp_path_factory.mktemp("bad"))


RECIPE = {"alpha": [], "eos_id": 0, "h": [1], "hashes": {}, "model": {}}
RECIPE |= {"seq_len": 8, "vocab_size": 9}


def make_folder(here):
    """Write them into an empty folder."""
    (here / "syntax.py").write_text("def get_config(:\n")
    (here / "imports.py").write_text("import nothing_of_this_name\nget_config = None\n")
    (here / "raises.py").write_text("def get_config():\n    raise KeyError('gone')\n")
    (here / "none.py").write_text("def get_config():\n    return None\n")
    (here / "without.py").write_text("x = 1\n")
    base = "from soup_jax.experiments.base import get_config\n\n"
    (here / "raises_sweep.py").write_text(f"{base}def get_sweep():\n    raise KeyError('gone')\n")
    (here / "no_list.py").write_text(f"{base}def get_sweep():\n    return {{'seed': 1}}\n")
    (here / "latin.py").write_bytes(b"# caf\xe9\n")
    (here / "file").write_text("x")
    (here / "empty").mkdir()
    (here / "lines.jsonl").write_text('{"text": "x"}\n')
    os.mkfifo(here / "pipe.py")
    os.mkfifo(here / "pipe.jsonl")
    for name, files in {
        "run": {"config.json": "null"},
        "run2": {"config.json": "{"},
        "run3": {"config.json": '{"format": 99}'},
        "run4": {"config.json": '{"num_steps": "60"}'},
        "run5": {"config.json": '{"optimizer": 3}'},
        "bad_sweep": {"sweep.json": "{}"},
        "corpus": {"manifest.json": "[]"},
        "corpus2": {"manifest.json": "{}"},
        "made": {"recipe.json": "[]"},
        "made2": {"recipe.json": json.dumps({"h": "x"})},
        "made3": {"recipe.json": '{"format": 99}'},
        "made4": {"recipe.json": json.dumps(RECIPE)},
    }.items():
        (here / name).mkdir()
        for file, text in files.items():
            (here / name / file).write_text(text)
    os.mkfifo(here / "empty" / "config.json")
    os.mkfifo(here / "made4" / "params.safetensors")
    return here


COMMANDS = [
    # (arguments, what the sentence says)
    (["train", "--config=without.py", "--workdir=w"], "has no function get_config"),
    (["train", "--config=", "--workdir=w"], "--config=FILE.py is required"),
    (["train", "--config=empty", "--workdir=w"], "is no Python file"),
    (["train", "--config=lines.jsonl", "--workdir=w"], "is no Python file"),
    (["train", "--config=pipe.py", "--workdir=w"], "no regular file"),
    (["train", "--config=gone.py", "--workdir=w"], "no config file"),
    (["train", "--config=syntax.py", "--workdir=w"], "syntax.py, line 1 is not valid Python"),
    (["train", "--config=latin.py", "--workdir=w"], "not UTF-8"),
    (["train", "--config=imports.py", "--workdir=w"], "imports.py, line 1: ModuleNotFoundError"),
    (["train", "--config=raises.py", "--workdir=w"], "raises.py, line 2: KeyError: 'gone'"),
    (["train", "--config=none.py", "--workdir=w"], "returned NoneType"),
    (["train", QUICKSTART], "--workdir=DIR is required"),
    (["train", QUICKSTART, "--workdir=file"], "--workdir=file is no folder"),
    (["train", QUICKSTART, "--workdir=/dev/null"], "--workdir=/dev/null is no folder"),
    (["train", QUICKSTART, "--workdir=/proc/foo"], "--workdir=/proc/foo cannot be written"),
    (["train", QUICKSTART, "--workdir=w", "--local_device_ids=7"], "this is the only one"),
    (["train", QUICKSTART, "--workdir=w", f"--config.seed={1 << 63}"], "must be below 2^32"),
    (["train", QUICKSTART, "--workdir=a", "--workdir=b"], "--workdir is given 2 times"),
    (["train", QUICKSTART, "--workdir=w", "--num_steps=3"], "--config.num_steps="),
    (["train", QUICKSTART, "--workdir=w", "--config.no.x=3"], "unknown field no.x"),
    (
        ["train", QUICKSTART, "--workdir=w", "--config.optimizer.learning_rte=1"],
        "did you mean optimizer.learning_rate",
    ),
    (["train", QUICKSTART, "--workdir=w", "--config.seed=1", "--config.seed=2"], "2 times"),
    (["train", QUICKSTART, "--workdir=w", "more"], "unexpected arguments"),
    (["train", QUICKSTART, "--workdir=w", "--config.corpus.dir=corpus"], "no JSON object"),
    (["train", QUICKSTART, "--workdir=w", "--config.corpus.dir=corpus2"], "is missing"),
    (["train", QUICKSTART, "--workdir=w", "--config.corpus.dir=empty"], "not a prepared corpus"),
    (["train", QUICKSTART, "--workdir=w", "--config.corpus.dir=file"], "not a prepared corpus"),
    (["prepare", QUICKSTART, "--config.corpus.sources=('gone',)"], "matches no file"),
    (["prepare", QUICKSTART, "--config.corpus.sources=()"], "no sources"),
    (
        [
            "prepare",
            QUICKSTART,
            "--config.corpus.sources=('lines.jsonl',)",
            "--config.corpus.dir=file",
        ],
        "no folder",
    ),
    (
        [
            "prepare",
            QUICKSTART,
            "--config.corpus.sources=('lines.jsonl',)",
            "--config.corpus.dir=/proc/x",
        ],
        "cannot be written",
    ),
    (["plan", QUICKSTART, "--json=/proc/x.json", "--chip=H200"], "cannot be written"),
    (["plan", QUICKSTART, "--chip=nonsense"], "nonsense"),
    (["plan", QUICKSTART, "--topology=nonsense"], "nonsense"),
    (["evaluate"], "--workdir=RUN is required"),
    (["evaluate", "--workdir=gone"], "is not a run"),
    (["evaluate", "--workdir=empty"], "no regular file"),
    (["evaluate", "--workdir=run"], "holds no JSON object"),
    (["evaluate", "--workdir=run2"], "not valid JSON"),
    (["evaluate", "--workdir=run3"], "has format 99"),
    (["evaluate", "--workdir=run4"], "num_steps = '60' is a str"),
    (["evaluate", "--workdir=run5"], "optimizer"),
    (["evaluate", "--workdir=run", "--json=empty"], "--json=empty is a folder"),
    (["evaluate", "--workdir=run", "--text=/proc/x"], "--text=/proc/x cannot be written"),
    (["evaluate", "--workdir=run", "--step=many"], "step"),
    (["evaluate", "--workdir=run", "--max_windows=-1"], "max_windows"),
    (["evaluate", "--workdir=run", "--part=nonsense"], "part"),
    (["instantiate"], "--run is required"),
    (["instantiate", "--run=run", "--documents=lines.jsonl", "--out=file"], "no folder"),
    (["instantiate", "--run=run", "--documents=lines.jsonl", "--out=/proc/x"], "cannot be"),
    (["instantiate", "--run=run", "--documents=lines.jsonl", "--out=corpus"], "not a specialist"),
    (["generate", "--model=gone"], "gone"),
    (["generate", "--model=made"], "no JSON object"),
    (["generate", "--model=made2"], "is missing"),
    (["generate", "--model=made3"], "format 99"),
    (["generate", "--model=made4"], "params.safetensors is no regular file"),
    (["generate", "--model=run"], "see `soup-jax instantiate`"),
    (["generate", "--model=made", "--seed=99999999999999999999"], "seed"),
    (["generate", "--model=made", "--seed=-1"], "seed"),
    (["generate", "--model=made", "--temperature=-1"], "temperature"),
    (["generate", "--model=made", "--max_tokens=0"], "max_tokens"),
    (["generate", "--model=made", "--prompt=\udcff\udcfe"], "not UTF-8"),
    (["verify"], "name a folder"),
    (["verify", "gone"], "is no corpus, run, soup folder or specialist"),
    (["verify", "corpus2"], "is missing"),
    (["verify", "run2"], "not valid JSON"),
    (["verify", "made2"], "is missing"),
    (["verify", "run", "run2"], "unexpected arguments"),
    (["nonsense"], "unknown subcommand"),
    (["train", QUICKSTART, "--workdir=gs://b/run"], "pip install 'soup_jax[gcs]'"),
    (["train", QUICKSTART, "--workdir=s3://b/run"], "orbax writes no checkpoints to s3://"),
    (["train", QUICKSTART, "--workdir=ftp://b/run"], "--workdir=ftp://b/run is an address"),
    (
        ["train", QUICKSTART, "--workdir=w", "--config.corpus.dir=gs://b/corpus"],
        "gs:// needs another package: pip install 'soup_jax[gcs]'",
    ),
    (
        ["prepare", QUICKSTART, "--config.tokenizer.path=s3://b/t.json"],
        "s3:// needs another package: pip install 'soup_jax[s3]'",
    ),
    (
        ["prepare", QUICKSTART, "--config.corpus.sources=('s3://b/*.jsonl',)"],
        "pip install 'soup_jax[s3]'",
    ),
    (
        [
            "prepare",
            QUICKSTART,
            "--config.corpus.sources=('lines.jsonl',)",
            "--config.corpus.dir=gs://b/c",
        ],
        "pip install 'soup_jax[gcs]'",
    ),
    (["plan", QUICKSTART, "--json=https://h/x", "--chip=H200"], "--json=https://h/x is an address"),
    (["evaluate", "--workdir=gs://b/run"], "pip install 'soup_jax[gcs]'"),
    (["evaluate", "--workdir=run", "--against=gs://b/run"], "pip install 'soup_jax[gcs]'"),
    (["evaluate", "--workdir=run", "--against=s3://b/run"], "orbax writes no checkpoints to s3:"),
    (["evaluate", "--workdir=run", "--specialists=az://b/*"], "--specialists=az://b/* is an"),
    (["evaluate", "--workdir=run", "--text=s3://b/x"], "--text=s3://b/x is an address"),
    (["instantiate", "--run=gs://b/r", "--documents=d", "--out=o"], "pip install 'soup_jax[gcs]'"),
    (["instantiate", "--run=az://b/r", "--documents=d", "--out=o"], "az://b/r is an address"),
    (["instantiate", "--run=run", "--documents=https://h/d", "--out=o"], "--documents=https://h/d"),
    (["instantiate", "--run=run", "--documents=d", "--out=s3://b/o"], "soup_jax[s3]"),
    (["instantiate", "--run=run", "--documents=d", "--out=az://b/o"], "--out=az://b/o is an"),
    (
        ["instantiate", "--run=run", "--recipe=lines.jsonl", "--out=s3://b/o"],
        "mapping `specialists`",
    ),
    (["generate", "--model=hf://user/model"], "hf://user/model is an address"),
    (["verify", "gs://b/run"], "pip install 'soup_jax[gcs]'"),
    (["verify", "https://b/run"], "https://b/run is an address"),
    (["pack"], "--run"),
    (["pack", "--run=gone", "--out=o"], "is not a run"),
    (["pack", "--run=run", "--out=file"], "no folder"),
    (["pack", "--run=run", "--out=corpus"], "is no soup folder"),
    (["export", "--format=hf", "--out=o"], "--model=DIR is required"),
    (["export", "--model=gone", "--format=hf", "--out=o"], "is not a specialist"),
    (["export", "--model=made", "--format=onnx", "--out=o"], "onnx"),
    (["instantiate", "--run=run", "--recipe=gone.yaml", "--out=o"], "gone.yaml does not exist"),
    (["instantiate", "--run=run", "--recipe=pipe.py", "--out=o"], "no regular file"),
    (["instantiate", "--run=run", "--recipe=latin.py", "--out=o"], "not UTF-8"),
    (["instantiate", "--run=run", "--recipe=lines.jsonl", "--out=o"], "mapping `specialists`"),
    (["instantiate", "--run=r", "--recipe=x", "--documents=d", "--out=o"], "leave out the other"),
    (["instantiate", "--run=r", "--documents=d", "--out=o", "--method=magic"], "method"),
    (["generate", "--model=made", "--prompt=a", "--prompts=lines.jsonl"], "one is meant"),
    (["generate", "--model=made", "--prompts=gone.jsonl"], "matches no file"),
    (["generate", "--model=made", "--stop=\udcff"], "--stop is not UTF-8"),
    (["score"], "are required"),
    (["score", "--model=made", "--documents=gone.jsonl"], "matches no file"),
    (["score", "--model=gone", "--documents=lines.jsonl"], "is not a specialist"),
    (["score", "--model=a", "--model=a", "--documents=d"], "not all different"),
    (["score", "--model=made", "--documents=d", "--json=/proc/x"], "cannot be written"),
    (["score", "--model=hf://user/m", "--documents=d"], "hf://user/m is an address"),
    (["finetune"], "--documents is required"),
    (["finetune", "--documents=d", "--out=o"], "and not both"),
    (["finetune", "--model=made", "--documents=d", "--out=file"], "no folder"),
    (["finetune", "--model=made", "--documents=lines.jsonl", "--out=corpus"], "not a specialist"),
    (["finetune", "--model=made", "--documents=d", "--out=o", "--rank=-1"], "rank"),
    (["finetune", "--model=made", "--documents=d", "--out=o", f"--seed={1 << 63}"], "seed"),
    (["finetune", "--model=made", "--documents=s3://b/d", "--out=o"], "pip install 'soup_jax[s3]'"),
    (["finetune", "--model=made", "--documents=az://b/d", "--out=o"], "az://b/d is an address"),
    (["domains"], "--corpus=DIR"),
    (["domains", "--corpus=gone"], "gone is not a prepared corpus"),
    (["domains", "--corpus=corpus", "--picture=x.jpeg"], "must end in .png"),
    (["domains", "--corpus=corpus", "--num_domains=999"], "manifest.json holds no JSON object"),
    (["report"], "give the runs"),
    (["report", "gone"], "gone does not exist"),
    (["report", "lines.jsonl"], "is a file"),
    (["report", "corpus"], "is not a run, and none lies below it"),
    (["report", "run", "--out=run"], "--out=run is a folder"),
    (["report", "run", "--run=run"], "unexpected arguments"),
    (["report", "https://b/run"], "https://b/run is an address"),
    (["histogram"], "--documents is required"),
    (["histogram", "--documents=gone.jsonl", "--corpus=corpus"], "matches no file"),
    (["histogram", "--documents=lines.jsonl", "--run=gone"], "is not a run"),
    (["mix"], "--run is required"),
    (["mix", "--run=run", "--out=o"], "--target is required"),
    (["mix", "--run=run", "--target=d"], "--out is required"),
    (["mix", "--run=gone", "--target=d", "--out=o"], "gone is not a run"),
    (["mix", "--run=run", "--target=d", "--out=empty"], "--out=empty is a folder"),
    (["mix", "--run=run", "--target=d", "--out=/proc/x"], "--out=/proc/x cannot be written"),
    (["mix", "--run=run", "--target=d", "--out=s3://b/o"], "--out=s3://b/o is an address"),
    (["mix", "--run=run", "--target=az://b/d", "--out=o"], "--target=az://b/d is an address"),
    (["mix", "--run=r", "--target=d", "--out=o", "--generic_within=-0.1"], "number of at least 0"),
    (["mix", "--run=r", "--target=d", "--out=o", "--generic_within=nan"], "number of at least 0"),
    (["mix", "--run=r", "--target=d", "--out=o", "--most=-1"], "most"),
    (["prepare", QUICKSTART, "--shard=4/4"], "--shard=4/4 must be i/n"),
    (["prepare", QUICKSTART, "--merge", "--beam=x"], "do not go together"),
    (["prepare", QUICKSTART, "--config.corpus.near_duplicates=2.0"], "near_duplicates"),
    (["prepare", QUICKSTART, "--config.corpus.levels=(9,3)"], "ascending numbers of domains"),
    (["sweep"], "--workdir=DIR is required"),
    (["sweep", "--workdir=w"], "--config=FILE.py is required"),
    (["sweep", QUICKSTART, "--workdir=w"], "nothing is swept: give --sweep.FIELD="),
    (["sweep", QUICKSTART, "--workdir=file", SEEDS], "--workdir=file is no folder"),
    (["sweep", QUICKSTART, "--workdir=gs://b/s", SEEDS], "--workdir=gs://b/s is an address"),
    (["sweep", QUICKSTART, "--workdir=w", "--sweep.seed="], "must be one or more values"),
    (["sweep", QUICKSTART, "--workdir=w", "--sweep.sed=1"], "unknown field sed (did you mean seed"),
    (["sweep", QUICKSTART, "--workdir=w", SEEDS, SEEDS], "--sweep.seed is given 2 times"),
    (["sweep", QUICKSTART, "--workdir=w", SEEDS, "--config.seed=1"], "leave one of them out"),
    (["sweep", QUICKSTART, "--workdir=w", "--sweep.seed=1,1"], "the same config as point 1"),
    (["sweep", QUICKSTART, "--workdir=w", "--sweep.seed=1,-1"], "seed = -1 must be"),
    (["sweep", QUICKSTART, "--workdir=w", SEEDS, "--shard=2/2"], "--shard=2/2 must be i/n"),
    (["sweep", QUICKSTART, "--workdir=w", SEEDS, "--jobs=-1"], "jobs"),
    (["sweep", QUICKSTART, "--workdir=w", SEEDS, "--metric=luck"], "metric"),
    (["sweep", QUICKSTART, "--workdir=w", SEEDS, "--evaluate"], "has no evaluate.specialists"),
    (["sweep", QUICKSTART, "--workdir=w", SEEDS, "--metric=shared"], "has no evaluate.specialists"),
    (
        [
            *("sweep", QUICKSTART, "--workdir=w", SEEDS, "--metric=validation"),
            "--config.evaluate.every_steps=0",
        ],
        "seed=0 is never evaluated",
    ),
    (["sweep", QUICKSTART, "--workdir=w", SEEDS, "--config.corpus.dir=empty"], "not a prepared"),
    (["sweep", "--config=raises_sweep.py", "--workdir=w"], "raises_sweep.py, line 4: KeyError"),
    (["sweep", "--config=no_list.py", "--workdir=w"], "must return a list of overrides"),
    (["sweep", "--workdir=run", "--table"], "run is no sweep"),
    (["sweep", "--workdir=bad_sweep", "--table"], "sweep.json is damaged"),
    (["serve"], "--run=RUN is required"),
    (["serve", "--run=gone"], "is not a run"),
    (["serve", "--run=run", "--host=0.0.0.0"], "opens the server to other machines"),
    (["serve", "--run=run", "--port=70000"], "port"),
    (["serve", "--run=run", "--rows=0"], "rows"),
    (["serve", "--run=run", "--token_file=gone"], "gone does not exist"),
    (["serve", "--run=gs://b/run"], "pip install 'soup_jax[gcs]'"),
]


@pytest.mark.parametrize(("arguments", "says"), COMMANDS, ids=[" ".join(a) for a, _ in COMMANDS])
def test_every_command_refuses_in_one_sentence(arguments, says, folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    # Whatever drivers are installed here: the cases are those of a user without.
    monkeypatch.setitem(sys.modules, "fsspec", None)
    remote._driver.cache_clear()
    before = sorted(folder.rglob("*"))
    assert main.run(arguments) == 2
    error = capfd.readouterr().err
    (line,) = [x for x in error.splitlines() if x.startswith("soup-jax: error: ")]
    assert says in line
    assert "Traceback" not in error
    assert sorted(p for p in folder.rglob("*") if "__pycache__" not in str(p)) == before
