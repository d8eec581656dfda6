"""Files and folders that appear when they are complete, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A name beside ``out`` to write to, which becomes ``out`` when the block ends.

    If the block fails, by an interrupt too, nothing is left of it, nor of folders that were made for it.
    """
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    if part.exists():
        raise FileExistsError(f"{part}: is left from another run; delete it")
    made = [folder for folder in out.parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield part
        part.rename(out)
    except BaseException:
        if part.is_dir():
            shutil.rmtree(part)
        part.unlink(missing_ok=True)
        for folder in made:  # the innermost first
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
