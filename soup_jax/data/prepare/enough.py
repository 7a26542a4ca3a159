"""Whether the sources have enough text for the domains and windows that a config asks for."""

import shlex
from typing import Any

import numpy as np

from soup_jax.data.corpus import CLEANED
from soup_jax.data.damage import Report, listed
from soup_jax.data.prepare import shards
from soup_jax.data.prepare.given import given_domains
from soup_jax.data.prepare.work import Work
from soup_jax.errors import UserError


def check(work: Work, totals: dict[str, int], report: Report) -> None:
    """UserError for too few documents, or other domains in them than the config has."""
    field, names = work.cfg.corpus.domain_field, given_domains(work)
    if field and names and len(names) != work.cfg.num_domains:
        raise UserError(
            f"the sources name {len(names)} domains in the field {field!r} "
            f"({listed(names, most=3)}), and num_domains is {work.cfg.num_domains}: give "
            f"--config.num_domains={len(names)}, or another field as --config.corpus.domain_field"
        )
    num_documents = num_bytes = 0
    for path in work.documents:
        shard = shards.load(path, "split", "offsets")
        train = shard["split"] == 0
        num_documents += int(np.count_nonzero(train))
        num_bytes += int(np.diff(shard["offsets"])[train].sum())
    if num_documents < work.cfg.num_domains:
        raise UserError(
            f"the sources hold {num_documents} train documents, fewer than num_domains = "
            f"{work.cfg.num_domains} ({_why_so_few(totals, report)}"
        )
    # A token has a byte or more, and a document one end: refused now rather than after stage 6.
    check_padding(work.cfg, num_bytes + num_documents, work.cfg.num_domains * work.cfg.seq_len)


def _why_so_few(totals: dict[str, int], report: Report) -> str:
    reasons = [
        f"{totals['documents']} documents read, {totals['duplicates']} duplicates and "
        f"{totals['too_short']} too short ones dropped"
        + "".join(f", {totals[name]} {words}" for name, words in CLEANED.items() if name in totals)
        + ")",
        *report.lines(),
    ]
    if report.counts.get("no_text", 0) <= totals["documents"]:
        pass  # a few odd records, and the field is the right one
    elif field := report.text_field():
        flag = shlex.quote(f"--config.corpus.text_field={field}")
        reasons.append(f"If {field!r} holds the text, give {flag}")
    else:
        reasons.append(
            "A text is a string in a field of the object itself; `jq -c '{text: .path.to.text}'` "
            "writes such lines"
        )
    return ". ".join([*reasons, "Else add sources or lower --config.num_domains"])


def check_padding(cfg: Any, num_tokens: int, num_targets: int) -> None:
    """UserError for windows that would be padding for the most part."""
    if num_targets > 2 * num_tokens:
        raise UserError(
            f"seq_len = {cfg.seq_len} is too long for these sources: {num_tokens:,} train tokens "
            f"in windows of {cfg.num_domains} domains have {num_targets:,} targets, of which "
            f"{1 - num_tokens / num_targets:.0%} would be padding, and half is the most. Lower "
            "--config.seq_len or --config.num_domains, or add sources"
        )
