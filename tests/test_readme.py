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
LINK = re.compile(r"\]\((?!https?://)([^)#]+)(?:#[^)]*)?\)")


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    missing = [to for to in LINK.findall(page.read_text(encoding="utf-8")) if not (page.parent / to).exists()]
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
