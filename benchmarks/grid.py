"""python -m lora_fast.benchmarks.grid: LoRA and DoRA beside PEFT's LoRA, size by size. The rule: neither is slower.

LoRA is held to PEFT's LoRA with adapters of the same dtype, DoRA to PEFT's LoRA as users get it, with float32 adapters:
in inference with nothing changed, and in training steps of 256 tokens and more. Finished rows are kept: the same
command goes on after an interruption, and --only measures some of them anew.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import contenders as c, layer, report, without_amx
from .records import ResultFile
from .registry import FROZEN, INFERENCE, STEP, Bar
from .runner import Record, measure

if TYPE_CHECKING:  # the rows can be chosen without rich
    from rich.table import Table

NAME = "grid.json"
RESULTS = Path(__file__).resolve().parent / "results"
SIZES = ((2048, 2048), (4096, 4096), (4096, 11008))  # out_features, in_features
TOKENS = (1, 4, 16, 64, 256, 512, 2048)
RANK, THREADS = 16, 2
BOUND = 1.02  # the rule is 1, and this much is noise
ROUNDS = 25  # at least so many calls of each, alternated
DORA_FROM = 256  # tokens of a training step


@dataclass(frozen=True)
class Point:
    """The rows of one layer and one number of tokens: a training step and inference."""

    out_features: int
    in_features: int
    dtype: torch.dtype
    tokens: int

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def size(self) -> str:
        return f"{self.out_features}×{self.in_features}"

    def key(self, mode: str) -> str:
        return f"{mode}/{self.out_features}x{self.in_features}/t{self.tokens}/{self.dtype_name}"

    @property
    def keys(self) -> list[str]:
        return [self.key(mode) for mode in (STEP, INFERENCE)]


def points() -> list[Point]:
    return [
        Point(*size, dtype, tokens) for size in SIZES for dtype in (torch.bfloat16, torch.float32) for tokens in TOKENS
    ]


def rows(point: Point, keys: Iterable[str], budget_s: float, rounds: int = ROUNDS) -> Iterator[dict[str, Any]]:
    """Those of the point's rows, as a result file holds them; the contenders are built and checked once for both."""
    inputs = c.layer_inputs(point.out_features, point.in_features, RANK, point.tokens, point.dtype)
    peft = [c.PEFT_LORA, *([c.PEFT_LORA_FP32] if point.dtype != torch.float32 else [])]
    layers, left_out = layer.build((c.FROZEN, c.lora(), c.dora(), *peft), inputs)
    for mode, make in ((STEP, layer.training_step), (INFERENCE, layer.inference)):
        if point.key(mode) not in keys:
            continue
        steps = {name: make(built, inputs) for name, built in layers.items()}
        records = measure(steps, budget_s=budget_s, min_rounds=rounds)
        yield {
            "key": point.key(mode),
            "title": f"{mode}, {point.tokens} token{'s'[: point.tokens > 1]}, {point.size} {point.dtype_name}",
            "mode": mode,
            "size": point.size,
            "tokens": point.tokens,
            "dtype": point.dtype_name,
            "rank": RANK,
            "baseline": FROZEN,
            "records": {name: record.as_dict() for name, record in records.items()},
            "left_out": left_out,
            "bars": [report.bar_as_dict(bar) for bar in bars(mode, point.tokens, records)],
        }


def bars(mode: str, tokens: int, records: dict[str, Record]) -> list[Bar]:
    """What the rule says of a row."""
    users = c.PEFT_LORA_FP32.name if c.PEFT_LORA_FP32.name in records else c.PEFT_LORA.name
    held = [(c.lora().name, c.PEFT_LORA.name)]
    if mode == INFERENCE or tokens >= DORA_FROM:
        held.append((c.dora().name, users))
    return [
        Bar(f"{ours}, × {theirs}", records[ours].median_ms / records[theirs].median_ms, BOUND, True)
        for ours, theirs in held
        if ours in records and theirs in records
    ]


def ratios(found: Iterable[dict[str, Any]]) -> dict[str, dict[tuple[str, str, str], dict[int, tuple[float, bool]]]]:
    """For LoRA and for DoRA, by (mode, dtype, size) and by tokens: the ratio, and whether the rule is broken."""
    tables: dict[str, dict[tuple[str, str, str], dict[int, tuple[float, bool]]]] = {}
    for row in found:
        for bar in row["bars"]:
            kind = "LoRA" if bar["what"].startswith(c.lora().name) else "DoRA"
            line = tables.setdefault(kind, {}).setdefault((row["mode"], row["dtype"], row["size"]), {})
            line[row["tokens"]] = bar["measured"], not bar["met"]
    return tables


def ratio_tables(found: Sequence[dict[str, Any]]) -> Iterator[Table]:
    from rich.table import Table
    from rich.text import Text

    for kind, lines in ratios(found).items():
        against = "of the same dtype" if kind == "LoRA" else "with float32 adapters"
        table = Table(
            title=f"lora_fast {kind}, × PEFT LoRA {against}; more than {BOUND:g} is red", title_justify="left"
        )
        table.add_column("")
        for tokens in TOKENS:
            table.add_column(f"{tokens}", justify="right")
        for (mode, dtype, size), line in lines.items():
            cells = (
                Text(f"{line[tokens][0]:.2f}", style="bold red" if line[tokens][1] else "") if tokens in line else ""
                for tokens in TOKENS
            )
            table.add_row(f"{mode}, {size} {dtype}", *cells)
        yield table


def run(path: Path, only: Iterable[str] = (), budget_s: float = 1.0, rounds: int = ROUNDS) -> int:
    """Measure what is not in `path` yet and write it there; 0, or 1 where a row breaks the rule."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 140)
    patterns = [re.compile(pattern, re.IGNORECASE) for pattern in only]
    chosen = [key for point in points() for key in point.keys if not patterns or any(p.search(key) for p in patterns)]
    if not chosen:
        raise ValueError(f"no row matches; rows are named like {points()[0].keys[0]}")
    results = ResultFile(path, report.provenance() | {"budget_s": budget_s})
    if results.moved:
        console.print(f"{path} is of other conditions; moved to {results.moved}")
    todo = [key for key in chosen if key not in results.finished]
    done = 0
    for point in points():
        wanted = [key for key in point.keys if key in todo]
        if not wanted:
            continue
        for row in rows(point, wanted, budget_s, rounds):
            done += 1
            results.add(row)
            said = ", ".join(f"{bar['what']} {bar['measured']:.2f}" for bar in row["bars"])
            console.print(f"{done} of {len(todo)}: {row['title']}: {said}")
    results.close()
    found = [row for row in results.content["rows"] if row["key"] in chosen]
    for table in ratio_tables(found):
        console.print(table)
    console.print(f"written to {path}")
    return int(not all(bar["met"] for row in found for bar in row["bars"]))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lora_fast.benchmarks.grid", description=__doc__)
    parser.add_argument("--only", action="append", default=[], metavar="REGEX", help="rows whose name matches")
    parser.add_argument("--list", action="store_true", help="print the names of the rows and stop")
    parser.add_argument("--budget", type=float, default=1.0, metavar="SECONDS", help="of measuring, for each contender")
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"default: {NAME} in this device's folder of results")
    parser.add_argument("--without-amx", action="store_true", help="as on the same processor without AMX")
    arguments = parser.parse_args(argv)
    if arguments.list:
        print("\n".join(key for point in points() for key in point.keys))
        return 0
    if arguments.without_amx:
        without_amx.turn_off()
    without_amx.follow()
    torch.set_num_threads(THREADS)
    try:
        return run(arguments.json or RESULTS / report.device_slug() / NAME, arguments.only, arguments.budget)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
