"""The soup folder, and specialists merged from what lies on disk."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from soup_jax import tree
from soup_jax.cli.main import run as command
from soup_jax.errors import UserError
from soup_jax.specialists import folder, stored
from soup_jax.specialists import open as open_lib
from soup_jax.specialists.instantiate import instantiate_to
from soup_jax.specialists.pack import pack
from soup_jax.specialists.verify import verify


@pytest.fixture(scope="module")
def packed(tiny_run, tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("packed") / "soup"
    pack(tiny_run, out)
    return out


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(stored, "BLOCK_BYTES", 1)


def parameters(specialist):
    return tree.flatten(specialist.params)


def assert_close(a, b, tolerance):
    a, b = parameters(a), parameters(b)
    assert a.keys() == b.keys()
    for path, x in a.items():
        assert x.dtype == b[path].dtype
        np.testing.assert_allclose(x, b[path], atol=tolerance, err_msg=path)


def h(soup, *domains):
    return np.eye(soup.num_domains)[list(domains)]


def test_merged_from_a_checkpoint_a_folder_and_the_devices_it_is_one_model(tiny_run, packed):
    run, folder_ = open_lib.load(tiny_run), open_lib.load(packed)
    assert (folder_.step, folder_.domains, folder_.config) == (run.step, run.domains, run.config)
    weights = h(run, 0, 3, 5)
    streamed = run.at_each(weights)
    assert len({parameters(s)["embedding"].tobytes() for s in streamed}) == 3
    for a, b in zip(streamed, folder_.at_each(weights)):
        np.testing.assert_array_equal(a.alpha_E, b.alpha_E)
        assert_close(a, b, 0)
    assert jax.tree.leaves(run.params)  # on the devices from now on
    for a, b in zip(streamed, run.at_each(weights)):
        assert_close(a, b, 1e-6)
    assert jax.tree.leaves(folder_.params)
    assert_close(folder_.at(weights[1]), streamed[1], 1e-6)


def test_blocks_of_one_expert_give_the_same(tiny_run, packed, small_blocks):
    run, folder_ = open_lib.load(tiny_run), open_lib.load(packed)
    assert len(list(stored.blocks(folder_.arrays, ["bank/dense/embedding"]))) == run.num_experts
    (weights,) = h(run, 2)
    made = folder_.at(weights)
    assert_close(made, run.at(weights), 1e-6)
    assert run.params
    assert_close(made, run.at(weights), 1e-6)


def test_the_folder_alone_makes_the_specialist_of_the_run(tiny_run, tiny_text, packed, tmp_path):
    alone = tmp_path / "elsewhere"
    shutil.copytree(packed, alone)
    documents = str(tiny_text / "cooking.jsonl")
    expected, _ = instantiate_to(tiny_run, documents, tmp_path / "expected")
    status = command(
        ["instantiate", f"--run={alone}", f"--documents={documents}", f"--out={tmp_path / 'made'}"]
    )
    assert status == 0
    made = load_file(tmp_path / "made" / "params.safetensors")
    for path, x in parameters(expected).items():
        np.testing.assert_array_equal(made[path], x, err_msg=path)


def test_a_run_needs_its_corpus_for_no_specialist(tiny_run, tiny_text, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    config = json.loads((run / "config.json").read_text())
    config["corpus"]["dir"] = str(tmp_path / "gone")
    (run / "config.json").write_text(json.dumps(config))
    soup = open_lib.load(run)
    documents = [json.loads(x)["text"] for x in (tiny_text / "cooking.jsonl").open()]
    assert_close(soup.instantiate(documents), open_lib.load(tiny_run).instantiate(documents), 0)
    with pytest.raises(UserError, match=r"gone is not a prepared corpus.*lies elsewhere"):
        assert soup.corpus
    with pytest.raises(UserError, match="is not a prepared corpus"):
        open_lib.load(run, corpus_dir=str(tmp_path / "gone"))
    # As a run of an earlier version, which kept nothing of it.
    shutil.rmtree(run / "domains")
    with pytest.raises(UserError, match=r"gone is not a prepared corpus.*lies elsewhere"):
        open_lib.load(run)


def test_a_bank_in_bfloat16_is_half_as_large_and_rounded_once(tiny_run, packed, tmp_path):
    half = pack(tiny_run, tmp_path / "half", dtype="bfloat16")
    sizes = [(f / "bank_dense.safetensors").stat().st_size for f in (tmp_path / "half", packed)]
    assert sizes[0] < 0.52 * sizes[1]
    (weights,) = h(half, 1)
    exact, rounded = open_lib.load(packed).at(weights), half.at(weights)
    worst = max(
        float(np.abs(x - parameters(rounded)[path]).max()) for path, x in parameters(exact).items()
    )
    assert 0 < worst < 2**-8 * np.abs(exact.alpha_E).sum()


def test_other_tools_can_read_the_arrays(packed):
    soup = open_lib.load(packed)
    found = {}
    for path in packed.glob("*.safetensors"):
        found |= load_file(path)
    assert found.keys() == soup.arrays.shapes.keys()
    for name, x in found.items():
        np.testing.assert_array_equal(x, soup.arrays.read(name), err_msg=name)
    name = "bank/dense/layers/mlp/up"
    np.testing.assert_array_equal(soup.arrays.read(name, 1, 3), found[name][1:3])
    card = (packed / "README.md").read_text()
    assert "4 experts over 6 domains" in card
    assert "nats a token, at step 12" in card


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def replace(path, *forms):
    """The first of the forms that is there by the last, which is as long."""
    data = path.read_bytes().replace(b" ", b"", 0)
    old = next(x for x in (f.replace(b",", b", ") for f in forms[:-1]) if x in data)
    path.write_bytes(data.replace(old, forms[-1].replace(b",", b", "), 1))


DAMAGE = {
    "a byte of the bank": (
        lambda d: flip(d / "bank_dense.safetensors", -5),
        r"is damaged: bank/dense/\S+ changed since it was saved",
    ),
    "a byte of the shared parameters": (
        lambda d: flip(d / "shared.safetensors", -5),
        r"is damaged: shared/\S+ changed since it was saved",
    ),
    "a byte of the router": (
        lambda d: flip(d / "router.safetensors", -5),
        r"is damaged: router/\S+ changed since it was saved",
    ),
    "a misplaced array": (
        lambda d: replace(d / "shared.safetensors", b"[400,32]", b"[32,400]", b"[401,32]"),
        "is damaged: its header misplaces 'shared/embedding'",
    ),
    "a bank cut short": (
        lambda d: (d / "bank_dense.safetensors").write_bytes(
            (d / "bank_dense.safetensors").read_bytes()[:-8]
        ),
        r"bank_dense.safetensors is damaged: it has \d+ bytes instead of \d+",
    ),
    "no bank": (
        lambda d: (d / "bank_dense.safetensors").unlink(),
        "bank_dense.safetensors does not exist",
    ),
    "no safetensors": (
        lambda d: (d / "router.safetensors").write_bytes(b"x" * 100),
        "router.safetensors is damaged: it is no safetensors file",
    ),
    "a domain's label": (
        lambda d: flip(d / "domains" / "domains.json", 30),
        "domains.json is missing or not what",
    ),
    "the config": (lambda d: flip(d / "config.json", 30), "config.json is missing or not what"),
    "the step": (
        lambda d: (d / "soup.json").write_text(
            (d / "soup.json").read_text().replace('"step": 12', '"step": 13')
        ),
        "soup.json was changed since soup_jax wrote it",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_told_by_use_and_by_verify(damage, packed, tmp_path):
    broken = tmp_path / "soup"
    shutil.copytree(packed, broken)
    assert verify(broken) == [f"{broken}: soup folder of step 12, all of it as it was written"]
    act, message = DAMAGE[damage]
    act(broken)
    with pytest.raises(UserError, match=message):
        open_lib.load(broken).at(h(open_lib.load(packed), 0)[0])
    with pytest.raises(UserError, match=message):
        verify(broken)


def test_a_damaged_newest_checkpoint_is_passed_over_and_an_asked_one_refused(
    tiny_run, tmp_path, caplog
):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    files = [p for p in (run / "checkpoints" / "12" / "params").rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    for i in range(1, 20):
        flip(largest, largest.stat().st_size * i // 20)
    (weights,) = h(open_lib.load(tiny_run), 1)
    made = open_lib.load(run).at(weights)
    assert made.recipe["step"] == 10
    assert "unreadable checkpoint, trying the one before" in caplog.text
    assert_close(made, open_lib.load(tiny_run, step=10).at(weights), 0)
    assert open_lib.load(run).resident().step == 10
    assert pack(run, tmp_path / "packed").step == 10
    with pytest.raises(UserError, match=r"checkpoints/12/params is damaged: "):
        open_lib.load(run, step=12).at(weights)


def test_a_folder_is_replaced_as_a_whole_and_nothing_else_is(tiny_run, packed, tmp_path):
    out = tmp_path / "soup"
    shutil.copytree(packed, out)
    pack(tiny_run, out, dtype="bfloat16")
    assert open_lib.load(out).arrays.shapes["bank/dense/embedding"].dtype == "bfloat16"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="mine exists and is no soup folder"):
        pack(tiny_run, tmp_path / "mine")
    with pytest.raises(UserError, match="holds step 12, not 5"):
        open_lib.load(out, step=5)


def test_arrays_are_written_in_pieces(tmp_path):
    x = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
    shapes = {"a": jax.ShapeDtypeStruct(x.shape, x.dtype), "b": jax.ShapeDtypeStruct((), x.dtype)}
    pieces = {"a": [x[:1], x[1:]], "b": [np.float32(7)]}
    folder.write_arrays(tmp_path / "x.safetensors", shapes, lambda name: iter(pieces[name]))
    found = load_file(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(found["a"], x)
    assert found["b"] == 7


def test_the_mean_of_checkpoints(tiny_run, tmp_path):
    steps = open_lib.load(tiny_run).newest, 10
    each = [open_lib.load(tiny_run, step=step) for step in steps]
    soup = open_lib.load(tiny_run, average=2)
    h_MK = np.eye(6)[:2]
    found = soup.make(h_MK, np.float32([[0.5, -1, 0, 2], [0, 0, 0, 0]]))
    for m, specialist in enumerate(found):
        alpha_ME = np.float32([[0.5, -1, 0, 2], [0, 0, 0, 0]])[m][None]
        params = [s.make(h_MK[m][None], alpha_ME)[0].params for s in each]
        mean = jax.tree.map(lambda a, b: (a + b) / 2, *params)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), specialist.params, mean
        )
        assert any(np.abs(a - b).max() > 1e-4 for a, b in zip(*map(jax.tree.leaves, params)))
    pack(tiny_run, tmp_path / "soup", average=2)
    packed = open_lib.load(tmp_path / "soup")
    same = packed.at(h_MK[0]).params
    jax.tree.map(np.testing.assert_array_equal, same, soup.at(h_MK[0]).params)
    with pytest.raises(UserError, match="the mean of 99 checkpoints"):
        open_lib.load(tiny_run, average=99)
    with pytest.raises(UserError, match="of one checkpoint"):
        open_lib.load(tmp_path / "soup", average=2)


def test_what_a_merge_holds_is_said(tiny_run, tmp_path):
    pack(tiny_run, tmp_path / "soup")
    arrays = open_lib.load(tmp_path / "soup").arrays
    shared = {n: s for n, s in arrays.shapes.items() if n.startswith("shared/")}
    model = sum(s.size * 4 for s in shared.values())
    leaf, stack = (
        max(s.size * 4 for n, s in arrays.shapes.items() if n.startswith(part))
        for part in ("shared/", "bank/")
    )
    # Stacks are smaller than a block: four models are summed together, and one block is held.
    assert stored.merge_bytes(arrays, 1) == model + 8 * leaf + 3 * stack
    assert stored.merge_bytes(arrays, 5) == 5 * model + 12 * leaf + 3 * stack
