"""python benchmarks/commit.py: the commit that results record, without importing torch."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

VARIABLE = "LORA_FAST_COMMIT"
ROOT = Path(__file__).resolve().parents[1]


def commit_of(root: Path = ROOT) -> str | None:
    """The commit of the source tree at ``root``; without a ``.git`` that tells, LORA_FAST_COMMIT's, or None.

    ValueError where the variable is no commit, or another than the tree's: one of them would be recorded wrongly.
    """
    given, found = os.environ.get(VARIABLE), _commit_of_git(root)
    if given is None:
        return found
    if not re.fullmatch(r"[0-9a-f]{7,40}\+?", given):
        raise ValueError(
            f'{VARIABLE}: got {given!r}, expected a commit, 7 to 40 hexadecimal digits, with a "+" behind them where '
            "the tree has changes"
        )
    if found is None:
        return given
    known, said = found.rstrip("+"), given.rstrip("+")
    if not (known.startswith(said) or said.startswith(known)):
        raise ValueError(f"{VARIABLE}: got {given!r}, expected {found!r}, the commit of {root}, or unset")
    return found


def _commit_of_git(root: Path) -> str | None:
    """With "+" where the sources have changes; results are none of these: each run writes its own."""
    if not (root / ".git").exists():
        return None
    sources = [".", ":(exclude)benchmarks/results"]
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", *sources)
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+" if changed else commit


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    print(commit_of())
