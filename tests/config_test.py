import pathlib

import pytest

from soup_jax.config import schema as config
from soup_jax.config.fields import Field, to_markdown
from soup_jax.errors import UserError
from soup_jax.experiments import base, generic_110m, minipile, quickstart, soup_110m
from soup_jax.experiments.paper import methods

GOLDEN = pathlib.Path(__file__).parent / "golden"
SHIPPED = {
    "base": base.get_config(),
    "base_35m": base.get_config("35m"),
    "base_110m": base.get_config("110m"),
    "base_335m": base.get_config("335m"),
    "quickstart": quickstart.get_config(),
    "quickstart_generic": quickstart.get_config("generic"),
    "quickstart_fast": quickstart.get_config("fast"),
    "quickstart_fast_generic": quickstart.get_config("fast_generic"),
    "minipile": minipile.get_config(),
    "minipile_generic": minipile.get_config("generic"),
    "soup_110m": soup_110m.get_config(),
    "generic_110m": generic_110m.get_config(),
}
HEAD = """# Config fields

Generated from `experiments/base.py` by `pytest tests/config_test.py --update-golden`. In a started
run a `fixed` field never changes, a `tunable` one with `soup-jax train --accept_changes`, a `free`
one at every start. Each of them can be an axis of a [sweep](sweeps.md).
"""


def changed(**fields):
    cfg = base.get_config()
    with cfg.unlocked():
        cfg.update_from_flattened_dict(fields)
    return cfg


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_config_is_valid_and_as_recorded(name, request):
    cfg = config.check(SHIPPED[name])
    path = GOLDEN / f"{name}.txt"
    if request.config.getoption("--update-golden"):
        path.write_text(config.to_text(cfg), encoding="utf-8")
    assert config.to_text(cfg) == path.read_text(encoding="utf-8"), (
        f"the resolved config {name} changed; if that is meant, run "
        "`pytest tests/config_test.py --update-golden` and commit the difference"
    )


@pytest.mark.parametrize("size", methods.SIZES)
@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_of_the_paper_has_a_config_at_every_size(method, size):
    if (method, size) == ("large", "35m"):
        with pytest.raises(ValueError, match="only there for small"):
            methods.get_config("large,35m")
    if method == "large" and size != "small":
        return
    cfg = methods.get_config(f"{method},{size}")
    if method == "fixed":
        with pytest.raises(UserError, match=r"domain_weights\.path"):  # which it has to be given
            config.check(cfg)
        cfg.domain_weights.path = "h.json"
    config.check_start(config.check(cfg))
    assert (cfg.num_experts > 0) == (method in ("soup", "per_window"))
    assert cfg.num_mixtures == {"per_window": cfg.batch_size, "soup": 16}.get(method, 1)


def test_a_method_that_there_is_not_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match=r"generic.*small"):
        methods.get_config("crisp")


def test_the_reference_of_fields_is_that_of_the_declarations(request):
    path = pathlib.Path(__file__).parents[1] / "docs" / "config.md"
    text = HEAD + to_markdown(base.FIELDS)
    if request.config.getoption("--update-golden"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), (
        "fields changed; run `pytest tests/config_test.py --update-golden`"
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer.learning_rte": 1.0}, "did you mean optimizer.learning_rate"),
        ({"num_expert": 3}, "did you mean num_experts"),
        ({"num_mixtures": 3}, "num_mixtures = 3 must divide batch_size = 64"),
        ({"num_steps": 0}, "num_steps = 0 must be at least 1"),
        ({"model.dtype": "float16"}, "model.dtype = 'float16' is none of"),
        ({"model.args": ("depth",)}, r"model\.args must be a tuple of \(name, value\) pairs"),
        ({"domain_weights.sparse": 0.5}, "must add up to 1, not 0.7"),
        ({"domain_weights.support_size": 17}, "support_size = 17 <= num_domains = 16"),
        ({"domain_weights.path": "h.json"}, "domain_weights.file > 0 and domain_weights.path"),
        ({"optimizer.grad_accumulation": 3}, "must divide the 64 rows"),
        ({"optimizer.learning_rate": float("nan")}, "is not finite"),
        ({"optimizer.learning_rate": 0.0}, "must be positive"),
        ({"optimizer.beta2": 1.0}, r"must be in \[0, 1\)"),
        ({"experts.rules": ((".*", 8),)}, "experts.rules must be a tuple of"),
        ({"skip_batches": ((3, 2),)}, "skip_batches must be pairs"),
        ({"skip_batches": ((3, 4), (4, 5))}, "skip_batches must be pairs"),
        ({"skip_batches": ((3, 4.0),)}, "skip_batches must be pairs"),
        ({"skip_batches": (3, 4)}, "skip_batches must be pairs"),
        ({"checkpoint.init_step": 4}, "checkpoint.init_from, which is empty"),
        ({"evaluate.histogram_fraction": 1.0}, "must leave documents for all parts"),
        ({"evaluate.tuning_fraction": 0.5}, "must leave documents for all parts"),
    ],
)
def test_refuses(fields, message):
    with pytest.raises(UserError, match=message):
        config.check(changed(**fields))


@pytest.mark.parametrize(
    ("bounds", "bad", "allowed"),
    [
        ({"at_least": 2}, 1, "at least 2"),
        ({"above": 0}, 0, "positive"),
        ({"above": 2}, 2, "above 2"),
        ({"at_most": 3}, 4, "at most 3"),
        ({"below": 3}, 3, "below 3"),
        ({"at_least": 0, "below": 1}, 1, "in [0, 1)"),
        ({"above": 0, "at_most": 1}, 0, "in (0, 1]"),
    ],
)
def test_bounds_in_words(bounds, bad, allowed):
    field = Field("a.b", 1, "", **bounds)
    assert field.value_problem(bad) == f"a.b = {bad} must be {allowed}"
    good = {"at_least": bad + 1, "above": bad + 1, "at_most": bad - 1, "below": bad - 1}
    assert not field.value_problem(0.5 if len(bounds) == 2 else good[next(iter(bounds))])


def test_a_field_is_declared_once():
    names = [field.name for field in base.FIELDS]
    assert len(names) == len(set(names))
    assert set(names) == {name for name, _ in config.flat_items(base.get_config())}


def test_refuses_a_wrong_type():
    cfg = base.get_config()
    with cfg.unlocked(), cfg.ignore_type():
        cfg.num_steps = "many"
    with pytest.raises(UserError, match="num_steps = 'many' is a str, expected a int"):
        config.check(cfg)


def test_refuses_a_replaced_section():
    cfg = base.get_config()
    with cfg.unlocked():
        del cfg.optimizer
        cfg.optimizer = {"learning_rate": 1.0}
    with pytest.raises(UserError, match=r"missing fields optimizer\.bank"):
        config.check(cfg)


def test_saved_config_comes_back_equal(tmp_path):
    cfg = changed(**{"experts.rules": (("a.*", "none"), (".*", "dense")), "seed": 7})
    config.save(cfg, tmp_path / "config.json")
    assert config.diff(cfg, config.load(tmp_path / "config.json")) == {}


def test_a_saved_config_that_was_changed_is_taken_with_a_warning(tmp_path, caplog):
    path = tmp_path / "config.json"
    config.save(changed(seed=7), path)
    assert config.load(path).seed == 7
    assert not caplog.text
    path.write_text(path.read_text().replace('"seed": 7', '"seed": 6'))
    assert config.load(path).seed == 6
    assert f"{path} was changed since soup_jax wrote it" in caplog.text


def test_diff_is_by_what_a_started_run_may_change():
    fields = {"seed": 3, "log.every_steps": 1, "optimizer.beta1": 0.8}
    old, new = changed(), changed(**fields)
    assert config.diff(old, new, "fixed") == {"seed": (0, 3)}
    assert config.diff(old, new, "tunable") == {"optimizer.beta1": (0.9, 0.8)}
    assert set(config.diff(old, new)) == set(fields)


def test_every_field_has_a_reader():
    """No knob that does nothing: each field's name occurs in the package that reads it."""
    root = pathlib.Path(config.__file__).parents[1]
    source = "".join(p.read_text() for p in root.rglob("*.py") if p.name != "schema.py")
    for name, _ in config.flat_items(base.get_config()):
        section, _, field = name.rpartition(".")
        if section != "model":  # read by ModelSettings
            assert f".{field}" in source, f"nothing reads the config field {name}"
