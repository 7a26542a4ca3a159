"""A backend of lm-evaluation-harness: `lm_eval --model soup_jax --model_args ...`.

    model=DIR                     a specialist
    run=RUN,documents=FILE        the soup of a run, or a soup folder, at the h of these documents
    run=RUN                       that soup at the natural frequencies of its domains

Releases of the harness after 0.4.13 find it by its entry point. For 0.4.13 and before,

    python -m soup_jax.specialists.lm_eval --model soup_jax --model_args model=DIR --tasks T

is the harness's own command with this backend added.
"""

import functools
from collections.abc import Sequence
from typing import Any

from soup_jax.errors import UserError
from soup_jax.evaluation.sample import read_sample
from soup_jax.evaluation.score import score_targets, score_texts
from soup_jax.specialists.decoding import Sampling
from soup_jax.specialists.open import load
from soup_jax.specialists.specialist import Specialist


class _Backend:
    """A specialist as the harness sees a model."""

    def __init__(self, model: str = "", run: str = "", documents: str = "", **unused: Any) -> None:
        """Opens the specialist, or makes it.

        Args:
          unused: settings that the harness gives every model, such as batch_size and device.

        Raises:
          UserError: neither `model` nor `run`, or as `Specialist.load` and `Soup.instantiate`.
        """
        super().__init__()
        del unused
        if bool(model) == bool(run):
            raise UserError("--model_args needs model=DIR or run=RUN, and not both")
        if model:
            self._specialist = Specialist.load(model)
        else:
            soup = load(run)
            if documents:
                sample = read_sample([documents], text_field=soup.cfg.corpus.text_field)
                self._specialist = soup.instantiate([d.text for d in sample.documents])
            else:
                self._specialist = soup.generic()

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token; training windows start after one."""
        return int(self._specialist.recipe["eos_id"])

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **unused: Any
    ) -> list[int]:
        """Ids of a text; a context begins with the end-of-text token."""
        del unused
        ids = self._specialist.tokenizer.encode(string)
        return ids if add_special_tokens is False else [self.eot_token_id, *ids]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **unused: Any,
    ) -> list[tuple[float, bool]]:
        del disable_tqdm, unused
        pairs = [(context + target, len(target)) for _, context, target in requests]
        answers = [(0.0, True)] * len(pairs)
        for index, value, likeliest in score_targets(
            self._specialist.model,
            self._specialist.params,
            pairs,
            seq_len=self._specialist.recipe["seq_len"],
        ):
            answers[index] = (value, likeliest)
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihoods of whole texts, in nats: those of `soup-jax score`."""
        del disable_tqdm
        s = self._specialist
        scores = score_texts(
            s.model,
            s.params,
            s.tokenizer,
            [request.args[0] for request in requests],
            eos_id=s.recipe["eos_id"],
            seq_len=s.recipe["seq_len"],
        )
        return [-score.nats for score in scores]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations, of which those with equal settings are decoded together."""
        del disable_tqdm
        groups: dict[Any, list[int]] = {}
        for index, request in enumerate(requests):
            settings = dict(request.args[1])
            until = settings.get("until") or ()
            stop = (until,) if isinstance(until, str) else tuple(until)
            temperature = float(settings.get("temperature") or 0.0)
            if not settings.get("do_sample", temperature > 0):
                temperature = 0.0
            top_p = float(settings.get("top_p", 1.0))
            max_tokens = int(settings.get("max_gen_toks", 256))
            groups.setdefault((stop, temperature, top_p, max_tokens), []).append(index)
        texts = [""] * len(requests)
        for (stop, temperature, top_p, max_tokens), indices in groups.items():
            made = self._specialist.generate_batch(
                [requests[index].args[0] for index in indices],
                max_tokens=max_tokens,
                sampling=Sampling(temperature=temperature, top_p=top_p),
                stop=stop,
            )
            for index, text in zip(indices, made):
                texts[index] = text
        return texts


@functools.cache
def _class() -> type:
    try:
        from lm_eval.api.model import TemplateLM
    except ImportError as e:
        raise UserError(
            "lm-evaluation-harness is not installed: pip install 'soup_jax[lm-eval]'"
        ) from e
    return type("SoupJax", (_Backend, TemplateLM), {"__doc__": _Backend.__doc__})


def __getattr__(name: str) -> Any:
    # The harness's base class is imported where the backend is asked for.
    if name == "SoupJax":
        return _class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main() -> None:
    """The harness's command, with this backend."""
    backend = _class()
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry

    if "soup_jax" not in model_registry:
        model_registry.register("soup_jax", target=backend)
    cli_evaluate()


if __name__ == "__main__":
    main()
