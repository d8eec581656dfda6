"""Progress bars: one line per stage, made when the stage begins."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn


def on_console() -> contextlib.AbstractContextManager[Callable[[str, float], None]]:
    """:func:`stages` on standard error."""
    return stages(Console(stderr=True))


@contextlib.contextmanager
def stages(console: Console) -> Iterator[Callable[[str, float], None]]:
    """Yield a function of (stage, finished fraction). On a terminal the bars move; elsewhere they appear at the end."""
    tasks: dict[str, TaskID] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:

        def on_progress(stage: str, fraction: float) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=1.0)
            progress.update(tasks[stage], completed=fraction)

        yield on_progress
