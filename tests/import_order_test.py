"""Rules on the text of the library: who may import whom, what nobody imports, how long things are.

The library is made of packages, and PACKAGES lists them from the ground up: a module imports from
its own package and from those before it, never from one above. Inside a package, and so in the
whole library, there is no circle. The method can be used without the framework: METHOD knows
nothing of configs, data or processes.
"""

import ast
import configparser
import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping

import pytest

import soup_jax
from soup_jax.processes import start

ROOT = pathlib.Path(__file__).parents[1]
GROUND = "the ground floor"  # the modules directly in soup_jax/
PACKAGES = (
    GROUND,
    "config",
    "hardware",
    "processes",
    "models",
    "soup",
    "optim",
    "data.embed",
    "data",
    "data.prepare",
    "evaluation",
    "training",
    "reports",
    "specialists.export",
    "specialists",
    "specialists.serve",
    "planning",
    "sweeps",
    "cli",
)
METHOD = ("models", "soup", "optim")
ABOVE_THE_METHOD = ("config", "processes", "data")
READS_EXPERIMENTS = ("config.schema", "cli.config_flag")  # the fields; the shipped files
EXPERIMENTS_MAY_IMPORT = ("ml_collections", "soup_jax.experiments", "soup_jax.config.fields")
FORBIDDEN = ("tensorflow", "torch", "pickle", "cloudpickle", "dill", "marshal", "shelve")
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 70


def parsed(folder: str) -> dict[str, ast.Module]:
    """Trees by dotted name below the folder; a package's own is that of its __init__."""
    trees = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT / folder).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        trees[name] = ast.parse(path.read_text("utf-8"), str(path))
    return trees


LIBRARY = parsed("soup_jax")


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, also of those inside functions.

    `from a import b` gives a.b, as b may be a module; a relative import starts with a dot.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def module_of(imported: str, library: Mapping[str, ast.Module]) -> str | None:
    """The module of ours that `soup_jax.a.b.name` comes from; None if it is not ours."""
    top, *rest = imported.split(".")
    if top != "soup_jax":
        return None
    names = (".".join(rest[:n]) for n in range(len(rest), 0, -1))
    return next((name for name in names if name in library), "")


def package_of(module: str) -> str:
    names = (module.rsplit(".", n)[0] for n in range(module.count(".") + 1))
    return next((name for name in names if name in PACKAGES), GROUND)


def order_violations(name: str, tree: ast.Module) -> Iterator[str]:
    package = package_of(name)
    if package == GROUND and "." in name:
        yield f"soup_jax/{name.replace('.', '/')}.py lies in no package of PACKAGES"
        return
    for line, imported in imports(tree):
        where = f"soup_jax.{name}, line {line}: "
        if imported.startswith("."):
            yield where + "relative import; write `from soup_jax.package import ...`"
            continue
        if imported.startswith("soup_jax.experiments"):
            if name not in READS_EXPERIMENTS or imported.split(".")[2:3] != ["base"]:
                yield where + f"imports {imported}; only {READS_EXPERIMENTS} read experiments.base"
            continue
        other = module_of(imported, LIBRARY)
        if not other:
            continue
        above = package_of(other)
        if PACKAGES.index(above) > PACKAGES.index(package):
            yield where + f"imports {other}: {above} stands above {package} in PACKAGES"
        if package in METHOD and above in ABOVE_THE_METHOD:
            yield where + f"imports {other}: the method can be used without {above}"


def circle(edges: Mapping[str, set[str]]) -> list[str]:
    """The names of one circle, the first again at its end; [] if there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(edges.get(name, ())):
            if found := visit(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(edges) if (found := visit(name, []))), [])


def no_violation(violations: Iterator[str]) -> None:
    assert not (found := sorted(violations)), "\n" + "\n".join(found)


def test_packages_import_only_from_those_below():
    no_violation(v for name, tree in LIBRARY.items() for v in order_violations(name, tree))
    assert {package_of(name) for name in LIBRARY} == set(PACKAGES), "a package that does not exist"


def test_no_circle_of_modules():
    edges = {
        name: {m for _, i in imports(tree) if (m := module_of(i, LIBRARY)) and m != name}
        for name, tree in LIBRARY.items()
    }
    assert circle(edges) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("tree", "from soup_jax.soup import layout", "soup stands above the ground floor"),
        ("soup.bank", "def f():\n    import soup_jax.training.loop as t", "training stands above"),
        ("hardware.mesh", "from soup_jax.soup.layout import storage", "soup stands above hardware"),
        ("soup.bank", "from soup_jax.config import schema", "can be used without config"),
        ("optim.apply", "from soup_jax.processes import group", "can be used without processes"),
        ("tree", "from . import errors", "relative import"),
        ("tree", "from soup_jax.experiments import base", "read experiments.base"),
        ("config.schema", "from soup_jax.experiments import quickstart", "read experiments.base"),
        ("attic.gate", "import numpy", "lies in no package"),
    ],
)
def test_the_order_rule_sees(name: str, source: str, message: str):
    violations = list(order_violations(name, ast.parse(source)))
    assert violations
    assert message in violations[0]


def test_the_order_rule_allows():
    source = "import jax\nfrom soup_jax import errors, tree\nfrom soup_jax.hardware import mesh"
    assert not list(order_violations("soup.layout", ast.parse(source)))
    reading = ast.parse("from soup_jax.experiments import base")
    assert not list(order_violations("config.schema", reading))


def test_experiments_import_nothing_but_configs():
    allowed = (*EXPERIMENTS_MAY_IMPORT, *sys.stdlib_module_names)

    def may(imported: str) -> bool:
        return any(f"{imported}.".startswith(f"{name}.") for name in allowed)

    no_violation(
        f"experiments/{name}.py:{line}: imports {imported}"
        for name, tree in parsed("experiments").items()
        for line, imported in imports(tree)
        if not may(imported)
    )


def test_nobody_imports_tensorflow_torch_or_pickle():
    trees = {f"{f}/{n}": t for f in ("soup_jax", "experiments") for n, t in parsed(f).items()}
    no_violation(
        f"{name}.py:{line}: imports {imported}"
        for name, tree in trees.items()
        for line, imported in imports(tree)
        if imported.split(".")[0] in FORBIDDEN
    )
    no_violation(
        f"{name}.py:{node.lineno}: joblib.{node.attr} is a pickle by another name"
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr in ("dump", "load")
        and isinstance(node.value, ast.Name)
        and node.value.id == "joblib"
    )
    no_violation(
        f"{name}.py:{node.value.lineno}: allow_pickle must stay False"
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword)
        and node.arg == "allow_pickle"
        and not (isinstance(node.value, ast.Constant) and node.value.value is False)
    )


def test_whatever_is_imported_is_declared():
    """As a dependency or in an extra, and not only one of another package's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    requirements = [*project["dependencies"], *(r for extra in extras for r in extra)]
    plain = [re.match(r"[\w.-]+", r)[0].lower().replace("_", "-") for r in requirements]
    distributions = importlib.metadata.packages_distributions()
    ours = {"soup_jax", *sys.stdlib_module_names}

    def declared(name: str) -> bool:
        # What is not installed has the name of its distribution, as far as extras are concerned.
        found = distributions.get(name, [name])
        return name in ours or any(d.lower().replace("_", "-") in plain for d in found)

    no_violation(
        f"{name}.py:{line}: imports {imported}, which pyproject.toml does not declare"
        for name, tree in LIBRARY.items()
        for line, imported in imports(tree)
        if not declared(imported.split(".")[0])
    )


def test_importing_everything_does_not_ask_for_tensorflow_or_torch():
    # They are not installed with the tests, so what is looked for is the attempt: one of ours or
    # of a dependency, at import.
    program = f"""
import importlib, sys
class Watch:
    tried = set()
    def find_spec(self, name, path=None, target=None):
        if name in ("tensorflow", "torch"):
            self.tried.add(name)
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Watch())
for name in {sorted(set(LIBRARY) - {"cli.__main__"})}:
    importlib.import_module(f"soup_jax.{{name}}".rstrip("."))
sys.exit(f"imported: {{sorted(Watch.tried)}}" if Watch.tried else 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.returncode == 0, done.stderr


def test_files_and_functions_are_short():
    for path in (ROOT / "soup_jax").rglob("*.py"):
        lines = len(path.read_text("utf-8").splitlines())
        assert lines <= MAX_FILE_LINES, f"{path} has {lines} lines, {MAX_FILE_LINES} at most"
    no_violation(
        f"soup_jax.{name}, line {node.lineno}: {node.name} has {length} lines, "
        f"{MAX_FUNCTION_LINES} at most"
        for name, tree in LIBRARY.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := node.end_lineno - node.lineno + 1) > MAX_FUNCTION_LINES
    )


def test_every_package_is_installed_and_compared(monkeypatch, tmp_path):
    listed = configparser.ConfigParser()
    listed.read(ROOT / "setup.cfg")
    packages = {f"soup_jax.{p}" for p in PACKAGES if p != GROUND} | {"soup_jax"}
    configs = {"soup_jax.experiments", "soup_jax.experiments.paper"}
    assert set(listed["options"]["packages"].split()) == packages | configs

    # Processes of a run compare the hash of their code: of all packages.
    shutil.copytree(ROOT / "soup_jax", tmp_path / "soup_jax")
    monkeypatch.setattr(soup_jax, "__file__", str(tmp_path / "soup_jax" / "__init__.py"))
    before = start.code_hash()
    for package in packages:
        file = tmp_path / package.replace(".", "/") / "__init__.py"
        text = file.read_text()
        file.write_text(text + "# changed\n")
        assert start.code_hash() != before, package
        file.write_text(text)
    assert start.code_hash() == before
