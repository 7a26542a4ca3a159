"""Does `prepare` find near duplicates and contamination in these sources? Planted ones tell.

Documents of the sources are copied with changes, and read and cleaned together with the originals
by the very stages of `prepare`, in a temporary folder.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from soup_jax import storage as files
from soup_jax.data import sources as corpus_lib
from soup_jax.data.damage import Report
from soup_jax.data.prepare import shards
from soup_jax.data.prepare.clean import clean, sign
from soup_jax.data.prepare.work import Work
from soup_jax.data.readers import text_hash
from soup_jax.errors import UserError

NUM_PLANTED = 200  # of each kind
MIN_WORDS, MAX_CHARS = 60, 20_000
# Shares of words that are replaced: 5-grams then have a Jaccard similarity of 0.95 or so, and more
# than 70% of the 8-grams are left.
NEAR_EDITS, CONTAMINATED_EDITS = 0.005, 0.03


def self_test(cfg: Any) -> tuple[list[str], bool]:
    """Lines on what was planted and found, and whether all of it was.

    Raises:
      UserError: the sources have too few documents of MIN_WORDS words.
    """
    rng = np.random.default_rng(0)
    texts = _texts(cfg, 3 * NUM_PLANTED)
    near, contaminated, around = (texts[i::3] for i in range(3))
    planted = {
        "near duplicates": [_edited(text, NEAR_EDITS, rng) for text in near],
        # In other text, as a page quotes a test.
        "contaminated": [
            f"{other[:500]}\n{_edited(text, CONTAMINATED_EDITS, rng)}\n{other[-500:]}"
            for text, other in zip(contaminated, around)
        ],
    }
    with files.temporary_folder("self_test") as folder:
        originals = [*near, *around]
        _write(folder / "1-originals.jsonl", originals)
        for number, copies in enumerate(planted.values(), start=2):
            _write(folder / f"{number}-planted.jsonl", copies)
        _write(folder / "evaluation.jsonl", contaminated)
        cfg = cfg.copy_and_resolve_references()
        with cfg.unlocked():
            cfg.corpus.near_duplicates = cfg.corpus.near_duplicates or 0.8
            cfg.corpus.evaluation = (str(folder / "evaluation.jsonl"),)
            cfg.corpus.contaminated, cfg.corpus.text_field = "drop", "text"
            cfg.corpus.evaluation_text_field = ""
        left = _cleaned(cfg, folder)
    lines, good = [], True
    for name, copies in planted.items():
        found = sum(text_hash(copy) not in left for copy in copies)
        lines.append(f"{name}: {found} of {len(copies)} planted were found")
        good &= found == len(copies)
    lost = sum(text_hash(text) not in left for text in originals)
    lines.append(
        f"originals: {lost} of {len(originals)} were dropped with them (alike, or in one another)"
    )
    return lines, good


def _texts(cfg: Any, number: int) -> list[str]:
    found = corpus_lib.find_files(cfg.corpus.sources, report := Report())
    texts, seen = [], set()
    for document in corpus_lib.read_documents(found, cfg.corpus.text_field, report):
        text = document.text[:MAX_CHARS]
        if len(text.split()) >= MIN_WORDS and document.hash not in seen:
            seen.add(document.hash)
            texts.append(text)
        if len(texts) == number:
            return texts
    if len(texts) < 30:
        raise UserError(
            f"the self-test needs 30 documents of {MIN_WORDS} words or more; the sources have "
            f"{len(texts)}"
        )
    return texts


def _edited(text: str, share: float, rng: np.random.Generator) -> str:
    # Other words here and there, one at each end, other case, white space or quotes everywhere.
    words = text.split()
    for i in rng.choice(len(words), int(share * len(words)), replace=False):
        words[i] = f"planted{i}"
    words = ["planted", *words, "planted"]
    if rng.random() < 0.3:  # as a page is set
        return "\u00a0".join(words).replace('"', "\u201d").replace("'", "\u2019")
    return " ".join(words).upper() if rng.random() < 0.5 else "\n".join(words)


def _cleaned(cfg: Any, folder: pathlib.Path) -> set[bytes]:
    # The hashes of the documents that `prepare` goes on with.
    sources = corpus_lib.find_files(
        (str(folder / "1-originals.jsonl"), *map(str, sorted(folder.glob("[23]-*.jsonl")))),
        Report(),
    )
    work = Work(cfg, folder, sources, {}, ("train",), 1)
    reading = shards.Reading("text", 1, cfg.corpus.max_chars, 0, 0, work.splits)
    shards.read_group(work.path / "documents", 0, sources, reading)
    sign(work)
    clean(work)
    return {row.tobytes() for path in work.documents for row in shards.load(path, "hash")["hash"]}


def _write(path: pathlib.Path, texts: Sequence[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
