"""Tables of results in Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from .report import bound, digits

OURS = re.compile(r"lora_fast (LoRA|DoRA)$")  # what auto takes; the backends by name are contenders of their own


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def bars_lines(rows: Iterable[dict[str, Any]]) -> str:
    """Every bar of the rows as a line: what was measured, and the target."""
    return table(
        ["case", "measured as", "", "target"],
        (
            [_subject(row) + row["title"], bar["what"], digits(bar["measured"]), _target(bar)]
            for row in rows
            for bar in row["bars"]
        ),
    )


def _subject(row: dict[str, Any]) -> str:
    return next((f"{name}, " for name in row["records"] if OURS.match(name)), "")


def _target(bar: dict[str, Any]) -> str:
    return bound(bar) if bar["met"] else f"{bound(bar)}, **missed**"
