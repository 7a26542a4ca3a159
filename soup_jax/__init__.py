"""Soup-of-Experts in JAX: pretrain once, instantiate many small specialist models.

    soup = soup_jax.load("runs/quickstart/soup")
    specialist = soup.instantiate(["a few", "documents"])
    specialist.save("specialist")

The method is that of Ablin, Katharopoulos, Seto and Grangier, "Soup-of-Experts: Pretraining
Specialist Models via Parameters Averaging" (ICML 2025, arXiv 2502.01804). Importing this package
imports nothing else: each name of `__all__` comes from its module when it is asked for.
"""

import importlib

__version__ = "0.1.0"

_MODULES = {
    "BaseModel": "models.base",
    "ModelSettings": "models.base",
    "Soup": "specialists.trained",
    "SoupConfig": "soup.parameters",
    "Specialist": "specialists.specialist",
    "UserError": "errors",
    "evaluate": "specialists.compare:evaluate_runs",
    "finetune": "specialists.finetune",
    "find_mixture": "specialists.mixture",
    "from_linen": "models.base",
    "from_nnx": "models.base",
    "load": "specialists.open",
    "next_token_losses": "models.base",
    "prepare": "data.prepare.stages",
    "report": "reports.write",
    "train": "training.loop",
}
__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _MODULES[name].partition(":")
    found = getattr(importlib.import_module(f"{__name__}.{module}"), attribute or name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
