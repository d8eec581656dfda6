"""Every python block of the README and the docs runs, those of one file in order and in one namespace."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_fast.benchmarks import readme, readme_gpu

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://)([^)#]*)(?:#([^)]*))?\)")
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def blocks(text: str) -> Iterator[str]:
    """Each block, under as many empty lines as stand above it, so that a traceback names the page's own line."""
    for match in BLOCK.finditer(text):
        yield "\n" * text.count("\n", 0, match.start(1)) + match.group(1)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_examples_run(page: Path) -> None:
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": page.stem}
    for code in blocks(page.read_text(encoding="utf-8")):
        exec(compile(code, str(page), "exec"), namespace)


def anchors(text: str) -> set[str]:
    """The names that GitHub gives a page's headings."""
    headings = HEADING.findall(FENCED.sub("", text))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    missing = []
    for file, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        to = page.parent / file if file else page
        if not to.exists() or (anchor and anchor not in anchors(to.read_text(encoding="utf-8"))):
            missing.append(f"{file}#{anchor}")
    assert missing == []


def test_the_readme_has_examples() -> None:
    assert len(list(blocks((ROOT / "README.md").read_text(encoding="utf-8")))) >= 4


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: page.name)
def test_the_figures_are_those_of_the_committed_results(page: Path) -> None:
    """`python -m lora_fast.benchmarks.readme` makes them so."""
    text = page.read_text(encoding="utf-8")
    assert readme.REGION.search(text)
    assert readme.render(text) == text


def test_a_figure_that_was_changed_by_hand_is_seen() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    changed = text.replace("| frozen linear | 1.00", "| frozen linear | 0.99")
    assert changed != text
    assert readme.render(changed) == text


def rows_of(table: str) -> list[list[str]]:
    _, _, *rows = table.splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_readmes_first_table_is_five_rows_with_one_in_which_peft_is_faster() -> None:
    with_amx, *others = [part for part in readme.summary().split("\n\n") if part.startswith("|")]
    cells = rows_of(with_amx)
    assert len(cells) == 5
    fastest = {column for _, *times in cells for column, time in enumerate(times) if time.startswith("**")}
    assert fastest == {1, 2}  # lora_fast's DoRA, PEFT's LoRA
    for _, *times in [*cells, *(row for table in others for row in rows_of(table))]:
        assert sum(time.startswith("**") for time in times) == 1


@pytest.fixture
def without_amx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for the results of the same processor without AMX."""
    folder = tmp_path / "a-processor-without-amx"
    folder.mkdir()
    monkeypatch.setattr(readme, "WITHOUT_AMX", folder)
    return folder


def layer_results() -> dict[str, Any]:
    record = {"median_ms": 2.0, "peak_bytes": 2**20}
    records = {
        "DoRA": dict.fromkeys(("frozen linear", "lora_fast DoRA", "PEFT LoRA", "PEFT DoRA"), record),
        "LoRA": dict.fromkeys(("frozen linear", "lora_fast LoRA", "PEFT LoRA"), record),
    }
    cases = [("LoRA", "training step", 512), *(("DoRA", "training step", tokens) for tokens in (512, 16))]
    rows = [
        {
            "title": f"{mode}, {tokens} tokens, 4096×4096 bfloat16",
            "mode": mode,
            "tokens": tokens,
            "dtype": "bfloat16",
            "records": records[kind],
            "bars": [],
        }
        for kind, mode, tokens in [*cases, ("DoRA", "inference", 16)]
    ]
    device = {"device": "A processor without AMX", "threads": 2, "versions": {"torch": "2.13"}, "date": "2026-12-01T"}
    return device | {"rows": rows}


def test_the_same_processor_without_amx_has_tables_of_its_own(without_amx: Path) -> None:
    layer, peft = readme.layer(), readme.peft()
    assert "without AMX" not in layer + peft
    (without_amx / "layer.json").write_text(json.dumps(layer_results()))
    added = readme.layer().removeprefix(layer).strip()
    assert added.startswith("A processor without AMX, 2 threads, torch 2.13, 2026-12-01: [benchmarks/results/")
    assert "2.00" not in added  # in units of the frozen linear
    assert readme.peft() == peft


def test_the_readme_has_two_kinds_of_processor(without_amx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_amx = readme.summary().split("\n\nAMD")[0]
    for name in ("layer", "peft"):
        (without_amx / f"{name}.json").write_text(json.dumps(layer_results()))
    monkeypatch.setattr(readme, "ZEN_5", without_amx)
    monkeypatch.setattr(readme, "SUMMARY_WITHOUT_AMX", readme.SUMMARY_WITHOUT_AMX[:3])
    added = readme.summary().removeprefix(with_amx).strip().splitlines()
    assert added[0].startswith("A processor without AMX, 2 threads, torch 2.13, 2026-12-01: [layer.json](")
    assert [line.split(" | ")[0] for line in added[4:]] == [
        "| layer, inference, 16 tokens, 4096×4096 bfloat16",
        "| layer, training step, 512 tokens, 4096×4096 bfloat16",
        "| layer, training step, 16 tokens, 4096×4096 bfloat16",
    ]
    assert all(line.count("2.00 ms") == 4 for line in added[4:])


def test_the_grid_is_there_once_it_was_measured(without_amx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RESULTS", "ZEN_5", "ZEN_5_AVX512", "ZEN_5_AVX2"):
        monkeypatch.setattr(readme, name, without_amx.parent)
    assert readme.grid() == ""
    row = {"mode": "inference", "dtype": "bfloat16", "size": "64×64", "tokens": 16}
    bars = [
        {"what": "lora_fast LoRA, × PEFT LoRA", "measured": 0.98, "met": True},
        {"what": "lora_fast DoRA, × PEFT LoRA, fp32 adapters", "measured": 1.25, "met": False},
    ]
    (without_amx / "grid.json").write_text(json.dumps(layer_results() | {"rows": [row | {"bars": bars}]}))
    section = readme.grid()
    assert section.startswith("## Sizes and numbers of tokens\n")
    assert "| lora_fast LoRA | 1 | 4 | 16 | 64 | 256 | 512 | 2048 |" in section
    assert "| inference, 64×64 bfloat16 |  |  | 0.98 |  |  |  |  |" in section
    assert "| inference, 64×64 bfloat16 |  |  | **1.25** |  |  |  |  |" in section


def test_the_readme_states_the_figures_of_the_gpu() -> None:
    status = " ".join(readme_gpu.gpu_status().split())
    step = next(row for row in readme_gpu._gpu_results()["rows"] if row["title"].startswith("training step"))["records"]
    ratio = step["lora_fast DoRA"]["median_ms"] / step["frozen linear"]["median_ms"]
    assert f"took {ratio:.2f} times as long as the frozen linear," in status
