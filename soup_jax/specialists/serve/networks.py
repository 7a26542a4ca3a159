"""What texts are decoded with: a network for each specialist, or one for all.

Merged parameters, in the form that decoding takes, and caches are kept by least recent use under a
limit, and made again when they are needed. Low-rank experts are not merged: their factors and S are
one network, and texts of all specialists are rows of one batch, each with its coefficients
(soup_jax/soup/low_rank.py).
"""

import collections
import dataclasses

import jax
import numpy as np

from soup_jax import tree
from soup_jax.shapes import Params
from soup_jax.soup.low_rank import unmerged
from soup_jax.specialists.decoding import cache_bytes, lane_length
from soup_jax.specialists.generate import Batch, Request
from soup_jax.specialists.trained import Soup

_ALL = ""  # the place of all specialists together


class Networks:
    """The networks of a resident soup, by their places: names of specialists, or one for all."""

    def __init__(self, soup: Soup, *, memory_bytes: int, rows: int, text_len: int):
        """None is made yet.

        Args:
          memory_bytes: of merged parameters and caches; at least one network is kept.
          rows: of a batch.
          text_len: tokens of the longest text with its prompt.
        """
        self._soup, self._rows = soup, rows
        self._is_merged = jax.eval_shape(self._all) is None
        length = lane_length(soup.model, seq_len=soup.cfg.seq_len, text_len=text_len)
        # Of all rows at their longest, whether they are in use or not.
        num_bytes = tree.num_bytes(soup.params["shared"]) + rows * cache_bytes(soup.model, length)
        self._most = max(1, memory_bytes // num_bytes)
        self._made: collections.OrderedDict[str, Batch] = collections.OrderedDict()

    def _all(self) -> Params | None:
        params, leaves = self._soup.params, self._soup.model.row_products
        return unmerged(params["shared"], params["bank"], leaves=leaves)

    def place(self, name: str) -> str:
        """Where a specialist's texts are decoded."""
        return name if self._is_merged else _ALL

    def get(self, place: str) -> Batch | None:
        """The texts of a place, if it is there."""
        return self._made.get(place)

    def busy(self) -> list[str]:
        """Places with texts under way."""
        return [place for place, batch in self._made.items() if batch.busy]

    def submit(self, name: str, alpha_E: np.ndarray, number: int, request: Request) -> None:
        """Queue a text of a specialist under a number.

        Raises:
          UserError: as `Batch.submit`.
        """
        if not self._is_merged:
            request = dataclasses.replace(request, alpha_E=tuple(alpha_E.tolist()))
        self._ready(name, alpha_E).submit(number, request)

    def forget(self, name: str) -> None:
        """Drop what belongs to a specialist alone; texts under way in it are lost."""
        if self._is_merged:
            self._made.pop(name, None)

    def fail(self, place: str) -> None:
        """Drop the network of a place, and all texts in it."""
        self._made.pop(place, None)

    def _ready(self, name: str, alpha_E: np.ndarray) -> Batch:
        place, soup = self.place(name), self._soup
        if place not in self._made:
            # Those not used for longest make room first. Those with texts under way stay, and so
            # can hold more than the limit for a while.
            for other in [p for p, batch in self._made.items() if not batch.busy]:
                if len(self._made) >= self._most:
                    del self._made[other]
            params = soup.on_devices(alpha_E) if self._is_merged else self._all()
            assert params is not None
            self._made[place] = Batch(
                soup.model,
                params,
                max_rows=self._rows,
                seq_len=soup.cfg.seq_len,
                eos_id=soup.map.eos_id,
            )
        self._made.move_to_end(place)
        return self._made[place]
