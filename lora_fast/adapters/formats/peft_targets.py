"""Which modules PEFT's configuration means, by its lists of names and its regular expressions, which nobody checked.

Python's engine can take for ever over a regular expression. It gets those only in which nothing repeats. Of the others,
RE2 matches those that it reads as Python does, in a time that grows with the length of the name; look-arounds,
references to groups and flags are not among them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from lora_fast.adapters.formats.peft_config import ends_of
from lora_fast.adapters.reading import described, import_extra, one_line

MAX_PATTERN = 2**13  # characters
MAX_PATTERNS = 10**5  # of one entry of the configuration
MAX_EXPRESSIONS = 1000  # of them
MAX_COST = 10**10  # of all that is tried: places in a name times letters of a pattern, and COST_OF_ONE for each
COST_OF_ONE = 200
_PLAIN = re.compile(r"\^?(?:[^\\^$*+?{}\[\]|()]|\\\W)+\$?")
_WHOLE_NAME = re.compile(r"\^((?:[^\\^$*+?{}\[\]|().]|\\\W)+)\$?")
_REPEATED = r"(?:[*+?]|\{\d{1,4}(?:,\d{0,4})?\})\??"
_CLASS = r"\[(?:[ -Z^-~]|\\[.\-\\]|\\[dDwWsS](?!-[^]]))+\]"
_LITERAL = r"[\w./ -]|\\[!-/:-@\[-`{-~ dDwWsS]"
_COMMON = re.compile(  # of Python's syntax and RE2's
    rf"(?:(?:{_LITERAL}|{_CLASS}|\))(?:{_REPEATED})?|(?:[\^$]|\\[bB])(?![*+?{{])|\((?:\?:)?|\|)*",
    re.ASCII,
)
_KINDS = re.compile(r"\\[bBdDsSwW]")  # of letters
_ANY_LAYER = re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")

Test = Callable[[str], bool]  # of a module's name


class Layer(Protocol):
    """What tells whether two layers can be tied."""

    @property
    def is_embedding(self) -> bool: ...

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...


class Patterns:
    """A module's value in rank_pattern or alpha_pattern: that of the first pattern that PEFT takes for the module.

    Where many modules have a pattern each, their names are looked up.
    """

    def __init__(self, config: Mapping[str, Any], key: str, layers: Collection[str], where: Path) -> None:
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            raise ValueError(f"{where}: {key} is a {type(patterns).__name__}, expected an object")
        _check_count(list(patterns), key, where)
        self._values = patterns
        self._whole: dict[str, tuple[float, Any]] = {}
        others: dict[str, tuple[int, Any]] = {}
        for order, (pattern, value) in enumerate(patterns.items()):
            if found := _WHOLE_NAME.fullmatch(pattern):
                self._whole.setdefault(re.sub(r"\\(.)", r"\1", found[1]), (order, value))
            else:
                others[pattern] = order, value
        _check_cost(list(others), layers, key, where)
        self._others = [
            (order, _required(pattern, key, where, r"(.*\.)?(", ")$"), value)
            for pattern, (order, value) in others.items()
        ]

    def of(self, name: str, default: Any) -> Any:
        # without any that matches, PEFT takes the name itself for one
        order, value = self._whole.get(name, (math.inf, self._values.get(name, default)))
        return next((other for own, pattern, other in self._others if own < order and pattern.match(name)), value)


def check_targets(layers: Mapping[str, Layer], config: Mapping[str, Any], where: Path, weights_name: str) -> None:
    """Refuse layers that the configuration leaves out: PEFT drops them without a word.

    A regular expression that cannot be matched safely is not evaluated: it is taken to name every layer as a target,
    and to exclude none.
    """
    for key in ("modules_to_save", "layers_pattern"):
        _check_cost(_patterns(config, key, where), layers, key, where)
    is_target, is_excluded, is_saved = _target(config, where), _excluded(config, where), _to_save(config, where)
    indexed = config.get("layers_to_transform") not in (None, [])
    chosen = "target_modules with layers_to_transform" if indexed else "target_modules"
    way_out = "which PEFT would leave out: correct the configuration, or take the layer out of the file"
    targets = {name for name in layers if is_target(name)}
    for name in layers:
        if name not in targets and not (config.get("ensure_weight_tying") and _is_maybe_tied(name, layers, targets)):
            raise ValueError(
                f"{where}: {chosen} does not name {name}, for which {weights_name} has an adapter, {way_out}"
            )
        for key, is_named in (("exclude_modules", is_excluded), ("modules_to_save", is_saved)):
            if is_named(name):
                raise ValueError(f"{where}: {key} names {name}, for which {weights_name} has an adapter, {way_out}")


def _is_maybe_tied(name: str, layers: Mapping[str, Layer], targets: Collection[str]) -> bool:
    """Whether the layer can be an embedding's second place, or the head that is tied to one, which is a target."""
    own = layers[name]
    sizes = own.in_features, own.out_features
    embeddings = [layers[target] for target in targets if layers[target].is_embedding or own.is_embedding]
    return any(
        sizes == (other.in_features, other.out_features)
        if own.is_embedding and other.is_embedding
        else sizes == (other.out_features, other.in_features)
        for other in embeddings
    )


def _target(config: Mapping[str, Any], where: Path) -> Test:
    targets = config.get("target_modules")
    if targets is None or (isinstance(targets, str) and targets.lower() == "all-linear"):
        return lambda name: True
    if isinstance(targets, str):
        return _test(_compiled(targets, "target_modules", where), otherwise=True)
    whole = set(_names(targets, "target_modules", where))
    indexes = config.get("layers_to_transform")
    if indexes is None or indexes == []:
        return lambda name: _is_end(name, whole)
    indexes = indexes if isinstance(indexes, list) else [indexes]
    for index in indexes:
        if not isinstance(index, int) or isinstance(index, bool):
            raise ValueError(f"{where}: layers_to_transform has {described(index)}, expected numbers of layers")
    indexes = set(indexes)
    layer_of = _layer_of(config, where)
    return lambda name: name in whole or (_is_end(name, whole) and layer_of(name) in indexes)


def _layer_of(config: Mapping[str, Any], where: Path) -> Callable[[str], int | None]:
    """The number of the layer that a module is in: after a name like one of layers_pattern, or the first of all."""
    key = "layers_pattern"
    patterns = _patterns(config, key, where)
    before, after = r"(?:^|.*?\.)", r"\.(?P<index>\d+)\."
    _check_count(patterns, key, where)
    compiled = [_required(pattern, key, where, before, after) for pattern in patterns] or [_ANY_LAYER]

    def layer_of(name: str) -> int | None:
        found = next((match for each in compiled if (match := each.match(name)) is not None), None)
        return int(found["index"]) if found is not None and found["index"] else None

    return layer_of


def _excluded(config: Mapping[str, Any], where: Path) -> Test:
    excluded = config.get("exclude_modules") or []
    if isinstance(excluded, str):
        return _test(_compiled(excluded, "exclude_modules", where), otherwise=False)
    ends = set(_names(excluded, "exclude_modules", where))
    return lambda name: _is_end(name, ends)


def _to_save(config: Mapping[str, Any], where: Path) -> Test:
    key = "modules_to_save"
    names = _patterns(config, key, where)
    _check_count(names, key, where)
    # of an alternative PEFT takes the first part as the beginning of a name: match, as there
    compiled = [_compiled(name, key, where, r"(^|.*\.)", r"($|\..*)") for name in names]
    tests = [_test(each, otherwise=False, whole=False) for each in compiled]
    return lambda name: any(test(name) for test in tests)


def _check_cost(patterns: list[str], layers: Collection[str], key: str, where: Path) -> None:
    """Refuse more patterns than can be tried on all ``layers`` in a sane time."""
    places = sum(len(name.split(".")) for name in layers)
    if sum(map(len, patterns)) * places + COST_OF_ONE * len(patterns) * len(layers) > MAX_COST:
        raise ValueError(f"{where}: {key} has {len(patterns)} patterns, too many for {len(layers)} layers")


def _check_count(patterns: list[str], key: str, where: Path) -> None:
    """Refuse more than there is a use for: each takes time and memory."""
    if len(patterns) > MAX_PATTERNS:
        raise ValueError(f"{where}: {key} has {len(patterns)} entries, expected at most {MAX_PATTERNS}")
    if (count := sum(_PLAIN.fullmatch(pattern) is None for pattern in patterns)) > MAX_EXPRESSIONS:
        raise ValueError(f"{where}: {key} has {count} regular expressions, expected at most {MAX_EXPRESSIONS}")


def _is_end(name: str, ends: set[str]) -> bool:
    """Whether one of ``ends`` is the whole name, or what stands after a dot of it."""
    return any(end in ends for end in ends_of(name))


def _patterns(config: Mapping[str, Any], key: str, where: Path) -> list[str]:
    value = config.get(key) or []
    return _names([value] if isinstance(value, str) else value, key, where)


def _names(value: Any, key: str, where: Path) -> list[str]:
    if not isinstance(value, list):
        raise ValueError(f"{where}: {key} is {described(value)}, expected a list of names")
    for name in value:
        if not isinstance(name, str):
            raise ValueError(f"{where}: {key} has {described(name)}, expected names")
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
        compiled = re2.compile(before + pattern + after, options)
        return _OfAscii(compiled, where) if _KINDS.search(pattern) else compiled
    except re2.error:
        try:
            re.compile(before + pattern + after)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(
                f"{where}: {key} has the pattern {pattern[:80]!r}, which is no regular expression: {one_line(error)}"
            ) from None
        return None


class NotAsciiError(ValueError):
    """A name that a pattern cannot be matched with."""


class _OfAscii:
    """RE2's expression with kinds of letters in it, to which others than ASCII's belong for Python only."""

    def __init__(self, compiled: Any, where: Path) -> None:
        self._compiled, self._where = compiled, where

    def match(self, name: str) -> Any:
        return self._compiled.match(self._checked(name))

    def fullmatch(self, name: str) -> Any:
        return self._compiled.fullmatch(self._checked(name))

    def _checked(self, name: str) -> str:
        if not name.isascii():
            raise NotAsciiError(f"{self._where}: has patterns that cannot be read as PEFT does for the module {name!r}")
        return name


@cache
def _re2() -> tuple[Any, Any]:
    """The library, and how it is used."""
    re2 = import_extra("re2", "the patterns of this adapter_config.json need google-re2")
    options = re2.Options()
    options.log_errors = False
    return re2, options


def _test(compiled: Any, *, otherwise: bool, whole: bool = True) -> Test:
    """Whether a name is matched, the whole of it or its beginning; ``otherwise`` where that cannot be told."""
    if compiled is None:
        return lambda name: otherwise
    match = compiled.fullmatch if whole else compiled.match

    def test(name: str) -> bool:
        try:
            return match(name) is not None
        except NotAsciiError:
            return otherwise

    return test
