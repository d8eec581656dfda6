"""Every python block of the README and the docs runs, those of one file in order and in one namespace."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lora_fast.benchmarks import readme

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


def test_the_readmes_table_is_five_rows_with_one_in_which_peft_is_faster() -> None:
    _, _, *rows = [line for line in readme.summary().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert len(cells) == 5
    fastest = {column for _, *times in cells for column, time in enumerate(times) if time.startswith("**")}
    assert fastest == {1, 2}  # lora_fast's DoRA, PEFT's LoRA
    assert all(sum(time.startswith("**") for time in times) == 1 for times in cells)


def test_the_readme_states_the_figures_of_the_gpu() -> None:
    status = " ".join(readme.gpu_status().split())
    step = next(row for row in readme._gpu_results()["rows"] if row["title"].startswith("training step"))["records"]
    ratio = step["lora_fast DoRA"]["median_ms"] / step["frozen linear"]["median_ms"]
    assert f"took {ratio:.2f} times as long as the frozen linear," in status
