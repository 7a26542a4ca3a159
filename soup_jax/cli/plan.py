"""`soup-jax plan`: memory, traffic and time of a run, before a chip is taken.

    soup-jax plan --config=experiments/soup_110m.py --topology=v5e:4x4

The exit status is 1 if the run does not fit.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from soup_jax.cli import config_flag
from soup_jax.errors import UserError
from soup_jax.storage import check_file_target, write_json


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define the flags."""
    config_flag.define(values, argv)
    string = flags.DEFINE_string
    string("topology", "", "TPU slice to compile for, such as v5e:4x4", flag_values=values)
    string("chip", "", "chip to plan for, such as H200; default: what is here", flag_values=values)
    flags.DEFINE_integer("slices", 1, "how many such slices", lower_bound=1, flag_values=values)
    flags.DEFINE_integer(
        "num_devices", 0, "how many; default: what is here, or 1", lower_bound=0, flag_values=values
    )
    string("json", "", "a file that gets the numbers", flag_values=values)


def run(values: flags.FlagValues) -> int:
    """Print the plan; returns the exit status, 1 if the run does not fit."""
    cfg = config_flag.checked(values)
    if values.json:
        check_file_target(values.json, "--json")
    from soup_jax.hardware import compile_cache

    compile_cache.enable()
    if values.topology:
        # The slice is not this machine: no accelerator here is taken, none that fails disturbs.
        import jax

        jax.config.update("jax_platforms", "cpu")
    from soup_jax.planning import text
    from soup_jax.planning.plan import make_plan
    from soup_jax.planning.target import find_target

    target = find_target(
        cfg,
        topology=values.topology,
        num_slices=values.slices,
        chip=values.chip,
        num_devices=values.num_devices,
    )
    plan = make_plan(cfg, target)
    print(text.to_text(plan))
    if warning := repetition(cfg):
        print(f"warning: {warning}")
    if values.json:
        write_json(pathlib.Path(values.json), text.to_json(plan))
    return 0 if plan.fits else 1


def repetition(cfg: Any) -> str:
    """What the run would read many times of its corpus, if that is there; a plan needs none."""
    from soup_jax import remote
    from soup_jax.data import domain_report
    from soup_jax.data.corpus import open_corpus

    place = cfg.corpus.dir
    address = remote.is_object(place)
    if not address and not (pathlib.Path(place) / "manifest.json").exists():
        return ""
    try:
        corpus = open_corpus(place, num_domains=cfg.num_domains, cache_dir=cfg.corpus.cache_dir)
    except UserError as e:
        if not address:
            raise
        return f"what the run repeats of its corpus is not known: {e}"
    fits = corpus.num_domains == cfg.num_domains
    return domain_report.repetition_warning(cfg, corpus) if fits else ""
