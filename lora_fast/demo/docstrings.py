"""A text classification data set that is on every machine: the standard library's docstrings, labelled by module.

The sources are parsed, not imported, so building it has no side effects and the same interpreter gives the same texts
everywhere (another Python version has a few other docstrings).
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Modules with enough documentation, in every Python from 3.10 on.
LABELS = (
    "asyncio", "decimal", "doctest", "email", "http", "importlib", "inspect", "io", "ipaddress", "logging",
    "mailbox", "multiprocessing", "pathlib", "pydoc", "tarfile", "threading", "typing", "unittest", "urllib", "xml",
)  # fmt: skip
SOURCES = {"decimal": "_pydecimal", "io": "_pyio"}  # where the public module is a shim around compiled code
MIN_WORDS = 6
MAX_PER_MODULE = 80  # keeps the large packages from drowning the others: about 1,500 texts in all


@dataclass(frozen=True)
class Example:
    text: str
    label: int  # index into LABELS


def build(seed: int = 0, held_out: float = 0.2) -> tuple[list[Example], list[Example]]:
    """Return (train, held-out) examples, shuffled with `seed`, every module split in the same proportion.

    A text found in two modules is dropped, since no answer would be right. The answer itself is taken out: see `hide`.
    Raises RuntimeError if a module's source is not on this machine.
    """
    texts = {label: dict.fromkeys(_texts(module)) for label, module in enumerate(LABELS)}  # in order, once each
    owners: dict[str, set[int]] = {}
    for label, found in texts.items():
        for text in found:
            owners.setdefault(text.lower(), set()).add(label)
    generator = random.Random(seed)
    train: list[Example] = []
    test: list[Example] = []
    for label, found in texts.items():
        examples = [Example(text, label) for text in found if len(owners[text.lower()]) == 1]
        generator.shuffle(examples)
        del examples[MAX_PER_MODULE:]
        cut = round(len(examples) * held_out)
        test += examples[:cut]
        train += examples[cut:]
    generator.shuffle(train)
    generator.shuffle(test)
    return train, test


def hide(text: str, module: str) -> str:
    """Replace the module's name by "this module", also inside dotted, prefixed and joined names.

    "Return the asyncio loop" and "see logging.Logger" would otherwise give the answer away; words that merely belong to
    the subject ("log", "thread") stay, as they are what there is to learn. "io" is replaced as a whole word only.
    """
    pattern = r"\b_?(?:py)?io\b" if module == "io" else rf"\w*{module}\w*"
    return re.sub(pattern, "this module", text, flags=re.IGNORECASE)


def _texts(module: str) -> Iterator[str]:
    for path in _files(SOURCES.get(module, module)):
        tree = ast.parse(path.read_text("utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = " ".join(hide(ast.get_docstring(node) or "", module).split())
                if len(text.split()) >= MIN_WORDS:
                    yield text


def _files(source: str) -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    if (root / f"{source}.py").is_file():
        return [root / f"{source}.py"]
    files = sorted(path for path in (root / source).rglob("*.py") if "test" not in path.relative_to(root).parts)
    if not files:
        raise RuntimeError(f"the standard library's source of {source!r} was not found under {root}")
    return files
