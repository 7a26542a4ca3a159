"""Rules on the text of the library: who may import whom, what nobody imports, how long things are.

A module imports only from modules that stand before it in MODULES. To add a module, put its name
where that holds; if there is no such place, it is one module too many, or its parts are misplaced.
"""

import ast
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MODULES = """
    errors files host_memory chips hlo rules config cluster group coordinator watchdog
    shapes tree compile_cache mesh sharding distributed
    tokenizer corpus embed domains windows histogram request shards prepare
    domain_weights sampler loader
    rounding layers llama model low_rank experts pending router merge soup loss
    bank_optimizer optimizer train_state train_step metrics checkpoint evaluate run signals train
    specialist finetune export generate report estimate target plan main
""".split()
READS_EXPERIMENTS = ("config", "main")  # the field list, and the folder of the shipped files
EXPERIMENTS_MAY_IMPORT = ("ml_collections", "soup_jax")
FORBIDDEN = ("tensorflow", "torch", "pickle", "cloudpickle", "dill", "marshal", "shelve")
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 80


def parsed(folder: str) -> dict[str, ast.Module]:
    return {
        p.stem: ast.parse(p.read_text("utf-8"), str(p))
        for p in sorted((ROOT / folder).glob("*.py"))
    }


LIBRARY = {name: tree for name, tree in parsed("soup_jax").items() if name != "__init__"}


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


def order_violations(name: str, tree: ast.Module) -> Iterator[str]:
    if name not in MODULES:
        yield (
            f"soup_jax/{name}.py is not in the order: add its name to MODULES in "
            "tests/import_order_test.py, after all modules that it imports"
        )
        return
    for line, imported in imports(tree):
        top, *rest = imported.split(".")
        where = f"soup_jax/{name}.py:{line}: "
        if top == "":
            yield where + "relative import; write `from soup_jax import ...`"
        elif top == "soup_jax" and rest and rest[0] == "experiments":
            if name not in READS_EXPERIMENTS or rest[1:2] != ["base"]:
                yield where + f"imports {imported}; only {READS_EXPERIMENTS} read experiments.base"
        elif top == "soup_jax" and rest and rest[0] in MODULES:
            if MODULES.index(rest[0]) >= MODULES.index(name):
                yield where + f"imports {rest[0]}, which does not stand before {name} in MODULES"
        elif top == "soup_jax" and rest and rest[0] in LIBRARY:
            yield where + f"imports {rest[0]}, which is not in MODULES"


def no_violation(violations: Iterator[str]) -> None:
    assert not (found := sorted(violations)), "\n" + "\n".join(found)


def test_modules_import_only_from_earlier_ones():
    no_violation(v for name, tree in LIBRARY.items() for v in order_violations(name, tree))


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("tree", "from soup_jax import sharding", "does not stand before tree"),
        ("tree", "def f():\n    import soup_jax.train as t", "does not stand before tree"),
        ("tree", "from soup_jax.sharding import spec", "does not stand before tree"),
        ("tree", "from . import errors", "relative import"),
        ("tree", "from soup_jax.experiments import base", "read experiments.base"),
        ("config", "from soup_jax.experiments import quickstart", "read experiments.base"),
        ("gate", "import numpy", "is not in the order"),
    ],
)
def test_the_order_rule_sees(name: str, source: str, message: str):
    (violation,) = order_violations(name, ast.parse(source))
    assert message in violation


def test_the_order_rule_allows():
    source = "import jax\nfrom soup_jax import errors, tree\nfrom soup_jax.mesh import make_mesh"
    assert not list(order_violations("sharding", ast.parse(source)))
    assert not list(order_violations("config", ast.parse("from soup_jax.experiments import base")))
    assert len(MODULES) == len(set(MODULES))


def test_experiments_import_nothing_but_configs():
    allowed = (*EXPERIMENTS_MAY_IMPORT, *sys.stdlib_module_names)
    no_violation(
        f"experiments/{name}.py:{line}: imports {imported}"
        for name, tree in parsed("experiments").items()
        for line, imported in imports(tree)
        if imported.split(".")[0] not in allowed
        or (imported.startswith("soup_jax.") and imported.split(".")[1] != "experiments")
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
for name in {sorted(LIBRARY)}:
    importlib.import_module("soup_jax." + name)
sys.exit(f"imported: {{sorted(Watch.tried)}}" if Watch.tried else 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.returncode == 0, done.stderr


def test_files_and_functions_are_short():
    lengths = {
        f"soup_jax/{name}.py": len((ROOT / f"soup_jax/{name}.py").read_text("utf-8").splitlines())
        for name in LIBRARY
    }
    no_violation(
        f"{name} has {n} lines, {MAX_FILE_LINES} at most"
        for name, n in lengths.items()
        if n > MAX_FILE_LINES
    )
    no_violation(
        f"soup_jax/{name}.py:{node.lineno}: {node.name} has {length} lines, "
        f"{MAX_FUNCTION_LINES} at most"
        for name, tree in LIBRARY.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := node.end_lineno - node.lineno + 1) > MAX_FUNCTION_LINES
    )
