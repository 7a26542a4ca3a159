"""The report as one HTML file: numbers as JSON, style and script inside, nothing to fetch.

Texts of configs, paths and labels are anybody's. They stand in the JSON alone, which cannot end
its element, and the script makes text of them, never HTML. The page's own policy allows no other
script or style than these, by their hashes, and no request at all.
"""

import base64
import hashlib
import html
import json
import math
import pathlib
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from typing import Any

import soup_jax
from soup_jax import storage as files
from soup_jax.errors import UserError
from soup_jax.reports import curves, goodput, runs, tables
from soup_jax.reports.groups import group

_PAGE = pathlib.Path(__file__).parent / "page"
_DIGITS = 6  # of a number; what is drawn and read needs no more


def report(
    patterns: Sequence[str], *, out: str | pathlib.Path, command: Sequence[str] = ()
) -> dict[str, Any]:
    """Write a page about runs.

    Args:
      patterns: runs, folders above runs, globs.
      out: the HTML file.
      command: that asked for it, to be shown.

    Returns:
      What the page holds as JSON, see `contents`.

    Raises:
      UserError: a pattern means no run, or no run can be read. One of several that cannot is
        named on the page, under "unread" in its JSON.
    """
    read, unread = [], list[UserError]()
    for place in runs.find(patterns):
        try:
            read.append(runs.read(place))
        except UserError as e:
            unread.append(e)
    if not read:
        raise unread[0]
    found = {**contents(read, command=command), "unread": [str(e) for e in unread]}
    files.write_text(out, page(found))
    return found


def contents(found: Sequence[runs.RunFiles], *, command: Sequence[str] = ()) -> dict[str, Any]:
    """All that the page shows, ready for JSON but for numbers that are not finite."""
    groups = group(found)
    names = {str(run.config.get("name", "")) for run in found}
    return {
        "name": names.pop() if len(names) == 1 else "",
        "made": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "version": soup_jax.__version__,
        "command": shlex.join(command),
        "groups": [
            {
                "label": each.label,
                "runs": [run.name for run in each.runs],
                "seeds": each.seeds,
                "experts": each.num_experts,
                "tokens_per_step": curves.tokens_per_step(each.runs[0]),
            }
            for each in groups
        ],
        "charts": curves.curves(groups),
        "specialists": tables.specialists(groups),
        "alpha": tables.coefficients(groups),
        "domains": tables.domains(groups),
        "runs": goodput.runs(groups),
        "kinds": goodput.KINDS,
        "configs": tables.configs(groups),
    }


def page(found: Mapping[str, Any]) -> str:
    """The HTML of `contents`."""
    script, style = (_PAGE / "app.js").read_text("utf-8"), (_PAGE / "style.css").read_text("utf-8")
    labels = ", ".join(each["label"] for each in found["groups"])
    parts = {
        "policy": f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; "
        "base-uri 'none'; form-action 'none'",
        "title": html.escape(labels if len(labels) <= 80 else f"{labels[:77]}..."),
        "style": style,
        "script": script,
        "data": embedded(found),
    }
    # A folder's name may be no UTF-8; the JSON has its escapes.
    parts["title"] = parts["title"].encode("utf-8", "replace").decode()
    template = (_PAGE / "index.html").read_text("utf-8")
    # In one pass: what a label says is no place of the template.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def embedded(value: Any) -> str:
    """JSON that may stand inside a <script>: no character of it can end the element, and a number
    that is not finite is a text, NaN, Infinity or -Infinity."""
    text = json.dumps(_plain(value), separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    if isinstance(value, float):
        if math.isnan(value):
            return "NaN"
        if math.isinf(value):
            return "Infinity" if value > 0 else "-Infinity"
        short = float(f"{value:.{_DIGITS}g}")
        return int(short) if short.is_integer() and abs(short) < 1e15 else short
    return value
