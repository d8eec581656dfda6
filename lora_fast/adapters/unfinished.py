"""Files and folders that appear when they are complete, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from lora_fast.adapters import reading


def new_path(out: str | os.PathLike[str]) -> Path:
    """The absolute path of what is to be made; what ``..`` means is what is there before anything is made."""
    path = Path(out).absolute()
    if path.name in ("", ".."):
        raise ValueError(f"{out}: expected a new name")
    return Path(os.path.realpath(path.parent)) / path.name if ".." in path.parts else path


@contextlib.contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A name beside ``out`` to write to, which becomes ``out`` when the block ends.

    If the block fails, by an interrupt too, nothing is left of it, nor of folders that were made for it.
    """
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    if os.path.lexists(part):
        raise FileExistsError(f"{part}: is left from another run; delete it")
    with made_folder(out.parent):
        try:
            yield part
            if out.is_symlink() or (out.exists() and not (out.is_dir() and part.is_dir())):  # since it was looked for
                raise FileExistsError(f"{out}: was made by another while it was being written")
            part.rename(out)
        except BaseException:
            if part.is_dir():
                shutil.rmtree(part)
            part.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make ``folder``, and what it lies in; if the block fails, what was made and is empty goes again."""
    made = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    outer = next(each for each in (folder, *folder.parents) if os.path.lexists(each))
    if not outer.is_dir():
        raise NotADirectoryError(f"{outer}: is no folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for each in made:  # the innermost first
            with contextlib.suppress(OSError):
                each.rmdir()
        raise


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; OSError where the disk is full, or the place is none that can be written to."""
    safetensors = reading.import_safetensors()
    path.touch()
    mode = path.stat().st_mode  # what the user's new files have; safetensors makes them private
    try:
        safetensors.torch.save_file(dict(tensors), path, metadata=dict(metadata))
    except safetensors.SafetensorError as error:
        raise OSError(f"{path}: could not be written: {reading.one_line(error)}") from None
    path.chmod(mode)
