"""The last lines of the GPU's commands: a table of the bars, what is wrong, PASS or FAIL; from the files they wrote.

    python -m lora_fast.benchmarks.gpu_verdict DIR

DIR has first.json or gpu.json, and tests.log. Of a run that was cut off they tell what it found; with --whole that is a
failure. A missed bar is in the table and no failure. Needs neither a GPU nor PEFT.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from .gpu import faults
from .report import bound

COLUMNS = ("case", "measured as", "measured", "bar", "")


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each bar."""
    cells = [COLUMNS]
    for row in rows:
        for bar in row["bars"]:
            met = "met" if bar["met"] else "MISSED"
            cells.append((row["title"], bar["what"], f"{bar['measured']:.3f}", bound(bar), met))
    widths = [max(len(line[column]) for line in cells) for column in range(len(COLUMNS))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def wrong_items(checked: list[dict[str, Any]]) -> list[str]:
    return [f"{item['name']}, {item['backend']}, {item['dtype']}, {item['size']}" for item in checked if item["faults"]]


def tests(log: str, whole: bool) -> tuple[str, list[str]]:
    """(What the tests came to, what of it is wrong) from tests.log, which has a line for each and a summary.

    A run that was killed has no summary: its lines are counted.
    """
    summaries = re.findall(r"^=+ (.*(?:passed|failed|error|skipped|no tests ran).*) =+$", log, re.MULTILINE)
    cut_off = re.findall(r"^cut off after .*$", log, re.MULTILINE)
    if not summaries:
        words = re.findall(r"^(?:\[gw\d+\] .*?|\S+::.* )\b(PASSED|FAILED|ERROR)\b", log, re.MULTILINE)
        failed = len(words) - words.count("PASSED")
        summaries = [f"no summary, {failed} failed, {words.count('PASSED')} passed"]
    said = ", ".join([summaries[-1], *cut_off])
    wrong = [found.group() for found in re.finditer(r"\b[1-9]\d* (?:failed|errors?)\b", said)]
    if not re.search(r"\b[1-9]\d* passed\b", said):
        wrong.append("none passed")
    return said, [f"tests: {what}" for what in [*wrong, *(cut_off if whole else ())]]


def verdict(folder: Path, whole: bool = False) -> tuple[str, bool]:
    """(The text, whether nothing is wrong); ``whole``: what was cut off is wrong."""
    lines, wrong = [], []
    for name in ("first.json", "gpu.json"):
        path = folder / name
        if not path.is_file():
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        lines += [f"{found['device']}, commit {found['commit']}, {path}", "", table(found["rows"]), ""]
        if "check" in found:
            items = wrong_items(found["check"])
            lines.append(f"check: {len(found['check'])} items, {len(items)} wrong")
            wrong += items
        wrong += faults(found["rows"])
    if not lines:
        wrong.append(f"{folder}: neither first.json nor gpu.json was written")
    log = folder / "tests.log"
    if log.is_file():
        said, failed = tests(log.read_text(encoding="utf-8", errors="replace"), whole)
        lines.append(f"tests: {said}")
        wrong += failed
    return "\n".join([*lines, *(f"WRONG: {what}" for what in wrong), "FAIL" if wrong else "PASS"]), not wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lora_fast.benchmarks.gpu_verdict", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--whole", action="store_true", help="fail where the tests were cut off")
    arguments = parser.parse_args()
    text, right = verdict(arguments.folder, arguments.whole)
    print(text)
    return int(not right)


if __name__ == "__main__":
    raise SystemExit(main())
