"""What a run's set-up refuses, and what it may change between two starts."""

import json
import shutil

import jax
import llamas
import numpy as np
import pytest
from conftest import tiny_config

from soup_jax import soup, tree
from soup_jax.config import schema as config_lib
from soup_jax.errors import UserError
from soup_jax.specialists import open as open_lib
from soup_jax.training import build, changes
from soup_jax.training import setup as run_lib
from soup_jax.training import workdir as workdir_lib
from soup_jax.training.checkpoint import Checkpointer


def start(workdir, corpus, **fields):
    run = run_lib.setup(tiny_config(**({"corpus.dir": corpus} | fields)), workdir)
    with run.lock:  # of this start alone
        run_lib.claim_workdir(run)
    return run


def saved(workdir, corpus, step=5, **fields):
    run = start(workdir, corpus, **fields)
    with Checkpointer(workdir / "checkpoints", run.cfg) as checkpointer:
        checkpointer.save(run.init(), run.data_state(step))
    return run


def restore(run):
    with Checkpointer(run.workdir / "checkpoints") as reader:
        return run_lib.restore_or_init(run, reader)


def test_another_config_in_the_same_folder_is_refused_with_the_difference(tiny_corpus, tmp_path):
    start(tmp_path, tiny_corpus)
    text = (tmp_path / "config.json").read_text()
    for name, value in (("optimizer.learning_rate", 0.123), ("seed", 7), ("batch_size", 32)):
        with pytest.raises(UserError, match=rf"another config[\s\S]*{name}[\s\S]*{value}"):
            start(tmp_path, tiny_corpus, **{name: value})
    allowed = r"num_steps: 12 -> 3 \(with --accept_changes\)"
    with pytest.raises(UserError, match=rf"seed: 0 -> 7 \(never in [\s\S]*{allowed}"):
        start(tmp_path, tiny_corpus, seed=7, num_steps=3)
    assert (tmp_path / "config.json").read_text() == text


def test_fields_that_change_no_number_may_change(tiny_corpus, tmp_path):
    start(tmp_path, tiny_corpus)
    fields = {"log.every_steps": 3, "checkpoint.keep_latest": 1, "loader.prefetch": 2}
    start(tmp_path, tiny_corpus, **fields, **{"mesh.replica": 1})


def test_a_moved_corpus_and_names_may_change_between_starts(tiny_corpus, tmp_path):
    before = start(tmp_path / "run", tiny_corpus)
    moved = str(tmp_path / "moved")
    shutil.copytree(tiny_corpus, moved)
    fields = {"name": "other", "corpus.sources": ("elsewhere",), "corpus.num_workers": 3}
    run = start(tmp_path / "run", moved, **fields)
    assert run.fingerprint() == before.fingerprint()  # which a checkpoint compares
    assert run.corpus.path == tmp_path / "moved"
    found = dict(config_lib.flat_items(config_lib.load(tmp_path / "run" / "config.json")))
    assert found == found | fields | {"corpus.dir": moved}


def test_a_damaged_list_of_parameters_is_written_anew(tiny_corpus, tmp_path):
    start(tmp_path, tiny_corpus)
    listing = tmp_path / "parameters.txt"
    sound = listing.read_bytes()
    listing.write_bytes(b"\xff" + sound[1:])
    start(tmp_path, tiny_corpus)
    assert listing.read_bytes() == sound


def test_a_damaged_record_of_changes_stops_no_run_and_is_kept(tmp_path, caplog):
    path = tmp_path / "changes.jsonl"
    sound = '{"step": 4, "field": "num_steps", "old": 12, "new": 14}'
    for damaged in (b'{"step": 4, "fie', b'{"step": "4"}', b"\xff\xfe"):
        path.write_bytes(damaged + b"\n" + sound.encode() + b"\n")
        changes.record(tmp_path, {"optimizer.learning_rate": (0.1, 0.2)}, start=6)
        lines = path.read_text().splitlines()
        assert lines[0] == damaged.decode("utf-8", "backslashreplace")
        assert lines[1] == sound
        assert json.loads(lines[2])["field"] == "optimizer.learning_rate"
        assert "a damaged line is kept as it is" in caplog.text
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="is a folder"):
        changes.record(tmp_path, {}, start=6)


def test_a_checkpoint_of_other_data_is_refused(tiny_corpus, tmp_path):
    saved(tmp_path, tiny_corpus)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"other data[\s\S]*seed: 0 -> 3"):
        restore(start(tmp_path, tiny_corpus, seed=3))
    run = start(tmp_path / "other", tiny_corpus)
    run.home = workdir_lib.at(tmp_path)
    object.__setattr__(run.corpus, "fingerprint", "another")
    with pytest.raises(UserError, match=r"other data[\s\S]*corpus: .* -> 'another'"):
        restore(run)


def test_a_restored_plan_goes_on_as_a_fresh_one(tiny_corpus, tmp_path):
    saved(tmp_path, tiny_corpus, step=5)
    fresh, resumed = start(tmp_path, tiny_corpus), start(tmp_path, tiny_corpus)
    restore(resumed)
    for step in range(5, 40):
        a, b = vars(fresh.plan[step]), vars(resumed.plan[step])
        for name, value in a.items():
            np.testing.assert_array_equal(b[name], value, err_msg=name)


def test_a_run_that_would_not_be_started_today_goes_on(tiny_corpus, tmp_path, caplog):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"h": [1, 0, 0, 0, 0, 0], "hashes": {"corpus": "another"}}))
    fields = {
        "corpus.min_chars": 9,
        "corpus.max_chars": 8,
        "experts.rules": ((".*", "dense"), ("embedding", "none")),
        "domain_weights.sparse": 0.0,
        "domain_weights.generic": 0.0,
        "domain_weights.file": 1.0,
        "domain_weights.path": str(recipe),
    }
    cfg = tiny_config(**{"corpus.dir": tiny_corpus} | fields)
    wanted = ["must be at most corpus.max_chars", "is the recipe of", "applies to no leaf"]
    config_lib.save(cfg, tmp_path / "config.json")
    with caplog.at_level("WARNING", logger="soup_jax"):
        run = start(tmp_path, tiny_corpus, **fields)
    assert [w for w in wanted if any(w in line for line in caplog.messages)] == wanted
    with Checkpointer(tmp_path / "checkpoints", run.cfg) as checkpointer:
        checkpointer.save(run.init(), run.data_state(5))
    assert open_lib.load(tmp_path).step == 5
    weights = {name: value for name, value in fields.items() if name.startswith("domain_weights")}
    with pytest.raises(UserError, match="is the recipe of a specialist on another corpus"):
        start(tmp_path / "new", tiny_corpus, **weights)


def test_a_vocabulary_that_is_never_used_is_said(tiny_corpus, tmp_path, caplog):
    with caplog.at_level("WARNING", logger="soup_jax"):
        start(tmp_path, tiny_corpus, vocab_size=4096)
    assert "vocab_size = 4096, but the tokenizer has 400 tokens" in caplog.text


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("changes.jsonl", None, r"changes\.jsonl is a folder"),
        ("parameters.txt", None, r"parameters\.txt is a folder"),
    ],
)
def test_damaged_records_of_a_run_are_told(name, text, message, tiny_corpus, tmp_path):
    start(tmp_path, tiny_corpus)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).mkdir() if text is None else (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        run_lib.settle(start(tmp_path, tiny_corpus), 0)


def test_an_empty_folder_starts_from_the_seed(tiny_corpus, tmp_path):
    state = restore(start(tmp_path, tiny_corpus))
    assert (int(state.step), int(state.bad_step)) == (0, -1)


def test_a_run_without_experts_gives_a_soup_its_shared_parameters(tiny_corpus, tmp_path):
    generic = {"num_experts": 0, "num_mixtures": 1, "seed": 7}
    generic |= {"domain_weights.sparse": 0.0, "domain_weights.generic": 1.0}
    source = saved(tmp_path / "generic", tiny_corpus, **generic)
    place = str(tmp_path / "generic")
    run = start(tmp_path / "run", tiny_corpus, **{"checkpoint.init_from": place})
    run_lib.read_initial(run)
    state, fresh = restore(run), run.init()
    wanted = source.init().params["shared"]
    jax.tree.map(np.testing.assert_array_equal, state.params["shared"], wanted)
    assert not np.array_equal(wanted["embedding"], fresh.params["shared"]["embedding"])
    for part in ("bank", "router"):
        have, want = (tree.flatten(s.params[part]) for s in (state, fresh))
        for path in want.keys() | have.keys():
            np.testing.assert_allclose(have[path], want[path], rtol=1e-5, err_msg=path)
    (_, (_, origin)) = next(iter(run.changes.items()))
    assert (origin["run"], origin["step"]) == (place, 5)


def test_a_llama_of_transformers_is_every_specialist_at_step_0(tiny_corpus, tmp_path):
    fields = {"vocab_size": 400, "seq_len": 32}
    source = llamas.specialist(tmp_path / "source", sizes=fields)
    source.save(tmp_path / "hf", format="hf")
    model = {f"model.{name}": value for name, value in llamas.MODEL.items()}
    model |= {"checkpoint.init_from": str(tmp_path / "hf"), "experts.init_scale": 0.0}
    run = run_lib.setup(tiny_config(**{"corpus.dir": tiny_corpus} | model), tmp_path / "run")
    run_lib.read_initial(run)
    state = restore(run)
    assert state.params.keys() == {"shared", "bank", "router"}
    soup_config = build.soup_config(run.cfg)
    for h_K in np.eye(6, dtype=np.float32)[:2]:
        params, alpha_E = soup.specialist(state.params, h_K, soup_config)
        assert np.abs(alpha_E).max() > 0
        jax.tree.map(np.testing.assert_array_equal, params, source.params)
    (name, (old, new)) = next(iter(run.changes.items()))
    assert (name, old, new["model"]) == ("checkpoint.init_from", "", str(tmp_path / "hf"))
    with run.cfg.unlocked():
        run.cfg.checkpoint.init_step = 3
    with pytest.raises(UserError, match="init_step = 3 is a step of a run"):
        run_lib.read_initial(run)
