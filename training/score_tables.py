"""Accuracy of many answers in groups: percent, 95 % intervals and Markdown tables."""

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable


def interval(right: int, total: int) -> tuple[float, float]:
    """95 % confidence interval of a share in percent (Wilson, 1927), given `right` of `total`."""
    z = 1.959964
    share, weight = right / total, z * z / total
    centre = (share + weight / 2) / (1 + weight)
    spread = z / (1 + weight) * math.sqrt(share * (1 - share) / total + weight / (4 * total))
    return 100 * max(0.0, centre - spread), 100 * min(1.0, centre + spread)


def grouped(answers: Iterable[dict], key: Callable[[dict], Hashable]) -> dict[Hashable, list[dict]]:
    """Answers by what `key` says of them, in order of first appearance."""
    groups: dict[Hashable, list[dict]] = defaultdict(list)
    for answer in answers:
        groups[key(answer)].append(answer)
    return dict(groups)


def accuracy(answers: list[dict]) -> dict[str, float | int]:
    """Questions, right ones, percent and interval; every answer has a bool `right`."""
    right = sum(answer["right"] for answer in answers)
    low, high = interval(right, len(answers))
    percent = 100 * right / len(answers)
    return {
        "questions": len(answers),
        "right": right,
        "percent": round(percent, 1),
        "low": round(low, 1),
        "high": round(high, 1),
    }


def cell(score: dict | None) -> str:
    """An accuracy as it stands in a table: percent (interval)."""
    return "" if score is None else f"{score['percent']:.1f} ({score['low']:.0f}–{score['high']:.0f})"


def markdown(header: list[str], rows: list[list[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(value) for value in line) + " |" for line in lines)
