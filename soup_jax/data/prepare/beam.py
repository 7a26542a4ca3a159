"""The jobs of `prepare` as Apache Beam pipelines: one for each stage, on any runner.

Workers must reach the folders of the sources and of the corpus by the same paths, as those of the
direct runner do, or those of Dataflow, Flink or Spark on a shared disk, and have soup_jax.
"""

import os
import shlex
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import threadpoolctl

from soup_jax.data.prepare.work import Map
from soup_jax.errors import UserError


def beam_map(options: str) -> Map:
    """What calls a function with the arguments of each of many jobs, by Beam.

    Args:
      options: of the pipeline, such as "--runner=DirectRunner --direct_num_workers=4".

    Raises:
      UserError: Beam is not installed, or has no such runner.
    """
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as e:
        raise UserError("--beam needs Apache Beam: pip install 'soup_jax[beam]'") from e

    def run(
        function: Callable[..., None], jobs: Sequence[tuple], *, num_workers: int
    ) -> Iterable[None]:
        del num_workers  # the runner's
        try:
            made = PipelineOptions(shlex.split(options), save_main_session=False)
            pipeline = apache_beam.Pipeline(options=made)
        except ValueError as e:
            raise UserError(f"--beam={options!r}: {e}") from e
        with pipeline:
            numbered = pipeline | apache_beam.Create(list(enumerate(jobs)))
            # Else one worker would take them all, one after the other.
            spread = numbered | apache_beam.Reshuffle()
            _ = spread | apache_beam.Map(_call, function)
        return [None] * len(jobs)

    return run


def _call(job: tuple[int, tuple[Any, ...]], function: Callable[..., None]) -> None:
    os.environ.setdefault("RAYON_NUM_THREADS", "1")  # of `tokenizers`
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # an accelerator belongs to one process
    with threadpoolctl.threadpool_limits(1):
        function(*job[1])
