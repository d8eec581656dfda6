"""The commands for adapters' files: ``lora-fast inspect``, ``merge`` and ``convert``."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_fast.dtypes import FLOATS, name_of

INSTALL = "pip install 'lora_fast[adapters]'"
PACKAGES = {"re2": "google-re2", "rich": "rich", "safetensors": "safetensors", "yaml": "PyYAML"}  # by module
DTYPES = {name_of(dtype): dtype for dtype in FLOATS}


class UsageError(Exception):
    """Something the user said that cannot be done; its text is the whole message."""


def add_commands(commands: Any) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="what is in an adapter's file: format, layers, norm axis and why, what is unknown",
        description="Of the file or folder of any tool. Exit status: 1 for a file that load, merge and convert refuse, "
        "2 for one that cannot be read.",
    )
    inspect.add_argument("adapter", type=Path, metavar="FILE_OR_FOLDER")
    _add_reading(inspect)
    inspect.add_argument("--json", action="store_true", help="print it as JSON")
    inspect.set_defaults(run=_inspect)

    merge = commands.add_parser(
        "merge", help="merge a LoRA or DoRA adapter of any tool into a checkpoint of safetensors"
    )
    merge.add_argument(
        "base",
        type=Path,
        metavar="BASE",
        help="the checkpoint: its folder, diffusers' folder of a pipeline, or one file",
    )
    merge.add_argument("adapter", type=Path, metavar="ADAPTER", help="the adapter's file or folder")
    merge.add_argument("out", type=Path, metavar="OUT", help="the folder, or the file, to make")
    merge.add_argument(
        "--component", metavar="NAME", help="which of the adapter's models to merge (default: all of them)"
    )
    _add_reading(merge)
    merge.add_argument(
        "--fan-in-fan-out",
        metavar="LAYERS",
        help="of square layers of which nothing else tells it: which have their weight stored [in, out], as "
        "transformers' Conv1D; all, none, or names or ends of names with commas between them",
    )
    merge.set_defaults(run=_merge)

    convert = commands.add_parser("convert", help="write an adapter as the file of another tool, exactly or not at all")
    convert.add_argument("adapter", type=Path, metavar="IN", help="the adapter's file or folder")
    convert.add_argument(
        "out", type=Path, metavar="OUT", help="the file (kohya), folder (peft, mlx) or either (diffusers) to make"
    )
    convert.add_argument(
        "--to", required=True, choices=("peft", "kohya", "diffusers", "mlx"), help="whose file to write"
    )
    convert.add_argument(
        "--base",
        type=Path,
        metavar="BASE",
        help="a checkpoint of the base model: needed for names with _ for their dots, for q, k and v in one or apart, "
        "for what a tool adds to the norms, and for --as-difference",
    )
    convert.add_argument(
        "--component",
        metavar="NAME",
        help="which of the file's models, or what to call the only one: unet, transformer, …",
    )
    _add_reading(convert)
    convert.add_argument("--dtype", choices=DTYPES, help="of lora_A and lora_B (default: the file's)")
    convert.add_argument("--magnitude-dtype", choices=DTYPES, help="of the magnitudes (default: the file's)")
    convert.add_argument(
        "--as-difference", action="store_true", help="with --to kohya: merged minus base weight, of full size (.diff)"
    )
    convert.set_defaults(run=_convert)


def _add_reading(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--magnitude-axis",
        choices=("output", "input"),
        help="which norm a magnitude belongs to, where the file leaves it open",
    )
    command.add_argument(
        "--norm-eps",
        type=_eps,
        metavar="EPS",
        help="what is added to the norms (default: what the tool that wrote the file is known to add)",
    )


def _eps(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number in [0, 1)")
    return value


@contextlib.contextmanager
def _told_of(what: str) -> Iterator[None]:
    """Errors of the file or of the user as UsageError; a package that is missing with how to get it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in PACKAGES:
            raise
        raise UsageError(f"{what} needs the package {PACKAGES[error.name]}: {INSTALL}") from error
    except (OSError, ValueError) as error:
        raise UsageError(error) from error


def _inspect(args: argparse.Namespace) -> int:
    with _told_of("inspect"):
        from lora_fast.adapters import inspect_adapter

        found = inspect_adapter(args.adapter, magnitude_axis=args.magnitude_axis, norm_eps=args.norm_eps)
        if args.json:
            print(json.dumps(found, indent=2, ensure_ascii=False))
        else:
            _print_found(found)
    return 1 if found["faults"] else 0


def _print_found(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    # lines are as long as they have to be: they are for a pager, or for grep
    console = Console(highlight=False, markup=False, soft_wrap=True, width=1000)
    wrote = f", written by {found['tool']}" if found["tool"] else ""
    console.print(f"{found['path']}: format {found['format']}{wrote}")
    for component in found["components"]:
        layers, tensors = component["layers"], component["tensors"]
        name = f"{component['name']}: " if component["name"] else ""
        flat = ", names with _ for their dots" if component["names_are_flattened"] else ""
        console.print(f"\n{name}{len(layers)} layers{flat}")
        table = Table(box=None, pad_edge=False)
        for header in ("layer", "kind", "in → out", "rank", "scale", "dtype", "norm", "because"):
            table.add_column(header, no_wrap=True, justify="right" if header in ("rank", "scale") else "left")
        for layer in layers:
            table.add_row(*_row(layer))
        if layers:
            console.print(table)
        if component["left_out"]:
            console.print(f"left out, a second time in the file: {', '.join(component['left_out'])}")
        for tensor in tensors:
            console.print(f"{tensor['name']} {tensor['shape']} {tensor['dtype']}: {tensor['use']}")
    for title, lines in (("unknown keys", found["unknown"]), ("refused, because", found["faults"])):
        if lines:
            console.print(f"\n{title}:")
            for line in lines:
                console.print(f"  {line}")
    for note in found["notes"]:
        console.print(f"\nnote: the file {note}")


def _row(layer: dict[str, Any]) -> tuple[str, ...]:
    sizes = f"{layer['in_features']} → {layer['out_features']}"
    row = (layer["name"], layer["kind"], sizes, str(layer["rank"]), f"{layer['scaling']:.6g}", layer["dtype"])
    if "norm_axis" not in layer:
        return (*row, "", "LoRA")
    eps = f" + {layer['norm_eps']:.3g}" if layer["norm_eps"] else ""
    return (*row, f"per {layer['norm_axis'] or '?'}{eps}, {layer['magnitude_dtype']}", layer["axis_reason"])


def _merge(args: argparse.Namespace) -> int:
    layers: str | None = args.fan_in_fan_out
    word = {None: None, "all": True, "none": False}.get(layers, (layers or "").split(","))
    try:
        with _told_of("merge"):
            from lora_fast.demo.progress import on_console
            from lora_fast.merge_checkpoint import merge_checkpoint

            with on_console() as on_progress:
                done = merge_checkpoint(
                    args.base,
                    args.adapter,
                    args.out,
                    on_progress,
                    fan_in_fan_out=word,
                    magnitude_axis=args.magnitude_axis,
                    norm_eps=args.norm_eps,
                    component=args.component,
                )
    except KeyboardInterrupt:
        return _interrupted(args.out)
    print(f"{args.out}: {done.merged} tensors merged, {done.replaced} replaced, {done.kept} kept as they were")
    if done.untied:
        print(f"untied, so that tie_word_embeddings is false in {args.out}: {', '.join(done.untied)}")
    if done.left_out:
        print(f"left out of {args.adapter}, a second time in it: {', '.join(done.left_out)}")
    if done.not_copied:
        print(f"not copied from {args.base}: {', '.join(done.not_copied)}")
    for note in done.notes:
        print(f"{args.adapter} {note}")
    return 0


def _interrupted(out: Path) -> int:
    print(f"lora-fast: interrupted; {out} was not made", file=sys.stderr)
    return 130


def _convert(args: argparse.Namespace) -> int:
    try:
        with _told_of("convert"):
            from lora_fast.adapters import convert_adapter

            done = convert_adapter(
                args.adapter,
                args.out,
                args.to,
                base=args.base,
                component=args.component,
                magnitude_axis=args.magnitude_axis,
                norm_eps=args.norm_eps,
                dtype=DTYPES.get(args.dtype),
                magnitude_dtype=DTYPES.get(args.magnitude_dtype),
                as_difference=args.as_difference,
            )
    except KeyboardInterrupt:
        return _interrupted(args.out)
    counts = [(done.layers, "update"), (done.differences, "difference")]
    said = [f"{count} {what}{'' if count == 1 else 's'}" for count, what in counts if count]
    print(f"{args.out}: {' and '.join(said)}, as {args.to}")
    for note in done.notes:
        print(note)
    return 0
