"""Results of several runs side by side: as one dict, as a table, and in a sentence."""

import math
from typing import Any


def combine(result: dict[str, Any], other: dict[str, Any], name: str) -> None:
    """Add another run's own specialists to `result` as the column `name`."""
    for specialist, row in result["specialists"].items():
        row[name] = other["specialists"][specialist]["specialist"]
    result["average"][name] = other["average"]["specialist"]
    result["generic_validation"][name] = other["generic_validation"]["generic_h"]


def table(result: dict[str, Any], *, metric: str = "loss") -> str:
    """The result as aligned text, one line per specialist; the best column of a line is starred."""
    columns = list(result["average"])
    width = max([len(n) for n in result["specialists"]] + [len("generic validation")])
    widths = [max(len(c), 9) for c in columns]

    def line(name: str, values: dict[str, Any]) -> str:
        numbers = [values.get(c, {}).get(metric) for c in columns]
        best = min((n for n in numbers if n is not None and math.isfinite(n)), default=None)
        cells = [
            " " * w if n is None else f"{n:.4f}{'*' if n == best else ' '}".rjust(w)
            for n, w in zip(numbers, widths)
        ]
        return f"{name:<{width}}  " + "  ".join(cells)

    header = f"{'':<{width}}  " + "  ".join(c.rjust(w - 1) + " " for c, w in zip(columns, widths))
    lines = [header, *(line(n, row) for n, row in result["specialists"].items())]
    lines += ["", line("average", result["average"])]
    if result["generic_validation"]:
        lines.append(line("generic validation", result["generic_validation"]))
    unit = "nats per token" if metric == "loss" else "bits per byte"
    return (
        "\n".join(text.rstrip() for text in lines)
        + f"\n({unit}; lower is better; * best of the line)"
        + _left_out(result)
    )


def _left_out(result: dict[str, Any]) -> str:
    counts = {n: row.get("documents_in_training") for n, row in result["specialists"].items()}
    known = [f"{count} of {name}" for name, count in counts.items() if count]
    return f"\n(documents in the training text are not scored: {', '.join(known)})" * bool(known)


def verdict(result: dict[str, Any]) -> str:
    """What the table says, in one sentence per column that the specialists are compared with."""
    average = result["average"]
    ours = average["specialist"]["loss"]
    sentences = []
    for column, value in average.items():
        if column == "specialist":
            continue
        gain = value["loss"] - ours
        if not math.isfinite(gain):
            sentences.append(f"specialists and {column} have no averages to compare")
            continue
        word = "better" if gain > 0 else "WORSE"
        than = f"{abs(gain):.4f} nats {word} than" if abs(gain) >= 5e-5 else "as good as"
        rows = result["specialists"].values()
        wins = sum(row["specialist"]["loss"] < row[column]["loss"] for row in rows)
        sentences.append(
            f"specialists are {than} {column} on average, and better on {wins} of {len(rows)} sets"
        )
    return "\n".join(sentences)


def not_numbers(result: dict[str, Any]) -> list[str]:
    """COLUMN of LINE for every loss of the table, averages aside, that is no finite number."""
    lines = result["specialists"] | {"generic validation": result["generic_validation"]}
    return [
        f"{column} of {name}"
        for name, line in lines.items()
        for column in result["average"]
        if column in line and not math.isfinite(line[column]["loss"])
    ]
