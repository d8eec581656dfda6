"""The one binary on processors that lack what this one has: no instruction runs that they do not know."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.native

ROOT = Path(__file__).parents[1]
PROGRAM = Path(__file__).parent / "older_processor.py"
SOURCES = sorted((ROOT / "csrc").glob("**/cpu/*.[ch]*")) + sorted((ROOT / "csrc").glob("*.[ch]*"))

# A name for what a function needs, and the functions that need it, by either.
NEEDS = re.compile(r'#define (LORA_FAST_\w+) __attribute__\(\(target\("')
FUNCTION = r"(?:LORA_FAST_INLINE )?(?:inline )?[\w:<>*& ]*?\b(\w+)\("
# Of objdump -d -C: the name that begins a function, and an instruction without its bytes.
BEGINS = re.compile(r"^[0-9a-f]+ <(.*)>:$")
CLONE = re.compile(r"\[clone \.arch_x86_64_v[34]\b")
# VEX and EVEX by what objdump writes: AVX and later, the bit manipulations of AVX2's generation, masks and tiles.
NEWER = re.compile(
    r"\t(?:v(?!err|erw)\w+|andn|bextr|bls\w+|bzhi|mulx|pdep|pext|rorx|sarx|shlx|shrx|k\w+|ldtilecfg|tdp\w+|tile\w+)\s"
    r"|%[yz]mm|%tmm"
)


def functions_of_newer_sets() -> set[str]:
    """The functions in csrc with a target attribute of their own, which are called after a look at the processor."""
    texts = [path.read_text(encoding="utf-8") for path in SOURCES]
    names = sorted({name for text in texts for name in NEEDS.findall(text)})
    marks = "|".join([*names, r'__attribute__\(\(target\("[^"]*"\)\)\)'])
    return {name for text in texts for name in re.findall(rf"^(?:static )?(?:{marks}) {FUNCTION}", text, re.MULTILINE)}


def newer_instructions(binary: Path) -> dict[str, str]:
    """The functions with an instruction that x86-64 as such lacks, and the first one; clones are left out."""
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(binary)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, str] = {}
    for name, line in _instructions(text):
        if name not in found and NEWER.search(line) and not CLONE.search(name):
            found[name] = line.strip()
    return found


def outside(found: dict[str, str], allowed: set[str]) -> dict[str, str]:
    """Those of the functions that are not the ones of these names."""
    names = re.compile(rf"(?:void )?lora_fast::(?:\(anonymous namespace\)::)?(?:{'|'.join(sorted(allowed))})[<(]")
    return {name: instruction for name, instruction in found.items() if not names.match(name)}


def _instructions(text: str) -> Iterator[tuple[str, str]]:
    name = ""
    for line in text.splitlines():
        if match := BEGINS.match(line):
            name = match[1]
        elif name:
            yield name, line + " "


@pytest.fixture
def one_isa() -> None:
    from lora_fast import _C

    if "avx2" not in _C.build_info()["isa"]:
        pytest.skip("the extension is built for one instruction set")


@pytest.mark.objdump
@pytest.mark.usefixtures("one_isa")
def test_newer_instructions_are_in_their_own_functions_only() -> None:
    from lora_fast import _C

    allowed = functions_of_newer_sets()
    assert {"panel_product", "tiles_squares", "tile_resident"} <= allowed  # the sources are read as they are written
    found = newer_instructions(Path(_C.__file__))
    assert outside(found, allowed) == {}
    assert any("panel_product" in name for name in outside(found, allowed - {"panel_product"}))


@pytest.mark.objdump
def test_a_newer_instruction_elsewhere_is_found(tmp_path: Path) -> None:
    source, binary = tmp_path / "planted.cpp", tmp_path / "planted.o"
    source.write_text(
        "namespace lora_fast {\n"
        '__attribute__((target("avx2"))) void planted(float* x) { for (int i = 0; i < 64; ++i) x[i] += 1; }\n'
        "void plain(float* x) { for (int i = 0; i < 64; ++i) x[i] += 1; }\n"
        '__attribute__((target("bmi2"))) unsigned long shifted(unsigned long x, int n) { return x << n; }\n'
        "}\n"
    )
    subprocess.run([*compiler(), "-O3", "-c", str(source), "-o", str(binary)], check=True)
    found = newer_instructions(binary)
    assert [name.split("(")[0] for name in found] == ["lora_fast::planted", "lora_fast::shifted"]
    assert list(outside(found, {"planted"})) == list(found)[1:]


def compiler() -> list[str]:
    return os.environ.get("CXX", "c++").split()


# What qemu's processor has of build_info()["isa"]; its own translation has no AVX-512 at all.
PROCESSORS = {"max": "avx2", "Nehalem": ""}


@pytest.mark.qemu
@pytest.mark.slow
@pytest.mark.usefixtures("one_isa")
@pytest.mark.parametrize(("processor", "features"), PROCESSORS.items())
def test_the_binary_is_right_on_an_older_processor(processor: str, features: str) -> None:
    command = ["qemu-x86_64", "-cpu", processor, sys.executable, str(PROGRAM)]
    # numpy's OpenBLAS may take the emulated processor for another one
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_CORETYPE": "Nehalem"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, f"{features}\nright\n"), done.stderr


@pytest.mark.qemu
@pytest.mark.parametrize(("processor", "instruction"), [("max", "vpxord %zmm0,%zmm0,%zmm0"), ("Nehalem", "vzeroupper")])
def test_an_older_processor_refuses_newer_instructions(tmp_path: Path, processor: str, instruction: str) -> None:
    """Else the test above would show nothing."""
    source, program = tmp_path / "newer.cpp", tmp_path / "newer"
    source.write_text(f'int main() {{ __asm__ volatile("{instruction}"); }}\n')
    subprocess.run([*compiler(), str(source), "-o", str(program)], check=True)
    done = subprocess.run(["qemu-x86_64", "-cpu", processor, str(program)], check=False, capture_output=True)
    assert done.returncode in (-4, 132)  # SIGILL
