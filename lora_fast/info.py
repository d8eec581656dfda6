"""What ``lora-fast info`` knows: versions, processor, GPU, extension, the default backend, and the plans of calls."""

from __future__ import annotations

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
from lora_fast.backends import extension
from lora_fast.backends.explain import Size, explain

BUILD_REQUIREMENTS = {"setuptools": "setuptools>=77", "wheel": "wheel", "ninja": "ninja", "pybind11": "pybind11"}


# the ops whose kernels depend on the number of tokens
SIZED = ("weight_norm_fwd", "lora_linear_fwd", "lora_linear_bwd", "dora_linear_fwd", "dora_linear_bwd")


def typical_sizes() -> list[Size]:
    """A layer in training and with few tokens, on each device that is here."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    dtypes = (torch.bfloat16, torch.float32)
    return [Size(T, 4096, 4096, 16, dtype, device) for device in devices for dtype in dtypes for T in (512, 16)]


def collect(sizes: Sequence[Size] | None = None) -> dict[str, Any]:
    """Everything, as plain data; the plans for ``sizes``, by default for the typical ones.

    Raises ValueError for an unknown name in LORA_FAST_BACKEND, RuntimeError for a size that does not fit into memory.
    """
    backend, source = backends.default_backend_source()
    loaded, reason, build = extension.status()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the extension is missing is said below, with the remedy
        # one call that was asked for is shown whole, the typical ones by what depends on their size
        shown, ops = (typical_sizes(), SIZED) if sizes is None else (sizes, None)
        plans = {str(size): explain(size, ops, backend) for size in shown}
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
        "extension": {
            "loaded": loaded,
            "reason": reason,
            "build": build,
            "has_torchs_vectors": loaded and extension.has_torchs_vectors(),
            "remedy": [] if loaded else _remedy(),
        },
        "default_backend": {"name": backend, "from": source},
        "plans": plans,
    }


def _gpu() -> dict[str, Any]:
    """The devices that torch sees, and why a GPU backend is not there; none of it needs a GPU."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "devices": [torch.cuda.get_device_name(index) for index in range(count)],
        **{name: backends.get(name).missing() or "present" for name in ("triton", "cuda")},
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
        steps.append("# install a C++20 compiler, GCC 12 or later, for example: apt-get install g++ python3-dev")
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
        if not extension["has_torchs_vectors"]:
            lines.append(
                "           its vectors are narrower than PyTorch's, and it is slower: build it with GCC 12 or later"
            )
    else:
        lines.append(f"extension  missing: {extension['reason']}")
        lines.append("           to build it:")
        lines.extend(f"             {step}" for step in extension["remedy"])
    lines.append(f"default    {default['name']} (from {default['from']})")
    for size, rows in state["plans"].items():
        lines.extend(["", f"backend={default['name']!r} for {size}", ""])
        lines.extend(_table(rows))
    return "\n".join(lines)


def _table(rows: list[dict[str, str]]) -> list[str]:
    """Lines of aligned columns; what repeats the line above is left out."""
    merged: dict[tuple[str, ...], list[str]] = {}  # what one kernel computes for one reason
    for row in rows:
        merged.setdefault((row["op"], row["backend"], row["kernel"], row["because"]), []).append(row["computes"])
    table = [("op", "backend", "computes", "kernel", "because")]
    table += [(op, name, ", ".join(computes), kernel, why) for (op, name, kernel, why), computes in merged.items()]
    widths = [max(len(line[column]) for line in table) for column in range(4)]
    lines, former = [], ""
    for op, name, *others in table:
        start = ("", "") if op == former else (op, name)
        former = op
        lines.append("  ".join([*map(str.ljust, (*start, *others[:2]), widths), others[2]]))
    return lines
