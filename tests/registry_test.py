"""Tests of names and dotted paths."""

import sys

import pytest

from soup_jax.errors import UserError
from soup_jax.registry import Registry


@pytest.fixture
def animals(tmp_path, monkeypatch):
    (tmp_path / "zoo_of_tests").mkdir()
    (tmp_path / "zoo_of_tests" / "cats.py").write_text("class Lion:\n    roar = 'loud'\n")
    (tmp_path / "zoo_of_tests" / "broken.py").write_text("import a_package_that_is_missing\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    yield Registry("animal", {"lion": "zoo_of_tests.cats:Lion"})
    for name in [name for name in sys.modules if name.startswith("zoo_of_tests")]:
        del sys.modules[name]


def test_a_name_and_a_dotted_path_give_the_same(animals):
    lion = animals.get("lion")
    assert animals.get("zoo_of_tests.cats:Lion") is lion
    assert animals.get("zoo_of_tests.cats:Lion.roar") == "loud"


def test_what_is_registered_is_known(animals):
    @animals.register("wolf")
    class Wolf:
        pass

    assert animals.get("wolf") is Wolf
    assert animals.names() == ("lion", "wolf")
    for taken in ("lion", "wolf", "a:b"):
        with pytest.raises(ValueError, match="cannot be the name of another animal"):
            animals.register(taken)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("loin", r"unknown animal 'loin' \(did you mean lion\?\); known are lion, .*module:attrib"),
        ("zoo_of_tests.cats.Lion", "unknown animal"),
        ("zoo_of_tests.dogs:Dog", "there is no module zoo_of_tests.dogs"),
        ("zoo_of_test.cats:Lion", "there is no module zoo_of_test "),
        ("zoo_of_tests.cats:Tiger", "module zoo_of_tests.cats has no attribute Tiger"),
        ("zoo_of_tests.cats:", "is no dotted path"),
        (":Lion", "is no dotted path"),
    ],
)
def test_what_is_not_there_is_named(animals, name, message):
    with pytest.raises(UserError, match=message):
        animals.get(name)


def test_an_error_of_the_module_itself_passes_through(animals):
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_missing"):
        animals.get("zoo_of_tests.broken:Anything")
