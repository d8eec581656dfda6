"""Result files of the suite: one JSON of rows, written after each row, resumed, compared, flattened to CSV."""

from __future__ import annotations

import csv
import json
import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import report

# Of provenance(): what must be the same for rows to stand in one file.
CONDITIONS = ("device", "threads", "versions", "commit", "python")
COLUMNS = ("subject", "mode", "size", "tokens", "rank", "dtype", "baseline", "least_bytes", "least_flops")
MEASURED = ("median_ms", "p20_ms", "p80_ms", "rounds", "ratio", "peak_bytes", "resident_bytes", "error")
NOISE_FLOOR = 0.03  # a median moves by so much from run to run on a machine that does nothing else
MEMORY_CHANGE = 0.01  # counted, not timed: it hardly varies


class ResultFile:
    """Rows by key. What an interrupted run under the same conditions finished is kept, and need not be done again."""

    def __init__(self, path: Path, conditions: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = conditions | {"complete": False, "rows": []}
        self.finished: set[str] = set()
        self.moved: Path | None = None
        if not path.exists():
            return
        found = load(path)
        if all(found.get(name) == conditions.get(name) for name in (*CONDITIONS, "quick", "budget_s")):
            self.content["rows"] = found["rows"]
            if not found["complete"]:
                self.finished = {row["key"] for row in found["rows"]}
        else:
            self.moved = path.with_suffix(".previous.json")
            os.replace(path, self.moved)

    def add(self, row: dict[str, Any]) -> None:
        rows = self.content["rows"]
        places = {known["key"]: index for index, known in enumerate(rows)}
        if row["key"] in places:
            rows[places[row["key"]]] = row
        else:
            rows.append(row)
        self.write()

    def close(self) -> None:
        self.content["complete"] = True
        self.write()

    def write(self) -> None:
        """Whole or not at all: a run that is killed here leaves the rows of before."""
        beside = self.path.with_suffix(".partial")
        report.write_json(beside, self.content)
        os.replace(beside, self.path)


def load(path: Path) -> dict[str, Any]:
    """A result file; ValueError if it is none."""
    return _parsed(path.read_text(encoding="utf-8"), str(path))


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
        raise ValueError(f"{where} holds no benchmark rows")
    return content


def load_other(name: str, path: Path) -> dict[str, Any]:
    """`name` is a result file, or a git ref, whose version of `path` is read."""
    if Path(name).is_file():
        return load(Path(name))
    try:
        return _parsed(_git_show(name, path.resolve()), f"{name}:{path.name}")
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        raise ValueError(f"{name} is neither a file nor a git ref that has {path.name}: {said.strip()}") from None


def _git_show(ref: str, path: Path) -> str:
    folder = next(parent for parent in path.parents if parent.is_dir())
    command = ["git", "-C", str(folder), "show", f"{ref}:./{path.relative_to(folder)}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def write_csv(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One line per contender; one that was left out has its reason and no numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*COLUMNS, "contender", *MEASURED, "left_out"])
        for row in rows:
            head = [row[name] for name in COLUMNS]
            for name, record in row["records"].items():
                writer.writerow([*head, name, *(record.get(field) for field in MEASURED), ""])
            for name, reason in row["left_out"].items():
                writer.writerow([*head, name, *[""] * len(MEASURED), reason])


@dataclass(frozen=True)
class Change:
    """A contender's time then and now, in units of its row's baseline where it is not that; its memory too."""

    title: str
    contender: str
    before_ms: float
    after_ms: float
    change: float  # of the ratio to the baseline, of the time for the baseline: 0.1 is slower by a tenth
    noise: float
    memory_change: float

    @property
    def moved(self) -> bool:
        return abs(self.change) > self.noise

    @property
    def memory_moved(self) -> bool:
        return abs(self.memory_change) > MEMORY_CHANGE


def changes(before: Iterable[dict[str, Any]], after: Iterable[dict[str, Any]]) -> list[Change]:
    """What changed in rows that both have.

    A ratio to the baseline cancels a machine that is slower today. Noise: the half widths p20 to p80 of all medians in
    the comparison, relative, as independent errors, and no less than NOISE_FLOOR.
    """
    old_rows, found = {row["key"]: row for row in before}, []
    for row in after:
        old = old_rows.get(row["key"])
        if old is None:
            continue
        baseline = row["baseline"]
        for name in row["records"].keys() & old["records"].keys():
            pair = [old["records"][name], row["records"][name]]
            times = [record["median_ms"] for record in pair]
            relative = name != baseline and baseline in old["records"] and baseline in row["records"]
            references = [old["records"][baseline], row["records"][baseline]] if relative else []
            units = [record["median_ms"] for record in references] or [1.0, 1.0]
            noise = sum(_spread(record) ** 2 for record in (*pair, *references)) ** 0.5
            found.append(
                Change(
                    row["title"],
                    name,
                    times[0],
                    times[1],
                    (times[1] / units[1]) / (times[0] / units[0]) - 1,
                    max(noise, NOISE_FLOOR),
                    pair[1]["peak_bytes"] / max(pair[0]["peak_bytes"], 1) - 1,
                )
            )
    return found


def _spread(record: dict[str, Any]) -> float:
    return (record["p80_ms"] - record["p20_ms"]) / 2 / record["median_ms"]
