"""The options of `lora-fast bench` and `lora-fast report`. Imports nothing heavy before a command runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

INSTALL = "pip install 'lora_fast[demo]'"


def add_commands(commands: Any) -> None:
    """Add both to the subparsers of lora-fast. A case of its own is a subcommand of bench."""
    bench = commands.add_parser(
        "bench",
        help="time and memory of lora_fast beside its peers",
        description="Each row is checked against float64 first, then its contenders are timed in turn. Finished rows "
        "are kept: the same command goes on after an interruption.",
    )
    bench.add_argument("--quick", action="store_true", help="small sizes, under 3 minutes on 2 cores")
    bench.add_argument(
        "--only", action="append", default=[], metavar="REGEX", help="rows whose name matches; may be given again"
    )
    bench.add_argument("--list", action="store_true", help="print the names of the rows and stop")
    bench.add_argument(
        "--json", type=Path, metavar="FILE", help="the result file (default: bench.json, or bench-quick.json)"
    )
    bench.add_argument("--csv", type=Path, metavar="FILE", help="the same numbers, a line for each contender")
    bench.add_argument(
        "--against",
        metavar="FILE|REF",
        help="show what changed against a result file, or against the result file's version of a git ref",
    )
    bench.add_argument("--threads", type=_positive, metavar="N", help="default: torch's choice")
    bench.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    bench.add_argument(
        "--budget", type=float, metavar="SECONDS", help="of measuring, for each contender of a row (default: 2)"
    )
    bench.add_argument(
        "--without-amx", action="store_true", help="as on the same processor without AMX, and named so in the results"
    )
    bench.set_defaults(run=_guarded(_bench, bench))
    cases = bench.add_subparsers(metavar="CASE", title="a case of its own")
    # parses its options itself: with this prefix none of them is an option here
    memory = cases.add_parser("t0-3b", help="DoRA on T0-3B under a memory limit", add_help=False, prefix_chars="\0")
    memory.add_argument("arguments", nargs=argparse.REMAINDER)
    memory.set_defaults(run=_guarded(_t0_3b, bench))

    report = commands.add_parser(
        "report",
        help="one report.html from result files",
        description="Tables and pictures of result files in one file without references to others.",
    )
    report.add_argument("files", nargs="*", type=Path, metavar="FILE", help="result files (default: bench.json)")
    report.add_argument("--output", type=Path, default=Path("report.html"), metavar="FILE", help="default: report.html")
    report.add_argument(
        "--pictures", type=Path, metavar="DIR", help="also write the pictures of docs/benchmarks.md there, as SVG"
    )
    report.set_defaults(run=_guarded(_report, report))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer of at least 1")
    return int(text)


def _guarded(
    run: Callable[[argparse.Namespace], int], parser: argparse.ArgumentParser
) -> Callable[[argparse.Namespace], int]:
    """Wrong input is wrong usage, in one line; a package that is missing is named with the command that brings it."""

    def guarded(args: argparse.Namespace) -> int:
        try:
            return run(args)
        except (ValueError, OSError) as error:
            parser.error(str(error))
        except ModuleNotFoundError as error:
            if (error.name or "lora_fast").split(".")[0] == "lora_fast":
                raise
            print(f"lora-fast: this needs the package {error.name}: {INSTALL}", file=sys.stderr)
            return 1

    return guarded


def _bench(args: argparse.Namespace) -> int:
    import torch

    from . import bench, suite, without_amx

    if args.without_amx:
        without_amx.turn_off()

    if args.list:
        workloads = bench.selected(suite.quick_cases() if args.quick else suite.cases(), args.only)
        print("\n".join(workload.key for workload in workloads))
        return 0
    with torch.device(args.device):
        return bench.run(
            args.json or Path("bench-quick.json" if args.quick else "bench.json"),
            quick=args.quick,
            only=args.only,
            csv_path=args.csv,
            against=args.against,
            threads=args.threads,
            budget_s=args.budget,
        )


def _t0_3b(args: argparse.Namespace) -> int:
    from . import t0_3b, without_amx

    if args.without_amx:
        without_amx.turn_off()
    return t0_3b.main(args.arguments)


def _report(args: argparse.Namespace) -> int:
    from . import page

    written = page.write(args.files or [Path("bench.json")], args.output, args.pictures)
    print("\n".join(map(str, written)))
    return 0
