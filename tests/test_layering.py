"""The layers of docs/design.md, read from the imports: who may import whom, and what must stay free of what."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Folders and the package each installs as.
PACKAGES = {
    "lora_fast": "lora_fast",
    "benchmarks": "lora_fast.benchmarks",
    "triton_kernels": "lora_fast.triton_kernels",
}

# nn, integrations, adapters -> functional -> autograd -> ops -> backends -> _C | triton_kernels. A part may import
# itself, the leaves and what is listed here, nothing else of lora_fast. "" is the package's own __init__; setup.py
# writes _build.
LEAVES = {"calls", "checks", "content_key", "dtypes", "gain", "norm_cache", "recording", "stacked"}
LIBRARY = {"autograd", "backends", "functional", "ops"}
MAY_IMPORT = {
    "": {"adapters", "backends", "functional", "integrations", "nn"},
    "nn": {"backends", "bases", "functional", "parallel"},
    "integrations": {"adapters", "backends", "bases", "functional", "nn", "ops", "parallel"},
    "parallel": set(),
    "bases": {"backends", "functional", "ops"},
    "adapters": {"bases", "functional", "nn", "parallel"},
    "merge_checkpoint": {"adapters"},
    "functional": {"grouped", "linears", "mlp"},
    "linears": {"autograd", "backends", "ops"},
    "grouped": {"autograd", "backends", "ops"},
    "mlp": {"autograd", "backends", "linears", "ops"},
    "autograd": {"backends", "ops"},
    "ops": {"backends"},
    "backends": {"_C", "_build", "triton_kernels"},
    **{leaf: set() for leaf in (*LEAVES, "_build", "triton_kernels", "reference")},
    "testing": {"", *LIBRARY, "nn", "reference"},
    "check": {"", *LIBRARY, "checking", "mlp", "nn", "reference", "testing"},
    "checking": {"backends", "testing"},
    "benchmarks": {"", *LIBRARY, "bases", "check", "integrations", "nn", "reference", "testing", "triton_kernels"},
    "demo": {"", *LIBRARY, "bases", "benchmarks", "integrations", "nn", "reference", "testing"},
    "info": {"", "backends"},
    "adapter_commands": {"adapters", "demo", "merge_checkpoint"},
    "cli": {"", "adapter_commands", "backends", "benchmarks", "demo", "info"},
    "__main__": {"cli"},
}
LEAFLESS = {"_build", "reference", "triton_kernels"}  # the specification and the kernels stand alone
KERNELS_MAY_IMPORT = {"torch", "triton", *sys.stdlib_module_names}
MAX_LINES = 500


def source_files(root: Path) -> Iterator[tuple[Path, str]]:
    """Each Python file of the package, with its dotted module name."""
    for folder, package in PACKAGES.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            yield path, ".".join((package, *parts))


def part_of(module: str) -> str | None:
    """'lora_fast.nn.linear' -> 'nn', 'lora_fast' -> '', another package -> None."""
    head, *rest = module.split(".")
    if head != "lora_fast":
        return None
    return rest[0] if rest and rest[0] != "__init__" else ""


def imports(tree: ast.AST, module: str) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything that is imported, wherever it stands, relative imports resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                # `from lora_fast import nn` names a part; `from lora_fast import apply` the package itself
                named = f"{origin}.{alias.name}"
                is_part = origin == "lora_fast" and (alias.name in MAY_IMPORT or alias.name == "_C")
                yield node.lineno, named if is_part else origin
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                name = node.args[0].value
                yield node.lineno, (module.rpartition(".")[0] + name) if name.startswith(".") else name


def violations(root: Path) -> list[str]:
    found = []
    for path, module in source_files(root):
        part = part_of(module)
        where = path.relative_to(root)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if part not in MAY_IMPORT:
            found.append(f"{where}: {part} has no place in the layers of {Path(__file__).name}")
            continue
        allowed = {part, *MAY_IMPORT[part], *(() if part in LEAFLESS else LEAVES)}
        for line, name in imports(tree, module):
            target = part_of(name)
            if target is not None and target not in allowed:
                found.append(f"{where}:{line}: {part or 'lora_fast'} may not import {name}")
            if part == "triton_kernels" and target is None and name.split(".")[0] not in KERNELS_MAY_IMPORT:
                found.append(f"{where}:{line}: triton_kernels may not import {name}")
        if part not in {"backends", "benchmarks", "testing"}:  # the latter two measure: scratch_events
            found.extend(
                f"{where}:{node.lineno}: only backends may call the compiled ops (lora_fast_c)"
                for node in ast.walk(tree)
                if isinstance(node, ast.Attribute) and node.attr == "lora_fast_c"
            )

    for header in sorted((root / "csrc" / "include").rglob("*")):
        if header.is_file():
            for line, text in enumerate(header.read_text(encoding="utf-8").splitlines(), start=1):
                if re.match(r'\s*#\s*include\s*[<"](torch|ATen|c10|caffe2)/', text):
                    found.append(f"{header.relative_to(root)}:{line}: csrc/include may not include torch")

    for folder in (*PACKAGES, "csrc", "tests"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in {".py", ".cpp", ".h", ".cuh", ".cu"}:
                lines = len(path.read_text(encoding="utf-8").splitlines())
                if lines >= MAX_LINES:
                    found.append(f"{path.relative_to(root)}: {lines} lines, at most {MAX_LINES - 1}")
    return found


def test_the_repository_keeps_its_layers() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("lora_fast/functional.py", "from lora_fast import nn", "functional may not import lora_fast.nn"),
        ("lora_fast/functional.py", "from .nn.linear import apply", "functional may not import lora_fast.nn.linear"),
        ("lora_fast/functional.py", "from . import reference", "functional may not import lora_fast.reference"),
        ("lora_fast/functional.py", "import lora_fast", "functional may not import lora_fast"),
        ("lora_fast/nn/linear.py", "from ..autograd import LoraLinearFunction", "nn may not import lora_fast.autograd"),
        ("lora_fast/nn/linear.py", "import lora_fast._C", "nn may not import lora_fast._C"),
        ("lora_fast/nn/linear.py", "def f():\n    from lora_fast import _C", "nn may not import lora_fast._C"),
        ("lora_fast/ops.py", "import_module('lora_fast._C')", "ops may not import lora_fast._C"),
        ("lora_fast/ops.py", "import torch\ntorch.ops.lora_fast_c.dropout", "only backends may call the compiled ops"),
        ("lora_fast/backends/cpu.py", "from .. import autograd", "backends may not import lora_fast.autograd"),
        ("lora_fast/backends/torch/ops.py", "from lora_fast.reference import weight_norm", "backends may not import"),
        ("lora_fast/testing.py", "from lora_fast.demo import run", "testing may not import lora_fast.demo"),
        ("lora_fast/norm_cache.py", "from . import backends", "norm_cache may not import lora_fast.backends"),
        ("lora_fast/reference.py", "from .dtypes import accumulate_dtype", "reference may not import lora_fast.dtypes"),
        ("benchmarks/layer.py", "import lora_fast._C", "benchmarks may not import lora_fast._C"),
        ("triton_kernels/norm.py", "import lora_fast.ops", "triton_kernels may not import lora_fast.ops"),
        ("triton_kernels/norm.py", "import numpy", "triton_kernels may not import numpy"),
        ("lora_fast/helpers.py", "", "helpers has no place"),
        ("csrc/include/lora_fast/norm.cuh", "#include <c10/util/Half.h>", "csrc/include may not include torch"),
        ("csrc/cpu/norm.cpp", "\n" * 500, "500 lines, at most 499"),
        ("tests/test_x.py", "\n" * 500, "500 lines, at most 499"),
    ],
)
def test_a_violation_is_found(tmp_path: Path, path: str, source: str, message: str) -> None:
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(source)
    found = violations(tmp_path)
    assert len(found) == 1
    assert message in found[0]


def test_what_is_allowed_passes(tmp_path: Path) -> None:
    allowed = {
        "lora_fast/__init__.py": "from . import functional\nfrom .nn import apply\nfrom .backends import use_backend",
        "lora_fast/nn/__init__.py": "from .linear import LinearWithDoRA",
        "lora_fast/nn/linear.py": "from lora_fast import functional\nfrom ..norm_cache import NormCache",
        "lora_fast/functional.py": "from lora_fast.linears import lora_linear\nfrom lora_fast import mlp",
        "lora_fast/linears.py": "import torch\nfrom lora_fast import autograd, backends, ops",
        "lora_fast/backends/__init__.py": "from . import cpu",
        "lora_fast/backends/cpu.py": "import torch\nimport lora_fast._C\ntorch.ops.lora_fast_c.dropout",
        "lora_fast/backends/triton.py": "def f():\n    from lora_fast.triton_kernels import norm",
        "lora_fast/testing.py": "from lora_fast import reference",
        "benchmarks/layer.py": "import lora_fast\nfrom lora_fast import reference",
        "triton_kernels/norm.py": "import math\nimport torch, triton.language as tl\nfrom . import grid",
        "csrc/include/lora_fast/norm.cuh": "#include <cuda_bf16.h>",
        "csrc/cpu/norm.cpp": "#include <torch/csrc/stable/library.h>",
    }
    for path, source in allowed.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(source)
    assert violations(tmp_path) == []


def test_laws_that_are_cited_are_stated() -> None:
    stated = re.findall(r"^(\d+)\. \*\*", (ROOT / "docs" / "design.md").read_text(encoding="utf-8"), re.MULTILINE)
    cited = {
        number
        for folder in (*PACKAGES, "csrc", "tests")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".cpp", ".h", ".cuh", ".cu"}
        for number in re.findall(r"\b[Ll]aw (\d+)", path.read_text(encoding="utf-8"))
    }
    assert stated == [str(number + 1) for number in range(len(stated))]
    assert {"1", "2", "3"} <= cited <= set(stated)


def test_the_gpu_command_runs_every_module_that_a_gpu_can_run() -> None:
    """But the tests of the interpreter itself."""
    from conftest import ON_EVERY_DEVICE

    marked = {
        path.stem
        for path in (ROOT / "tests").glob("test_*.py")
        if re.search(r"pytest\.mark\.(gpu|interp)\b", path.read_text(encoding="utf-8"))
    }
    named = re.search(r"tests/test_\{(.*)\}\.py\)", (ROOT / ".ci" / "gpu-tests").read_text(encoding="utf-8"))
    assert named is not None
    listed = re.sub(r"(\w+_)\{([^}]*)\}", lambda m: ",".join(m[1] + part for part in m[2].split(",")), named[1])
    wanted = {*marked, *ON_EVERY_DEVICE} - {"test_interpreter", "test_layering"}
    assert {f"test_{name}" for name in listed.split(",")} == wanted
