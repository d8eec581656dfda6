"""What processes send each other in a training step: counted here, and computed for a ring of any number of them.

Messages are calls of a collective. Bytes are those of the whole tensor: what an all-gather puts together, what a
reduce-scatter and an all-reduce add up. Both hardly depend on the number of processes, which only pads what it splits.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE, BROADCAST = "all-gather", "reduce-scatter", "all-reduce", "broadcast"
# Of torch.ops.c10d: what it is, and the argument that holds the whole tensor. The libraries call several variants.
OPS = {
    "_allgather_base_": (ALL_GATHER, 0),
    "allgather_": (ALL_GATHER, 0),
    "allgather_coalesced_": (ALL_GATHER, 0),
    "allgather_into_tensor_coalesced_": (ALL_GATHER, 0),
    "_reduce_scatter_base_": (REDUCE_SCATTER, 1),
    "reduce_scatter_": (REDUCE_SCATTER, 1),
    "reduce_scatter_tensor_coalesced_": (REDUCE_SCATTER, 1),
    "allreduce_": (ALL_REDUCE, 0),
    "allreduce_coalesced_": (ALL_REDUCE, 0),
    "broadcast_": (BROADCAST, 0),
}
NAMESPACES = ("c10d", "_c10d_functional")
# How often everything goes around the ring. An all-reduce is a reduce-scatter and then an all-gather; of a broadcast
# all but the last pass on what they get.
ROUNDS = {ALL_GATHER: 1, REDUCE_SCATTER: 1, ALL_REDUCE: 2, BROADCAST: 1}
PAUSE_S = 0.003  # a thread of gloo's needs microseconds to let go of tensors, where it has a core

Counts = dict[str, dict[str, int]]  # by collective: "messages" and "bytes"


class _Counting(TorchDispatchMode):
    """Sees every call that goes through PyTorch's dispatcher, those of DDP's C++ in a backward as well."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in NAMESPACES:
            self._add(func, args)
        return func(*args, **(kwargs or {}))

    def _add(self, func: Any, args: Any) -> None:
        name = func.overloadpacket.__name__
        if func.namespace != "c10d" or name not in OPS:
            raise RuntimeError(f"{func}: nobody has said how to count it, as for {', '.join(OPS)}")
        kind, place = OPS[name]
        count = self._counts.setdefault(kind, {"messages": 0, "bytes": 0})
        count["messages"] += 1
        count["bytes"] += sum(leaf.nbytes for leaf in tree_leaves(args[place]) if isinstance(leaf, Tensor))


class _Waiting(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace in NAMESPACES:
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.ScriptObject):
                    dist.Work.unbox(leaf).wait()
            time.sleep(PAUSE_S)
        return result


@contextmanager
def counted() -> Iterator[Counts]:
    """What this process takes part in within."""
    counts: Counts = {}
    with _Counting(counts):
        yield counts


@contextmanager
def waited_for() -> Iterator[None]:
    """Each collective is over, and gloo's threads have let go of its tensors, before the process goes on.

    Otherwise it is chance whether such a thread gives memory back, which no profiler of this thread sees.
    """
    with _Waiting():
        yield


def ring(counts: Mapping[str, Mapping[str, int]], ranks: int) -> dict[str, int]:
    """What each of so many processes sends in a step, if all collectives are rings.

    All-gather, reduce-scatter and broadcast of S bytes: (N-1)/N · S bytes in N-1 messages; all-reduce: twice that.
    """
    sent = {"messages": 0, "bytes": 0}
    for kind, count in counts.items():
        sent["messages"] += ROUNDS[kind] * (ranks - 1) * count["messages"]
        sent["bytes"] += ROUNDS[kind] * (ranks - 1) * count["bytes"] // ranks
    return sent
