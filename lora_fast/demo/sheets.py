"""Tables and verdicts of the demo's reports, and how they are printed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from rich.console import Console
from rich.table import Table

from .docstrings import LABELS
from .training import ACCURACY_BAR, Pair

Compared = TypeVar("Compared", bound=Pair[Any])


@dataclass(frozen=True)
class Sheet:
    """A table, for the terminal and for the page."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    note: str = ""


@dataclass(frozen=True)
class Check:
    """What was measured, what is required of it, and whether it is so."""

    what: str
    measured: str
    bar: str
    met: bool


@dataclass(frozen=True)
class Result(Generic[Compared]):
    """Trainings from one start, and what is required of them."""

    comparison: Compared
    quick: bool
    seed: int
    seconds: float

    def checks(self) -> list[Check]:
        return agreement(self.comparison, quick=self.quick)

    @property
    def correct(self) -> bool:
        return all(check.met for check in self.checks())


def agreement(pair: Pair[Any], *, quick: bool) -> list[Check]:
    """What is required of two trainings from one start; a few steps teach nothing, so not of ``quick`` ones that they
    learned."""
    steps = min(pair.compared_steps, len(pair.fast.losses))
    accuracy, chance, apart = 100 * pair.fast.accuracy, 100 / len(LABELS), 100 * pair.accuracy_difference
    checks = [
        Check(
            f"Both trainings have the same losses: largest relative difference in the first {steps} steps",
            f"{pair.worst_difference:.1e}",
            f"at most {pair.loss_bar:.0e}",
            pair.losses_agree,
        ),
        Check(
            "Both have the same accuracy on held-out texts: difference",
            f"{apart:.1f} points",
            f"at most {100 * ACCURACY_BAR:g} point",
            pair.accuracies_agree,
        ),
    ]
    if not quick:
        what = f"The model has learned: accuracy on held-out texts, where guessing gives {chance:g}%"
        checks.append(Check(what, f"{accuracy:.0f}%", f"at least {5 * chance:g}%", pair.learned))
    return checks


def show(console: Console, sheets: Iterable[Sheet], checks: Iterable[Check]) -> None:
    """Print the tables, the verdicts last."""
    for sheet in sheets:
        table = Table(title=sheet.title, title_justify="left", caption=sheet.note or None, caption_justify="left")
        for index, heading in enumerate(sheet.headings):
            table.add_column(heading, justify="right" if index else "left")
        for row in sheet.rows:
            table.add_row(*row)
        console.print(table)
        console.print()
    verdicts = Table(title="Checks", title_justify="left")
    for heading in ("check", "result", "measured", "required"):
        verdicts.add_column(heading, no_wrap=heading == "result")
    for check in checks:
        verdicts.add_row(check.what, "[green]met" if check.met else "[bold red]missed", check.measured, check.bar)
    console.print(verdicts)
