"""The soup as an oracle of data mixtures: domain weights to train another model on.

Theta(h) stands for a model that was trained on the mixture h. So the h at which the soup predicts
target documents best is a guess, without training, at the mixture that suits them. The search is
that of specialists (`search`, over "h"). A floor keeps h near the natural frequencies: as far as
the soup at h still predicts the corpus's own validation windows.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from soup_jax.config import schema as config_lib
from soup_jax.data.domain_histogram import DocumentHistogram, document_histogram
from soup_jax.data.domain_report import MOST_EPOCHS, repeated
from soup_jax.errors import DamagedError, UserError
from soup_jax.evaluation.sets import TokenSet, pack, validation_set
from soup_jax.specialists.finetune import held_back
from soup_jax.specialists.search import Found, mean_loss
from soup_jax.specialists.trained import Soup

_HALVINGS = 6  # of [0, 1], in which t lies
_REPEATED = 0.1  # of h, from which on repetition is told


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Domain weights for target documents, and what the soup predicts of them.

    Attributes:
      h_K: float64, sums to 1; domains without training windows get none.
      t: h_K = (1 - t) * natural frequencies + t * what the search found; 1 without a floor.
      histogram: of the documents that were not held back, where the search began.
      search: what it found from there.
      num_held: documents held back from both.
      losses: {"target": {...}, "validation": {...}}, nats per token of the documents held back and,
        with a floor, of the corpus's validation windows. Each has the losses of Theta(h) at the
        natural frequencies ("generic_h"), the "histogram", what was "found" (t = 1), and h_K
        ("mixture").
    """

    h_K: np.ndarray
    t: float
    histogram: DocumentHistogram
    search: Found
    num_held: int
    losses: dict[str, dict[str, float]]


def find_mixture(
    soup: Soup, texts: Sequence[str], *, generic_within: float | None = None
) -> Mixture:
    """The domain weights at which the soup predicts documents best.

    One of five documents is held back, by a hash of its text; the others give the histogram, and
    the search goes on from there.

    Args:
      texts: the target documents, at least two.
      generic_within: the floor: by what share the loss on the corpus's validation windows
        (`evaluate.max_windows` of them) may be above that at the natural frequencies. t is 1 if
        that keeps it; else six halvings of [0, 1] lead to a multiple of 1/64 that does, the largest
        if the loss grows with t.

    Raises:
      UserError: a soup without experts, fewer than two documents, a floor that is negative or no
        number, or one without the corpus or its validation windows.
    """
    if generic_within is not None and not 0 <= generic_within < np.inf:
        raise UserError(f"generic_within = {generic_within} must be a number of at least 0")
    if not soup.num_experts:
        raise UserError(
            f"{soup.place} has no experts, so that its one model is the same at every mixture: "
            "give the run of a soup"
        )
    fitted, held = held_back(texts)
    if not fitted or not held:
        raise UserError("a mixture needs at least two target documents: one of them is held back")
    scored = _scored(soup, held, floor=generic_within is not None)
    histogram = document_histogram(soup.map, fitted)
    try:
        _, _, (search,) = soup.find(histogram.h_K[None], [fitted], ["search_h"])
        assert search is not None  # by this method there is one
        # Its softmax leaves domains a little that have no windows to draw; none may have it.
        natural_K = soup.map.domain_frequencies
        found_K = np.where(natural_K > 0, search.h_K, 0.0)
        found_K /= found_K.sum()
        weights = {"generic_h": natural_K, "histogram": histogram.h_K, "found": found_K}
        losses: dict[str, dict[str, float]] = {name: {} for name in scored}
        for column, h_K in weights.items():
            for name, loss in _losses(soup, h_K, scored).items():
                losses[name][column] = loss
        t, h_K = 1.0, found_K
        if generic_within is not None:
            most = (1 + generic_within) * losses["validation"]["generic_h"]
            windows = {"validation": scored["validation"]}

            def on_line(t: float) -> np.ndarray:
                return (1 - t) * natural_K + t * found_K

            t = _furthest(lambda t: _losses(soup, on_line(t), windows)["validation"] <= most)
            h_K = on_line(t)
        for name, loss in _losses(soup, h_K, scored).items():
            losses[name]["mixture"] = loss
    except DamagedError as e:
        return find_mixture(soup.earlier(e), texts, generic_within=generic_within)
    return Mixture(h_K, t, histogram, search, len(held), losses)


def _scored(soup: Soup, held: Sequence[str], *, floor: bool) -> dict[str, TokenSet]:
    most = soup.cfg.evaluate.max_windows
    domains, seq_len = soup.map, soup.cfg.seq_len
    found = {}
    found["target"] = pack(
        domains.tokenizer(), held, eos_id=domains.eos_id, seq_len=seq_len, max_windows=most
    )
    if floor:
        try:
            found["validation"] = validation_set(soup.corpus, max_windows=most)
        except UserError as e:
            raise UserError(f"generic_within needs the corpus's validation windows: {e}") from e
    return found


def _losses(soup: Soup, h_K: np.ndarray, scored: dict[str, TokenSet]) -> dict[str, float]:
    # Not by `at`, which would go on with an older checkpoint: all losses are of one.
    (made,) = soup.make(h_K[None], soup.coefficients(h_K[None]))
    return {name: mean_loss(soup.model, made.params, windows) for name, windows in scored.items()}


def _furthest(keeps: Callable[[float], bool]) -> float:
    # 1, or the end of the last half that begins where it is kept; 0, the natural h, always is.
    if keeps(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return low


def epochs(soup: Soup, h_K: np.ndarray) -> np.ndarray:
    """float64 [K]: how often a run on mix(h), as long as the soup's, sees each train window."""
    cfg = config_lib.load(soup.workdir / "config.json")  # the soup's own has the batch size of here
    windows_K = np.array([entry["windows"]["train"] for entry in soup.map.domains])
    return cfg.num_steps * cfg.batch_size * h_K / np.maximum(windows_K, 1)


def repetition_warning(soup: Soup, h_K: np.ndarray) -> str:
    """A sentence, if more than _REPEATED of h lies on domains that such a run sees too often."""
    times_K = epochs(soup, h_K)
    share = h_K[times_K > MOST_EPOCHS].sum()
    if share <= _REPEATED:
        return ""
    words = repeated(times_K, soup.map, num_steps=soup.cfg.num_steps)
    return (
        f"{share:.0%} of the weights lie on small domains: {words}, if the run is as long as the "
        "soup's. The predicted losses know nothing of that and are too good: add text, train for "
        "fewer steps, or keep closer to the natural frequencies (generic_within)"
    )


def table(soup: Soup, found: Mixture, *, most: int = 0) -> str:
    """The domains as aligned text, the heaviest of h_K first, at most `most`; 0: all."""
    order, times_K = np.argsort(-found.h_K, kind="stable"), epochs(soup, found.h_K)
    lines = ["domain       h  histogram  corpus   times  label"]
    for k in order[: most or None]:
        lines.append(
            f"{k:>6}  {found.h_K[k]:>6.1%}  {found.histogram.h_K[k]:>9.1%}  "
            f"{soup.map.domain_frequencies[k]:>6.2%}  {times_K[k]:>6.1f}  {soup.map.label(int(k))}"
        )
    if 0 < most < len(order):
        lines.append(f"   ...  {found.h_K[order[most:]].sum():>6.1%}  {len(order) - most} more")
    return "\n".join(
        [
            *lines,
            "(times: how often a run on h sees each window, if it is as long as the soup's)",
        ]
    )


def losses_table(found: Mixture) -> str:
    """What the search did, where the floor left h, and the losses, as text."""
    steps = found.search.steps
    lines = [f"search on {found.histogram.num_documents} documents: {steps} steps"]
    if not steps:
        lines[0] += ": nothing was surely better, and the histogram stays"
    columns = {"generic_h": "generic_h", "histogram": "histogram", "found": "found"}
    if "validation" in found.losses:
        lines.append(f"h = {1 - found.t:.4g} * natural frequencies + {found.t:.4g} * found")
        columns["mixture"] = "h"
    lines.append(f"{'':<32}" + "".join(f"  {name:>9}" for name in columns.values()))
    names = {"target": f"{found.num_held} documents held back", "validation": "generic validation"}
    for name, losses in found.losses.items():
        numbers = "".join(f"  {losses[column]:>9.4f}" for column in columns)
        lines.append(f"{names[name]:<32}{numbers}")
    return "\n".join([*lines, "(nats per token, of the soup merged at each h; lower is better)"])
