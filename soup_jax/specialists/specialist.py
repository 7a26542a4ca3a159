"""A specialist: one merged model, an ordinary small network that knows nothing of soups."""

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from soup_jax import places, tree
from soup_jax.data.domain_histogram import DocumentHistogram
from soup_jax.data.tokenizer import Tokenizer, load_tokenizer
from soup_jax.errors import UserError
from soup_jax.evaluation.score import Score, score_texts
from soup_jax.inputs import read_tensors
from soup_jax.models import base as models
from soup_jax.models.base import BaseModel
from soup_jax.shapes import Params
from soup_jax.specialists import recipe as recipe_lib
from soup_jax.specialists.decoding import DEFAULT_SAMPLING, Sampling
from soup_jax.specialists.export import export
from soup_jax.specialists.generate import Request, generate_texts

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Specialist:
    """Parameters, the network they belong to, and where they came from.

    Attributes:
      params: Theta(h), of the base network.
      model: the base network.
      recipe: what reproduces the specialist, as in its recipe.json.
      tokenizer_path: its tokenizer.json.
      histogram: of the documents that gave h, if documents did and it was not read from a folder.
    """

    params: Params
    model: BaseModel
    recipe: Mapping[str, Any]
    tokenizer_path: pathlib.Path
    histogram: DocumentHistogram | None = None

    @classmethod
    def load(cls, folder: str | pathlib.Path, *, model: BaseModel | None = None) -> "Specialist":
        """Read a folder that `save` wrote in the format "soup_jax".

        Args:
          model: the base network; default: the one that the recipe names.

        Raises:
          UserError: not such a folder, incomplete or changed, or its network cannot be made.
        """
        folder = places.local(folder).absolute()  # read later too, wherever that is
        made = recipe_lib.read(folder)
        model = model or models.make(made["model"].get("kind", ""), recipe_lib.settings(made))
        leaves = read_tensors(folder / "params.safetensors")
        _check_leaves(leaves, model, folder)
        return cls(
            params=tree.unflatten(leaves),
            model=model,
            recipe=made,
            tokenizer_path=folder / "tokenizer.json",
        )

    @property
    def h_K(self) -> np.ndarray:
        """The domain weights it was merged at, float64."""
        return np.asarray(self.recipe["h"], np.float64)

    @property
    def alpha_E(self) -> np.ndarray:
        """The coefficients of the experts, float32; none for a model without experts."""
        return np.asarray(self.recipe["alpha"], np.float32)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Text to ids and back."""
        return load_tokenizer(self.tokenizer_path)

    def save(self, folder: str | pathlib.Path, *, format: str = "soup_jax", **options: Any) -> None:
        """Write it to a folder; one that holds a specialist is replaced.

        Args:
          format: one of `export.FORMATS`, or the dotted path of an exporter.
          options: of the format; others than "soup_jax" take `dtype`: float32, bfloat16 or
            float16.

        Raises:
          UserError: the folder holds something else, there is no such format or option, or the
            format does not fit the network.
        """
        export(self, pathlib.Path(folder), format=format, **options)

    def generate(
        self,
        prompt: str,
        *,
        max_tokens: int = 100,
        temperature: float = 0.8,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> str:
        """The text that it adds to `prompt`.

        Args:
          temperature: 0 takes the likeliest token.
          top_p: draw from the likeliest tokens that have this much of the probability together.
          seed: of the sampling; the same call gives the same text.
          stop: texts before which it ends.

        Raises:
          UserError: its network is no language model, or a setting means nothing.
        """
        sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
        (text,) = self.generate_batch([prompt], max_tokens=max_tokens, sampling=sampling, stop=stop)
        return text

    def generate_batch(
        self,
        prompts: Sequence[str],
        *,
        max_tokens: int = 100,
        sampling: Sampling = DEFAULT_SAMPLING,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """What it adds to each of many prompts, which are decoded together.

        The seed of prompt i is `sampling.seed` + i. Sums of several rows may be rounded in another
        way than those of one, so now and then a text differs from that of `generate`.

        Raises:
          UserError: as `generate`.
        """
        requests = [
            Request(
                self.prompt_ids(prompt, max_tokens),
                max_tokens,
                dataclasses.replace(sampling, seed=(sampling.seed + i) % (1 << 32)),
                tuple(stop),
            )
            for i, prompt in enumerate(prompts)
        ]
        pieces: list[list[str]] = [[] for _ in prompts]
        for index, piece in generate_texts(
            self.model,
            self.params,
            self.tokenizer,
            requests,
            seq_len=self.recipe["seq_len"],
            eos_id=self.recipe["eos_id"],
        ):
            pieces[index].append(piece)
        return ["".join(p) for p in pieces]

    def score(self, texts: Sequence[str]) -> list[Score]:
        """How well it predicts each text: nats of its tokens, tokens and bytes.

        Raises:
          UserError: its network is no language model.
        """
        return score_texts(
            self.model,
            self.params,
            self.tokenizer,
            texts,
            eos_id=self.recipe["eos_id"],
            seq_len=self.recipe["seq_len"],
        )

    def prompt_ids(self, prompt: str, max_tokens: int = 0) -> list[int]:
        """Ids of a prompt: training windows start after an end-of-text token, and so does it.

        Warns of prompts, and of texts with them, that are longer than those windows.
        """
        seq_len = self.recipe["seq_len"]
        ids = [self.recipe["eos_id"], *self.tokenizer.encode(prompt)]
        if len(ids) > seq_len:
            _log.warning(
                "the prompt has %d tokens, more than the %d of the windows that the model was "
                "trained on: only its last %d are read",
                len(ids) - 1,
                seq_len,
                seq_len,
            )
        elif len(ids) + max_tokens > seq_len:
            _log.warning(
                "prompt and max_tokens have %d tokens, the windows that the model was trained on "
                "%d: beyond that the text gets worse",
                len(ids) - 1 + max_tokens,
                seq_len,
            )
        return ids


def _check_leaves(leaves: Mapping[str, np.ndarray], model: BaseModel, folder: pathlib.Path) -> None:
    wanted = tree.flatten(jax.eval_shape(model.init, jax.random.key(0)))
    for path in sorted(wanted.keys() | leaves.keys()):
        here, there = (x[path].shape if path in x else "absent" for x in (leaves, wanted))
        if here != there:
            raise UserError(
                f"{folder}: params.safetensors is not of the network that its recipe.json (or "
                f"`model`) describes: {path} is {here}, expected {there}"
            )
        if not np.isfinite(leaves[path].astype(np.float32)).all():
            raise UserError(
                f"{folder}: the parameters are not finite ({path}): make it again, from an earlier "
                "step of the run (`instantiate --step`)"
            )
