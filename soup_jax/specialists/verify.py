"""Read everything of a corpus, a run or a specialist, and compare it with what was written."""

import pathlib

from soup_jax import places, remote
from soup_jax.config import schema as config_lib
from soup_jax.data.corpus import Corpus, artefacts_of, open_corpus
from soup_jax.errors import DamagedError, UserError
from soup_jax.specialists import recipe as recipe_lib
from soup_jax.specialists.open import load
from soup_jax.specialists.stored import blocks
from soup_jax.training import metrics
from soup_jax.training.checkpoint import Checkpointer


def verify(path: str | pathlib.Path) -> list[str]:
    """Lines on what was compared, by kind of folder: corpus, run, soup folder or specialist.

    Of a run it holds one item of a checkpoint (parameters or optimizer state) in memory at a time.

    Raises:
      UserError: no such folder, or everything in it that is damaged.
    """
    if remote.is_object(path) and remote.stat(f"{remote.spelled(path)}/manifest.json"):
        return _verify_corpus(open_corpus(path))
    place, path = path, places.local(path)
    if (path / "manifest.json").exists():
        return _verify_corpus(open_corpus(path))
    if (path / "recipe.json").exists():
        made = recipe_lib.read_any(path)
        kind = f"specialist of step {made.get('step')}"
        if "exported" in made:
            kind += f", exported as {made['exported']['format']}"
        return [f"{path}: {kind}, files as they were written"]
    if (path / "soup.json").exists():
        soup, damage = load(path), []
        for name in soup.arrays.shapes:
            try:
                for _ in blocks(soup.arrays, [name]):
                    pass
            except DamagedError as e:
                damage.append(str(e))
        if damage:
            raise UserError("\n".join(damage))
        return [f"{path}: soup folder of step {soup.step}, all of it as it was written"]
    if (path / "config.json").exists():
        return _verify_run(path, place)
    raise UserError(
        f"{path} is no corpus, run, soup folder or specialist: it has no manifest.json, "
        "config.json, soup.json or recipe.json"
    )


def _verify_corpus(corpus: Corpus) -> list[str]:
    corpus.verify()
    place = corpus.cache.address if corpus.cache else corpus.path
    num_files = len(artefacts_of(corpus.manifest))
    return [f"{place}: corpus, {num_files} files as they were written"]


def _verify_run(path: pathlib.Path, run: str | pathlib.Path) -> list[str]:
    config_lib.load(path / "config.json")
    lines, problems = [], []
    if (path / "checkpoints").exists() and not (path / "checkpoints").is_dir():
        raise UserError(
            f"{path}/checkpoints is a file, where a run has a folder: put the folder back, or "
            "delete the file and train again"
        )
    with Checkpointer(places.checkpoints(run)) as reader:
        for step, (problem, note) in reader.verify().items():
            place = f"{reader.directory}/{step}"
            if problem:
                problems.append(f"{place}: {problem}")
            else:
                lines.append(f"{place}: {note}")
    kept, all_lines = metrics.count_lines(path / "metrics.jsonl")
    if kept < all_lines:
        problems.append(f"{path}/metrics.jsonl: {all_lines - kept} of {all_lines} lines damaged")
    if problems:
        raise UserError(f"{path} is damaged:\n  " + "\n  ".join([*problems, *lines]))
    return [*lines, f"{path}: run, {len(lines)} checkpoints and {kept} lines of metrics are sound"]
