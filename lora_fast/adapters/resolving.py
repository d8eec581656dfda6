"""Which tensor of a checkpoint a name in an adapter means, and which other names are the same tensor.

An adapter has the names of the model that it was trained on. The checkpoint of the same model can have others: those of
an older release, or of the model without its head. A name is followed where the file itself has it, where transformers
knows the renaming, or where one prefix, added or taken away, is the only one that fits all of the adapter's names; one
without a number, which would say which of several blocks is meant.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from functools import cached_property

from lora_fast.adapters import architecture
from lora_fast.adapters.architecture import Architecture
from lora_fast.adapters.checkpoint import Checkpoint
from lora_fast.adapters.naming import common_prefixes, has_number


class Resolver:
    """Answers for one checkpoint, from its own names and from what transformers knows of them.

    An end is a name in the model. Several ends are one tensor where the model ties them.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.entries = checkpoint.entries

    @cached_property
    def known(self) -> Architecture | None:
        return Architecture.of(self.checkpoint.config)

    @property
    def why_unknown(self) -> str:
        """Why transformers does not tell about a tensor that it does not tell about, as part of an error's sentence."""
        if self.known is None:
            return architecture.why_unknown(self.checkpoint.config)
        return f"{type(self.known.model).__name__}, which its config.json names, has no tensor of that name"

    @cached_property
    def stored(self) -> dict[str, str]:
        """The checkpoint's key of each end that it has, as far as transformers knows: {end: key}."""
        return self.known.names_of(self.entries) if self.known else {}

    def resolve(self, wanted: Iterable[str], copies: Collection[str] = ()) -> dict[str, str]:
        """The key of each wanted name; of one that is tied, and not in the file itself, the key of what it is tied to.

        ``copies`` are those among them that the adapter has whole, as modules of the model that it was trained on.
        Raises ValueError for names that are nowhere, or perhaps in several places.
        """
        wanted = list(wanted)
        keys = {name: name for name in wanted if name in self.entries}
        for name in wanted:
            if name not in keys and (key := self._by_architecture(name)) is not None:
                keys[name] = key
        missing = [name for name in wanted if name not in keys]
        return self._by_prefix(wanted, missing, copies) if missing else keys

    def end_at(self, key: str) -> str:
        """The end that the file stores as ``key``; the key itself, where transformers does not know it."""
        return self._ends_by_key.get(key, key)

    def end_of(self, wanted: str, key: str) -> str:
        """The end that the adapter calls ``wanted``, where ``key`` is the tensor."""
        own = self.end_at(key)
        name = self.known.rename(wanted) if self.known else own
        return name if name in self._tied.get(own, ()) else own

    def ends(self, key: str) -> list[str]:
        """The ends of the tensor ``key``: its own, and those that the file lacks because they are tied to it."""
        own = self.end_at(key)
        group = self._tied.get(own)
        if group is None:
            return [own]
        # of several that are in the file, the first in the model stands for those that are not
        is_first = own == next(end for end in self.stored if end in group)
        return [own, *sorted(end for end in group - {own} if is_first and end not in self.stored)]

    def twins(self, key: str) -> list[str]:
        """The other keys of the file whose tensors are tied to ``key``."""
        own = self.end_at(key)
        return [self.stored[end] for end in sorted(self._tied.get(own, ())) if end in self.stored and end != own]

    @cached_property
    def _ends_by_key(self) -> dict[str, str]:
        return {key: end for end, key in self.stored.items()}

    @cached_property
    def _tied(self) -> dict[str, set[str]]:
        """For each end that is tied, all the ends of its tensor.

        Two that the file has with different contents are not tied, whatever its config.json says: transformers does not
        tie them either.
        """
        tied: dict[str, set[str]] = {}
        for group in self.known.ties if self.known else []:
            stored = [end for end in self.stored if end in group]
            keys = [self.stored[end] for end in stored]
            others = zip(stored[1:], keys[1:], strict=True)
            apart = {end for end, key in others if not self.checkpoint.is_same(keys[0], key)}
            tied |= {end: set(group - apart) for end in group - apart}
        return tied

    def _by_architecture(self, name: str) -> str | None:
        if self.known is None:
            return None
        end = self.known.rename(name)
        return next(
            (self.stored[each] for each in (end, *sorted(self._tied.get(end, ()))) if each in self.stored), None
        )

    def _by_prefix(self, wanted: list[str], missing: list[str], copies: Collection[str]) -> dict[str, str]:
        added = sorted({key.removesuffix(missing[0]) for key in self.entries if key.endswith(f".{missing[0]}")})
        added = [prefix for prefix in added if not has_number(prefix)]
        shared = common_prefixes([name.rpartition(".")[0] for name in wanted])
        candidates = itertools.chain(  # one in memory at a time
            ({name: prefix + name for name in wanted} for prefix in added),
            ({name: name.removeprefix(first) for name in wanted} for first in shared),
        )
        fitting = [candidate for candidate in candidates if self.entries.keys() >= set(candidate.values())]
        folder = self.checkpoint.folder
        if len(fitting) > 1:
            places = ", ".join(candidate[missing[0]] for candidate in fitting)
            raise ValueError(
                f"{folder}: {missing[0]} of the adapter could be {places}; rename the adapter's tensors to the "
                "checkpoint's names"
            )
        if not fitting:
            hint = "" if self.known else f"; {self.why_unknown}"
            if set(missing) <= set(copies):
                hint += (
                    f". {'The' if self.known else 'Or the'} adapter was trained on a model with another head: save the "
                    "base from the class that has it (AutoModelForSequenceClassification, say), and give that"
                )
            raise ValueError(
                f"{folder}: {len(missing)} of the adapter's tensors not in the checkpoint: "
                f"{', '.join(sorted(missing)[:8])}{hint}"
            )
        return fitting[0]
