"""The emulated tile instructions, with which .ci/portable runs the AMX sources, against the processor's own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.native  # the extension is there, and so is the compiler that made it

ROOT = Path(__file__).parents[1]
PROGRAM = Path(__file__).parent / "host" / "tiles.cpp"


def compiled(folder: Path, *options: str) -> Path:
    program = folder / "tiles"
    sources = [str(PROGRAM), str(ROOT / "csrc" / "cpu" / "isa.cpp"), f"-I{ROOT / 'csrc' / 'cpu'}"]
    command = [*os.environ.get("CXX", "c++").split(), "-std=c++20", "-O2", "-Wno-psabi", *options, *sources]
    subprocess.run([*command, "-o", str(program)], check=True)
    return program


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("emulated"), "-DLORA_FAST_EMULATE_AMX", f"-I{PROGRAM.parent}")


def numbers(program: Path) -> list[str]:
    return subprocess.run([program], check=True, capture_output=True, text=True).stdout.split()


def test_every_kind_of_number_comes_out(emulated: Path) -> None:
    """So that the comparison below compares something: rounded sums, zeros of denormals, infinities and NaN."""
    found = numbers(emulated)
    assert len(found) == 64 * (16 * 16 + 5 * 12) + 1024 * 16
    assert len(set(found)) > 10_000
    assert {"nan", "7f800000", "ff800000", "00000000", "80000000"} <= set(found)
    assert not [bits for bits in found if bits != "nan" and 0 < int(bits, 16) & 0x7FFFFFFF < 1 << 23]  # denormal


@pytest.mark.amx
def test_the_bits_are_the_processors(emulated: Path, tmp_path: Path) -> None:
    assert numbers(emulated) == numbers(compiled(tmp_path))


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("shapes", "tdpbf16ps: the shapes do not match"),
        ("twice", "tdpbf16ps: a tile is named twice"),
        ("unconfigured", "tilezero: a tile is not configured"),
        ("released", "tilezero: a tile is not configured"),
        ("configuration", "ldtilecfg: a tile has no valid shape"),
    ],
)
def test_what_the_processor_refuses_aborts(emulated: Path, mistake: str, said: str) -> None:
    done = subprocess.run([emulated, mistake], check=False, capture_output=True, text=True)
    assert done.returncode < 0
    assert done.stderr == f"emulated AMX: {said}\n"
