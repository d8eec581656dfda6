"""Which modules PEFT's configuration means, by its lists of names and its regular expressions, which nobody checked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

MAX_PATTERN = 1000  # characters


def matches(pattern: str, name: str, where: Path) -> bool:
    """Whether PEFT takes ``pattern``, a key of rank_pattern or alpha_pattern, for the module ``name``.

    One that could run for ever is refused.
    """
    if not _is_quick(pattern):
        raise ValueError(f"{where}: the pattern {pattern[:80]!r} repeats too much to be safe")
    return _match(rf"(.*\.)?({pattern})", name, where) is not None


def _is_quick(pattern: str) -> bool:
    """Whether no repetition of a repetition is in ``pattern``, and no more than three that could share a text."""
    literal = re.sub(r"\[[^]]*\]", "", re.sub(r"\\.", "", pattern)).replace("(?", "(")  # without escapes and classes
    repetitions = re.findall(r"[*+?{]", literal)
    return not re.search(r"\)\s*[*+{]", literal) and len(repetitions) <= 3 and len(pattern) <= MAX_PATTERN


def check_targets(layers: Iterable[str], config: Mapping[str, Any], where: Path, weights_name: str) -> None:
    """Refuse layers that the configuration leaves out: PEFT drops them without a word.

    A regular expression that could run for ever is not evaluated, and taken to name every layer.
    """
    excluded = config.get("exclude_modules")
    for name in layers:
        if not config.get("ensure_weight_tying") and not _is_target(name, config, where):
            raise ValueError(
                f"{where}: target_modules and layers_to_transform leave out {name}, for which {weights_name} has an "
                "adapter"
            )
        if excluded and _is_named(name, excluded, where):
            raise ValueError(f"{where}: exclude_modules names {name}, for which {weights_name} has an adapter")


def _is_target(name: str, config: Mapping[str, Any], where: Path) -> bool:
    targets, indexes = config.get("target_modules"), config.get("layers_to_transform")
    if not isinstance(targets, (str, list)):
        return True
    if not _is_named(name, targets, where):
        return False
    if isinstance(targets, str) or name in targets or indexes is None or indexes == []:
        return True
    patterns = config.get("layers_pattern") or []
    index = _layer_index(name, [patterns] if isinstance(patterns, str) else patterns, where)
    return index in (indexes if isinstance(indexes, list) else [indexes])


def _layer_index(name: str, patterns: list[Any], where: Path) -> int | None:
    """The number of the layer that ``name`` is in: the first number after a name like one of ``patterns``, or any."""
    for before in [rf"(?:^|.*?\.){pattern}" for pattern in patterns] or [r".*?\.[^.]*"]:
        if not _is_quick(before):
            raise ValueError(f"{where}: layers_pattern {before[:80]!r} repeats too much to be safe")
        if found := _match(rf"{before}\.(?P<index>\d+)\..*", name, where):
            return int(found["index"])
    return None


def _is_named(name: str, targets: str | list[Any], where: Path) -> bool:
    """Whether one of ``targets`` is the end of ``name``, or, if it is a regular expression, it matches all of it."""
    if isinstance(targets, list):
        return any(name == end or name.endswith(f".{end}") for end in targets)
    return not _is_quick(targets) or _match(targets, name, where) is not None


def _match(pattern: str, name: str, where: Path) -> re.Match[str] | None:
    try:
        return re.fullmatch(pattern, name)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{where}: the pattern {pattern[:80]!r} is no regular expression: {error}") from None
