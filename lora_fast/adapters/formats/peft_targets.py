"""Which modules PEFT's configuration means, by its lists of names and its regular expressions, which nobody checked.

Python's engine can take for ever over a regular expression. It gets those only in which nothing repeats. Of the others,
RE2 matches those that it reads as Python does, in a time that grows with the length of the name; look-arounds,
references to groups and flags are not among them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lora_fast.adapters.reading import described

MAX_PATTERN = 2**13  # characters
_PLAIN = re.compile(r"\^?(?:[A-Za-z0-9_.-]|\\[.-])+\$?")
_WHOLE_NAME = re.compile(r"\^((?:[A-Za-z0-9_-]|\\[.-])+)\$?")
_REPEATED = r"(?:[*+?]|\{\d{1,4}(?:,\d{0,4})?\})\??"
_CLASS = r"\[(?:[^\[\]\\]|\\[.\-\\dDwWsS])+\]"
_COMMON = re.compile(  # of Python's syntax and RE2's
    rf"(?:(?:[\w./ -]|\\[\WdDwWsS]|{_CLASS}|\))(?:{_REPEATED})?|(?:[\^$]|\\[bB])(?![*+?{{])|\((?:\?:)?|\|)*",
    re.ASCII,
)
_ANY_LAYER = re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")

Test = Callable[[str], bool]  # of a module's name


class Patterns:
    """A module's value in rank_pattern or alpha_pattern: that of the first pattern that PEFT takes for the module.

    Where many modules have a pattern each, their names are looked up.
    """

    def __init__(self, config: Mapping[str, Any], key: str, where: Path) -> None:
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            raise ValueError(f"{where}: {key} is a {type(patterns).__name__}, expected an object")
        self._whole: dict[str, tuple[int, Any]] = {}
        self._others: list[tuple[int, Test, Any]] = []
        for order, (pattern, value) in enumerate(patterns.items()):
            if found := _WHOLE_NAME.fullmatch(pattern):
                self._whole.setdefault(found[1].replace("\\", ""), (order, value))
            else:
                self._others.append((order, _test(_required(pattern, key, where, r"(?:.*\.)?(?:", ")")), value))

    def of(self, name: str, default: Any) -> Any:
        order, value = self._whole.get(name, (len(self._whole) + len(self._others), default))
        return next((other for own, matches, other in self._others if own < order and matches(name)), value)


def check_targets(layers: Iterable[str], config: Mapping[str, Any], where: Path, weights_name: str) -> None:
    """Refuse layers that the configuration leaves out: PEFT drops them without a word.

    A regular expression that cannot be matched safely is not evaluated: it is taken to name every layer as a target,
    and to exclude none.
    """
    is_target, is_excluded, is_saved = _target(config, where), _excluded(config, where), _to_save(config, where)
    ties = bool(config.get("ensure_weight_tying"))  # adapters of more layers than are named
    for name in layers:
        if not is_target(name) and not ties:
            raise ValueError(
                f"{where}: target_modules and layers_to_transform leave out {name}, for which {weights_name} has an "
                "adapter"
            )
        for key, is_named in (("exclude_modules", is_excluded), ("modules_to_save", is_saved)):
            if is_named(name):
                raise ValueError(f"{where}: {key} names {name}, for which {weights_name} has an adapter")


def _target(config: Mapping[str, Any], where: Path) -> Test:
    targets = config.get("target_modules")
    if targets is None or targets == "all-linear":
        return lambda name: True
    if isinstance(targets, str):
        found = _compiled(targets, "target_modules", where)
        return (lambda name: True) if found is None else _test(found)
    whole = set(_names(targets, "target_modules", where))
    indexes = config.get("layers_to_transform")
    if indexes is None or indexes == []:
        return lambda name: _is_end(name, whole)
    indexes = indexes if isinstance(indexes, list) else [indexes]
    if not all(isinstance(index, int) and not isinstance(index, bool) for index in indexes):
        raise ValueError(f"{where}: layers_to_transform is {described(indexes)}, expected numbers of layers")
    layer_of = _layer_of(config, where)
    return lambda name: name in whole or (_is_end(name, whole) and layer_of(name) in indexes)


def _layer_of(config: Mapping[str, Any], where: Path) -> Callable[[str], int | None]:
    """The number of the layer that a module is in: after a name like one of layers_pattern, or the first of all."""
    key = "layers_pattern"
    patterns = config.get(key) or []
    patterns = _names([patterns] if isinstance(patterns, str) else patterns, key, where)
    before, after = r"(?:^|.*?\.)", r"\.(?P<index>\d+)\."
    compiled = [_required(pattern, key, where, before, after) for pattern in patterns] or [_ANY_LAYER]

    def layer_of(name: str) -> int | None:
        found = next((match for each in compiled if (match := each.match(name)) is not None), None)
        return int(found["index"]) if found is not None and found["index"] else None

    return layer_of


def _excluded(config: Mapping[str, Any], where: Path) -> Test:
    excluded = config.get("exclude_modules") or []
    if isinstance(excluded, str):
        found = _compiled(excluded, "exclude_modules", where)
        return (lambda name: False) if found is None else _test(found)
    ends = set(_names(excluded, "exclude_modules", where))
    return lambda name: _is_end(name, ends)


def _to_save(config: Mapping[str, Any], where: Path) -> Test:
    key = "modules_to_save"
    names = _names(config.get(key) or [], key, where)
    compiled = [_compiled(name, key, where, r"(?:^|.*\.)", r"(?:$|\..*)") for name in names]
    tests = [_test(each) for each in compiled if each is not None]
    return lambda name: any(test(name) for test in tests)


def _is_end(name: str, ends: set[str]) -> bool:
    """Whether one of ``ends`` is the whole name, or what stands after a dot of it."""
    starts = [0, *(found.end() for found in re.finditer(r"\.", name))]
    return any(name[start:] in ends for start in starts)


def _names(value: Any, key: str, where: Path) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{where}: {key} is {described(value)}, expected a list of names")
    return value


def _required(pattern: str, key: str, where: Path, before: str, after: str) -> Any:
    """As :func:`_compiled`; ValueError for a pattern that cannot be matched safely."""
    found = _compiled(pattern, key, where, before, after)
    if found is None:
        raise ValueError(
            f"{where}: {key} has the pattern {pattern[:80]!r}, which is not supported: it could take for ever, and "
            "RE2, which cannot, does not know it or reads it otherwise"
        )
    return found


def _compiled(pattern: str, key: str, where: Path, before: str = "", after: str = "") -> Any:
    """The pattern between two others, with ``match`` and ``fullmatch``; None for one that cannot be matched safely.

    Raises ValueError for one that is no regular expression.
    """
    if len(pattern) > MAX_PATTERN:
        return None
    if _PLAIN.fullmatch(pattern):
        return re.compile(before + pattern + after)
    if not _COMMON.fullmatch(pattern):
        return None
    re2, options = _re2()
    try:
        return _ByRE2(re2.compile(before + pattern + after, options), where)
    except re2.error:
        try:
            re.compile(before + pattern + after)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(
                f"{where}: {key} has the pattern {pattern[:80]!r}, which is no regular expression: {error}"
            ) from None
        return None


class _ByRE2:
    """RE2's expression, for names in ASCII: of other letters it says otherwise than Python whether they are any."""

    def __init__(self, compiled: Any, where: Path) -> None:
        self._compiled, self._where = compiled, where

    def match(self, name: str) -> Any:
        return self._compiled.match(self._checked(name))

    def fullmatch(self, name: str) -> Any:
        return self._compiled.fullmatch(self._checked(name))

    def _checked(self, name: str) -> str:
        if not name.isascii():
            raise ValueError(f"{self._where}: has patterns that cannot be read as PEFT does for the module {name!r}")
        return name


@cache
def _re2() -> tuple[Any, Any]:
    """The library, and how it is used; ModuleNotFoundError says how to get it."""
    try:
        import re2
    except ModuleNotFoundError as error:
        if error.name != "re2":
            raise
        message = "the patterns of this adapter_config.json need google-re2: pip install 'lora_fast[adapters]'"
        raise ModuleNotFoundError(message, name="re2") from None
    options = re2.Options()
    options.log_errors = False
    return re2, options


def _test(compiled: Any) -> Test:
    return lambda name: compiled.fullmatch(name) is not None
