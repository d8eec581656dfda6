"""The sdist, the wheels and the kinds of build, each made and installed for real from a copy of the tree."""

from __future__ import annotations

import email
import email.message
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import lora_fast

pytestmark = [pytest.mark.build, pytest.mark.slow]

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("lora_fast", "csrc", "benchmarks", "triton_kernels", "tests", "docs")
GENERATED = shutil.ignore_patterns("__pycache__", "*.so", "*.pyc", "_build.py", "results")

# On an installation without the extension: works on backend torch, warns once, and says why.
USE = """
import warnings
import torch, lora_fast
# in float32 it is little work, which "auto" leaves to PyTorch's operators
x, weight, lora_A, lora_B = (torch.randn(shape, dtype=torch.float64) for shape in ((3, 8), (5, 8), (2, 8), (5, 2)))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        y = lora_fast.functional.lora_linear(x, weight, None, lora_A, lora_B, 2.0)
torch.testing.assert_close(y, x @ (weight + 2.0 * lora_B @ lora_A).T)
print(lora_fast.__file__)
for warning in caught:
    print(f"{warning.category.__name__}: {warning.message}")
"""

# As setup.py has it, by file.
SOURCE_TREE_ONLY = {
    *(
        f"lora_fast/benchmarks/{name}.py"
        for name in (
            *("against_bars", "bench_layer", "bench_peft", "bench_quantised", "grid", "test_ops", "readme"),
            *("bench_distributed", "bench_grouped", "bench_mlp", "collectives"),
            *("distributed_engines", "distributed_model", "readme_gpu", "tables"),
            *("alternation", "bench_trainers", "trainers", "trainers_axolotl", "trainers_child"),
            *("gpu_constants", "gpu_first", "gpu_sweeps", "gpu_tune", "gpu_verdict"),
        )
    ),
    *(f"lora_fast/triton_kernels/{name}.py" for name in ("aot", "prewarm")),
}
# Of each command what it cannot do without, and what is read beside Python.
WHAT_USERS_RUN = {
    *(f"lora_fast/{name}" for name in ("cli.py", "check.py", "merge_checkpoint.py", "testing.py", "py.typed")),
    *(f"lora_fast/benchmarks/{name}.py" for name in ("command", "bench", "suite", "check_command", "commit", "gpu")),
    *(f"lora_fast/benchmarks/{name}" for name in ("t0_3b.py", "t0_3b_child.py", "page.py", "report.html.j2")),
    *(f"lora_fast/demo/{name}" for name in ("__init__.py", "finetune.py", "models.py", "report.py", "report.html.j2")),
    "lora_fast/triton_kernels/constants.json",
}
COMMANDS = """
import importlib, pkgutil
import lora_fast
from lora_fast import cli
for module in pkgutil.walk_packages(lora_fast.__path__, "lora_fast."):
    if module.name != "lora_fast.__main__":
        try:
            importlib.import_module(module.name)
        except ImportError:
            # of libraries that the test extra does not bring
            assert module.name.endswith(("hqq", "litgpt_layers", "axolotl")), module.name
for command in ("check", "demo", "bench", "report", "merge"):
    try:
        cli.main([command, "--help"])
    except SystemExit as done:
        assert done.code == 0, command
assert cli.main(["info"]) == 0
bench = ["bench", "--quick", "--only", "weight_norm", "--budget", "0.01", "--json", "quick.json"]
assert cli.main(bench) == 0
assert cli.main(["report", "quick.json"]) == 0
print(lora_fast.__file__)
"""


def run(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LORA_FAST_BUILD": "", **variables}
    return subprocess.run(
        command,
        cwd=cwd,
        env={name: value for name, value in environment.items() if value},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def succeed(*command: str | Path, cwd: Path, **variables: str) -> str:
    done = run(*command, cwd=cwd, **variables)
    assert done.returncode == 0, done.stdout
    return done.stdout


def pip_wheel(tree: Path, out: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    pip = (sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "--no-index")
    return run(*pip, "--wheel-dir", out, tree, cwd=tree, **variables)


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def run_installed(wheel: Path, folder: Path, code: str) -> tuple[Path, list[str]]:
    """Runs ``code`` in ``folder`` with the wheel installed: where that is, and the lines that ``code`` printed."""
    target = folder / "installed"
    succeed(
        *(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel),
        cwd=folder,
    )
    # -S: an editable install's import hook would lend its lora_fast._C; torch is found through PYTHONPATH
    path = os.pathsep.join((str(target), sysconfig.get_path("purelib")))
    return target, succeed(sys.executable, "-S", "-c", code, cwd=folder, PYTHONPATH=path).splitlines()


def use(wheel: Path, folder: Path) -> list[str]:
    """The warnings of the first use of an installed wheel."""
    target, (where, *warned) = run_installed(wheel, folder, USE)
    assert Path(where).is_relative_to(target)
    return warned


def copy_tree(to: Path) -> Path:
    for source in SOURCES:
        shutil.copytree(ROOT / source, to / source, ignore=GENERATED)
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy2(path, to)
    return to


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the repository, which a build may write into."""
    return copy_tree(tmp_path / "tree")


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist."""
    folder = tmp_path_factory.mktemp("sdist")
    tree = copy_tree(folder / "tree")
    build = (sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder)
    succeed(*build, tree, cwd=folder, LORA_FAST_BUILD="none")
    with tarfile.open(only(folder, "*.tar.gz")) as archive:
        archive.extractall(folder, filter="data")
    return only(folder, "lora_fast-*/")


@pytest.fixture(scope="session")
def pure_wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pure")
    done = pip_wheel(sdist, out, LORA_FAST_BUILD="none")
    assert done.returncode == 0, done.stdout
    return only(out, "*.whl")


def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_the_sdist_holds_all_sources(sdist: Path) -> None:
    expected = {
        path.relative_to(ROOT)
        for folder in SOURCES
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".cpp", ".h", ".cu", ".cuh", ".md", ".j2", ".typed"} and path.name != "_build.py"
    }
    expected |= {
        Path(name) for name in ("setup.py", "pyproject.toml", "Makefile", "LICENSE", "README.md", "CHANGELOG.md")
    }
    assert sorted(path for path in expected if not (sdist / path).exists()) == []


def test_the_wheel_holds_one_top_level_package(pure_wheel: Path) -> None:
    names = zipfile.ZipFile(pure_wheel).namelist()
    top_level = {name.split("/")[0] for name in names}
    assert top_level == {"lora_fast", f"lora_fast-{lora_fast.__version__}.dist-info"}
    constants = "lora_fast/triton_kernels/constants.json"  # read at import
    assert constants in names
    others = [name for name in names if name.startswith("lora_fast/") and name != constants]
    assert {Path(name).suffix for name in others} <= {".py", ".typed", ".j2"}


def modules(folder: Path, package: str) -> set[str]:
    """The files of a package as a wheel names them."""
    return {
        f"{package}/{path.relative_to(folder)}"
        for path in folder.rglob("*")
        if path.suffix in {".py", ".typed", ".j2"} and path.name != "_build.py"
    }


def test_the_wheel_holds_what_users_run_and_nothing_else(pure_wheel: Path) -> None:
    """A module is in a wheel unless SOURCE_TREE_ONLY names it, which only make and pytest run."""
    names = set(zipfile.ZipFile(pure_wheel).namelist())
    here = modules(ROOT / "lora_fast", "lora_fast") | modules(ROOT / "benchmarks", "lora_fast/benchmarks")
    here |= modules(ROOT / "triton_kernels", "lora_fast/triton_kernels")
    assert here >= SOURCE_TREE_ONLY
    assert here - SOURCE_TREE_ONLY <= names
    assert names & SOURCE_TREE_ONLY == set()
    assert names >= WHAT_USERS_RUN
    others = names - here - {"lora_fast/_build.py", "lora_fast/triton_kernels/constants.json"}
    assert {name.split("/")[0] for name in others} == {f"lora_fast-{lora_fast.__version__}.dist-info"}


def test_every_command_runs_from_a_wheel(pure_wheel: Path, tmp_path: Path) -> None:
    """Without the source tree: each module is imported, so that none misses one that was left out."""
    pytest.importorskip("rich", reason="the benchmarks' tables need rich, of the demo extra")
    pytest.importorskip("transformers", reason="the demo extra is not installed")
    target, said = run_installed(pure_wheel, tmp_path, COMMANDS)
    assert said[-1] == str(target / "lora_fast" / "__init__.py")
    assert (tmp_path / "quick.json").is_file()
    assert (tmp_path / "report.html").is_file()


def test_metadata(pure_wheel: Path) -> None:
    fields = metadata(pure_wheel)
    assert fields["Name"] == "lora_fast"
    assert fields["Version"] == lora_fast.__version__
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["License-File"] == "LICENSE"
    assert fields["Requires-Python"] == ">=3.10"
    assert [name for name in fields.get_all("Requires-Dist", []) if "extra ==" not in name] == ["torch>=2.10"]
    extras = {"adapters", "bitsandbytes", "deepspeed", "demo", "hqq", "interop", "lint", "peft", "test", "torchao"}
    assert set(fields.get_all("Provides-Extra", [])) == extras
    with zipfile.ZipFile(pure_wheel) as archive:
        dist_info = f"lora_fast-{lora_fast.__version__}.dist-info"
        assert archive.read(f"{dist_info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        assert "lora-fast = lora_fast.cli:main" in archive.read(f"{dist_info}/entry_points.txt").decode()


def test_a_pure_wheel_works_and_warns_once(pure_wheel: Path, tmp_path: Path) -> None:
    assert pure_wheel.name.endswith("py3-none-any.whl")
    (warning,) = use(pure_wheel, tmp_path)
    assert "LORA_FAST_BUILD=none" in warning
    assert "lora-fast info" in warning


def test_a_compiled_wheel_from_the_sdist_does_not_warn(sdist: Path, tmp_path: Path) -> None:
    done = pip_wheel(sdist, tmp_path, LORA_FAST_BUILD="cpu")
    assert done.returncode == 0, done.stdout
    wheel = only(tmp_path, "*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if name.endswith(".so") and name.startswith("lora_fast/_C.")]
    assert {name.split("/")[0] for name in names} == {"lora_fast", f"lora_fast-{lora_fast.__version__}.dist-info"}
    assert use(wheel, tmp_path) == []


def test_a_build_environment_without_torch_gives_pure_python(tree: Path, tmp_path: Path) -> None:
    """What an isolated build sees: setuptools and no torch."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    packages = Path(
        succeed(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    )
    import setuptools

    for path in Path(setuptools.__file__).parent.parent.iterdir():
        if path.name.split("-")[0] in {"setuptools", "_distutils_hack", "packaging"}:
            (packages / path.name).symlink_to(path)
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    said = succeed(python, "-c", code, cwd=tree)
    assert "lora_fast" in said
    assert "torch" in said
    wheel = only(tmp_path, "*.whl")
    assert wheel.name.endswith("py3-none-any.whl")
    (warning,) = use(wheel, tmp_path)
    assert "torch" in warning


def test_no_compiler_gives_pure_python_and_says_so(tree: Path, tmp_path: Path) -> None:
    done = pip_wheel(tree, tmp_path, CXX="/nonexistent/c++", CC="/nonexistent/cc")
    assert done.returncode == 0, done.stdout
    assert "/nonexistent/c++" in done.stdout
    wheel = only(tmp_path, "*.whl")
    assert wheel.name.endswith("py3-none-any.whl")
    (warning,) = use(wheel, tmp_path)
    assert "/nonexistent/c++" in warning


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"LORA_FAST_BUILD": "cpu", "CXX": "/nonexistent/c++", "CC": "/nonexistent/cc"}, "/nonexistent/c++"),
        ({"LORA_FAST_BUILD": "cuda", "CUDA_HOME": "/nonexistent/cuda"}, "/nonexistent/cuda"),
        ({"LORA_FAST_BUILD": "fpga"}, "fpga"),
    ],
    ids=["no compiler", "no cuda", "unknown kind"],
)
def test_a_demanded_build_that_cannot_be_had_fails(
    tree: Path, tmp_path: Path, variables: dict[str, str], said: str
) -> None:
    done = pip_wheel(tree, tmp_path, **variables)
    assert done.returncode != 0
    assert "LORA_FAST_BUILD" in done.stdout
    assert said in done.stdout
    assert list(tmp_path.glob("*.whl")) == []


def test_torch_is_no_build_requirement() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (requires,) = (line for line in text.splitlines() if line.startswith("requires = "))
    assert "torch" not in requires
