"""From a run to a soup folder (`folder`), with a card that says what it is."""

import pathlib
import tempfile
from typing import Any

from soup_jax import places, remote, tree
from soup_jax import storage as files
from soup_jax.config import schema as config_lib
from soup_jax.errors import DamagedError
from soup_jax.specialists import folder as folder_lib
from soup_jax.specialists.open import load
from soup_jax.specialists.trained import Soup
from soup_jax.training import metrics

_CARD = """# {name}, a soup of experts

{num_experts} experts over {num_domains} domains of text, around a base network of {base:,}
parameters: one small model for each set of domain weights, without training. It was trained with
soup_jax ({tokens:,} tokens, {steps:,} of {num_steps:,} steps); this folder has all that specialists
need, and of the text no more than words: the tokenizer's, the embedder's and the domains' labels.

    soup-jax instantiate --run=FOLDER --documents=mine.jsonl --out=specialist
    soup-jax generate --model=specialist --prompt="..."

| | |
| --- | --- |
| base network | {network}, vocabulary of {vocab_size:,}, trained on {seq_len:,} tokens at a time |
| bank | {bank:,} parameters, stored as {dtype} |
| corpus | fingerprint {fingerprint} |
{losses}
The largest domains: {domains}.

## Licence

What may be done with the parameters depends on the text that they were trained on. The text is
named in the run's config (`corpus.sources` in config.json), its licences are not.
"""


def pack(
    run: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    step: int | None = None,
    average: int = 1,
    dtype: str = "",
    corpus_dir: str = "",
) -> Soup:
    """Write the soup folder of a run, with one block of the bank in memory; returns it, opened, or
    the soup that was packed if the folder is at an address.

    Args:
      step: of the checkpoint; None takes the newest readable one.
      average: see `open.load`.
      dtype: of the bank in the folder, "float32" or "bfloat16"; "": as the run stores it.
      corpus_dir: where the corpus of a run of an earlier version lies, if it was moved.

    Raises:
      UserError: no run, no such checkpoint, a damaged one, or a place with something else in it.
    """
    out = pathlib.Path(out)
    check_target(out)
    soup = load(run, step=step, average=average, corpus_dir=corpus_dir)
    stored = [s for n, s in soup.arrays.shapes.items() if n.startswith("bank/")]
    parent = tempfile.gettempdir() if remote.is_object(out) else out.parent
    files.check_room(parent, tree.num_bytes(soup.arrays.shapes), f"the soup folder {out}")
    while True:
        try:
            folder_lib.write(
                soup.arrays,
                out,
                config=soup.workdir / "config.json",
                domains=soup.map,
                described={"name": soup.cfg.name, "step": soup.step, "run": soup.place},
                card=_card(soup, dtype or (str(stored[0].dtype) if stored else "float32")),
                dtype=dtype,
            )
        except DamagedError as e:
            soup = soup.earlier(e)
        else:
            return soup if remote.is_object(out) else load(out)


def check_target(out: pathlib.Path) -> None:
    """Refuse a place that holds anything but a soup folder; call it before work starts.

    Raises:
      UserError: it is a file, a folder with other content, or cannot be written.
    """
    places.check_replaceable(out, "soup.json", "is no soup folder")


def _card(soup: Soup, dtype: str) -> str:
    cfg, shapes = soup.cfg, soup.arrays.shapes
    sizes = {
        part: tree.num_params([s for n, s in shapes.items() if n.startswith(f"{part}/")])
        for part in ("shared", "bank")
    }
    order = soup.map.domain_frequencies.argsort()[::-1][:10]
    trained = config_lib.load(soup.workdir / "config.json")  # `soup.cfg` is for the devices here
    return _CARD.format(
        name=cfg.name,
        num_experts=soup.num_experts,
        num_domains=soup.num_domains,
        base=sizes["shared"],
        bank=sizes["bank"],
        dtype=dtype,
        network=cfg.model.kind or "of its own",
        tokens=soup.step * trained.batch_size * trained.seq_len,
        steps=soup.step,
        num_steps=cfg.num_steps,
        vocab_size=cfg.vocab_size,
        seq_len=cfg.seq_len,
        fingerprint=soup.map.fingerprint[:12],
        losses=_losses(soup),
        domains="; ".join(soup.map.label(int(k)) for k in order),
    )


def _losses(soup: Soup) -> str:
    path = soup.workdir / "metrics.jsonl"
    lines: list[dict[str, Any]] = metrics.read_metrics(path) if path.exists() else []
    done = [line for line in lines if line["step"] <= soup.step and "loss" in line]
    if not done:
        return ""
    last = done[-1]
    return f"| loss in training | {last['loss']:.4f} nats a token, at step {last['step']} |\n"
