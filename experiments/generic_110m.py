"""The generic baseline of `experiments/soup_110m.py`: same network and tokens, zero experts.

soup-jax train --config=experiments/generic_110m.py --workdir=runs/generic_110m
"""

from ml_collections import ConfigDict

from soup_jax.experiments import base, soup_110m


def get_config() -> ConfigDict:
    """The full config; reads the corpus that was prepared for the soup."""
    cfg = soup_110m.get_config()
    cfg.name = "generic_110m"
    base.set_generic(cfg)
    return cfg
