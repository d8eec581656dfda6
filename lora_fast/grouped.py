"""The public functions for rows of many adapters on one weight: validate, resolve the backend, call.

    y[t] = gain[a] * (W x[t] + s[a] * lora_B[a] @ (lora_A[a] @ x[t])) + bias        a = adapter[t]; -1: W x[t] + bias
    n[a] = (W + s[a] * lora_B[a] @ lora_A[a]).norm(dim=1)                            # gain = m / n is DoRA

Shapes: x [..., K]  weight [N, K]  bias [N]; of L adapters, lora_A [L, R, K]  lora_B [L, N, R]  scaling [L]
gain [L, N], or lora_A and lora_B as sequences of L matrices [R_a, K] and [N, R_a], read where they are. The product
with W is one for the whole batch, and no copies of lora_A or lora_B are made for rows. But for the torch backend on a
GPU, nothing waits for the device: sizes are those of the arguments, whatever the ids, so that a captured graph serves
any.

Sources: LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353; batches of many adapters: Punica, arXiv 2310.18547.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_fast import calls, checks, ops
from lora_fast.autograd import GroupedLoraFunction, GroupedWeightNormFunction, apply
from lora_fast.backends import BackendName, resolved
from lora_fast.calls import RowGroups
from lora_fast.dtypes import FLOATS, accumulate_dtype
from lora_fast.gain import to_gain_dtype
from lora_fast.recording import as_bias, cast, recorded, wants_grad

_CLASSES, _FLOATS = {Tensor, torch.nn.Parameter}, set(FLOATS)
_INTS = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}
Factors = Tensor | Sequence[Tensor]  # a stack, or a matrix for each adapter


def group_rows(adapter: Tensor, adapters: int, *, backend: BackendName = "auto") -> RowGroups:
    """Rows sorted by adapter, which a model makes once for all of its layers.

    Args:
        adapter: int [...], in the order of the rows; each in [-1, adapters), -1 being the base alone.
        adapters: L, how many there are.

    Returns:
        (order, starts), for the ``adapter`` of the other functions, with as many leading sizes as their x or none.

    Raises:
        ValueError: on a CPU, for an id that is not in [-1, adapters). On a GPU, where to look would make the host wait,
            the rows of such an id become NaN.
    """
    _check_ints("adapter", adapter)
    if isinstance(adapters, bool) or not isinstance(adapters, (int, torch.SymInt)):
        raise TypeError(f"adapters: got {type(adapters).__name__}, expected an int")
    if adapters < 1:
        raise ValueError(f"adapters: got {adapters}, expected 1 or more")
    return _group_rows(adapter, adapters, resolved(backend))


def grouped_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Factors,
    lora_B: Factors,
    scaling: Tensor,
    gain: Tensor | None,
    adapter: Tensor | RowGroups,
    ranks: Tensor | None = None,
    *,
    backend: BackendName = "auto",
) -> Tensor:
    """:func:`~lora_fast.functional.lora_linear` in which each row of x has its own adapter, or none.

    Args:
        x: [..., K], of the weight's dtype, or of any under autocast. weight: [N, K], frozen, any strides.
        bias: [N] or None, of all rows. scaling: [L], a constant.
        lora_A, lora_B: [L, R, K] and [L, N, R], or L matrices [R_a, K] and L matrices [N, R_a].
        gain: [L, N] or None: an adapter without DoRA among others with it has gain 1. float32 is kept float32.
        adapter: int of x's leading sizes [...] or of the first of them (one id for each sample), each in [-1, L), -1
            being the base alone; or what :func:`group_rows` made of one id for each row.
        ranks: int [L] in [0, R], on the device, or None: R_a of each adapter in stacks. What is beyond in lora_A and
            lora_B is not read, and its gradient is 0.

    Returns:
        [..., N] of x's dtype (autocast's under autocast). Kept for backward: x and, if gain wants a grad, one [..., N].
        On cpu and triton a row's update, gain and bias do not depend on where it stands in the batch.

    Raises:
        ValueError: as :func:`group_rows` for ids, and for ranks on a CPU.

    Source: LoRA, arXiv 2106.09685, eq. 3; DoRA, arXiv 2402.09353, eq. 5.
    """
    checks.check_tensor("weight", weight)
    checks.check_shape("weight", weight, (None, None), "[N, K]")
    checks.check_frozen(weight)
    N, K = weight.shape
    factors = _factors(lora_A, lora_B, scaling, ranks, N, K, weight)
    checks.check_activation("x", x, K, "[..., K]", weight)
    x = cast(x, weight)
    return _grouped_lora(x, weight, None, bias, factors, gain, adapter, backend)


def grouped_lora_compose(
    base: Tensor,
    x: Tensor,
    lora_A: Factors,
    lora_B: Factors,
    scaling: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    adapter: Tensor | RowGroups,
    ranks: Tensor | None = None,
    *,
    backend: BackendName = "auto",
) -> Tensor:
    """:func:`grouped_lora_linear` after the product with W: ``gain[a] * (base + s[a] * lora_B[a] lora_A[a] x) + bias``.

    For a base product x Wᵀ (without bias) that someone else computed: a quantised layer, a sharded one, an engine's.

    Args:
        base: [..., N]. x: [..., K], leading sizes as base's; it may be another x than base's, as under dropout.
        The others as for :func:`grouped_lora_linear`.

    Returns:
        [..., N] of base's dtype; base is not changed.
    """
    checks.check_tensor("base", base)
    checks.check_tensor("x", x)
    if base.dim() == 0 or base.shape[-1] == 0:
        raise ValueError(f"base: got shape {list(base.shape)}, expected [..., N] with N of at least 1")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: got shape {list(x.shape)}, expected [..., K] with K of at least 1")
    N, K = base.shape[-1], x.shape[-1]
    checks.check_shape("x", x, (*base.shape[:-1], K), "[..., K] with base's leading sizes")
    checks.check_device("x", x, base.device, "base")
    factors = _factors(lora_A, lora_B, scaling, ranks, N, K, base)
    return _grouped_lora(x, None, base, bias, factors, gain, adapter, backend)


def grouped_weight_norm(
    weight: Tensor,
    lora_A: Factors,
    lora_B: Factors,
    scaling: Tensor,
    ranks: Tensor | None = None,
    *,
    backend: BackendName = "auto",
) -> Tensor:
    """:func:`~lora_fast.functional.weight_norm` of many adapters on one weight, which is read from memory once.

    Args:
        weight: [N, K], frozen. lora_A, lora_B, scaling, ranks: as for :func:`grouped_lora_linear`.

    Returns:
        [L, N], float32 (float64 when an input is float64), one norm per output row; differentiable in lora_A, lora_B.

    Source: DoRA, arXiv 2402.09353, eq. 5 (the denominator).
    """
    checks.check_tensor("weight", weight)
    checks.check_shape("weight", weight, (None, None), "[N, K]")
    checks.check_frozen(weight)
    N, K = weight.shape
    factors_A, factors_B, scaling, ranks = _factors(lora_A, lora_B, scaling, ranks, N, K, weight)
    scaling = scaling.to(accumulate_dtype(weight, *factors_A, *factors_B)).contiguous()
    call, name = calls.GroupedWeightNorm(weight, factors_A, factors_B, scaling, ranks), resolved(backend)
    if recorded(*factors_A, *factors_B):
        return apply(GroupedWeightNormFunction, weight, scaling, ranks, name, *factors_A, *factors_B)[0]
    return ops.grouped_weight_norm_fwd(call, name)


_Checked = tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor, Tensor | None]


def _factors(
    lora_A: Factors, lora_B: Factors, scaling: Tensor, ranks: Tensor | None, N: int, K: int, like: Tensor
) -> _Checked:
    """lora_A and lora_B as the ops take them, with scaling and ranks; all checked."""
    if _are_usual(lora_A, lora_B, scaling, ranks, N, K, like):
        return (lora_A,), (lora_B,), scaling, ranks  # type: ignore[return-value]
    if N == 0 or K == 0:
        raise ValueError(f"weight: got shape {[N, K]}, expected at least one row and one column")
    factors_A: tuple[Tensor, ...]
    factors_B: tuple[Tensor, ...]
    if isinstance(lora_A, Tensor) and isinstance(lora_B, Tensor):
        factors_A, factors_B = (lora_A,), (lora_B,)
        checks.check_tensor("lora_A", lora_A)
        checks.check_shape("lora_A", lora_A, (None, None, K), "[L, R, K]")
        count, R, _ = lora_A.shape
        checks.check_tensor("lora_B", lora_B)
        checks.check_shape("lora_B", lora_B, (count, N, R), "[L, N, R]")
        if count == 0 or R == 0:
            raise ValueError(
                f"lora_A: got shape {[count, R, K]}, expected at least one adapter and a rank of at least 1"
            )
    elif isinstance(lora_A, Tensor) or isinstance(lora_B, Tensor):
        raise TypeError("lora_A, lora_B: got one stack and one sequence, expected both as stacks or as sequences")
    else:
        for name, factors in (("lora_A", lora_A), ("lora_B", lora_B)):
            if not isinstance(factors, Iterable):
                raise TypeError(f"{name}: got {type(factors).__name__}, expected a torch.Tensor or a sequence of them")
        factors_A, factors_B = tuple(lora_A), tuple(lora_B)
        count = len(factors_A)
        if count == 0 or len(factors_B) != count:
            raise ValueError(f"lora_A, lora_B: got {count} and {len(factors_B)} matrices, expected one of each adapter")
        if ranks is not None:
            raise ValueError("ranks: got a tensor beside a sequence of matrices, expected None: their shapes say it")
        for a, (A, B) in enumerate(zip(factors_A, factors_B, strict=True)):
            if not _is_usual(A, B, factors_A[0], factors_B[0], N, K):
                _check_matrices(a, A, B, N, K)
    for name, tensors in (("lora_A", factors_A), ("lora_B", factors_B)):
        dtypes = {tensor.dtype for tensor in tensors}
        if len(dtypes) > 1:
            raise TypeError(f"{name}: got dtypes {sorted(map(str, dtypes))}, expected one dtype for all adapters")
        for tensor in tensors:
            checks.check_device(name, tensor, like.device, "the other tensors")
    checks.check_tensor("scaling", scaling)
    checks.check_shape("scaling", scaling, (count,), "[L]")
    checks.check_device("scaling", scaling, like.device, "the other tensors")
    if scaling.requires_grad:
        raise ValueError("scaling: got requires_grad=True, expected a constant: no gradient is computed for it")
    if ranks is not None:
        _check_ints("ranks", ranks)
        checks.check_shape("ranks", ranks, (count,), "[L]")
        checks.check_device("ranks", ranks, like.device, "the other tensors")
        most = factors_A[0].shape[1]
        if not _are_in_range(ranks, most):
            found = f"values from {int(ranks.min())} to {int(ranks.max())}"
            raise ValueError(f"ranks: got {found}, expected them in [0, R] = [0, {most}]")
        ranks = ranks.to(torch.int64).contiguous()
    return factors_A, factors_B, scaling, ranks


def _are_usual(lora_A: Any, lora_B: Any, scaling: Any, ranks: Any, N: int, K: int, like: Tensor) -> bool:
    """Whether stacks pass the checks of :func:`_factors`: of few tokens these take the host a tenth of the time. Where
    it is False, they say what is wrong, or that it is only unusual."""
    if torch.compiler.is_compiling() or not _CLASSES.issuperset((type(lora_A), type(lora_B), type(scaling))):
        return False
    shape, device, strided = lora_A.shape, like.device, torch.strided
    for tensor in (lora_A, lora_B, scaling):
        if tensor.dtype not in _FLOATS or tensor.device != device or tensor.layout is not strided:
            return False
    if len(shape) != 3 or 0 in shape or shape[2] != K or N == 0 or lora_B.shape != (shape[0], N, shape[1]):
        return False
    if scaling.shape != shape[:1] or scaling.requires_grad:
        return False
    if ranks is None:
        return True
    is_usual = type(ranks) is Tensor and ranks.dtype is torch.int64 and ranks.is_contiguous()
    if not is_usual or ranks.shape != shape[:1] or ranks.device != device:
        return False
    return _are_in_range(ranks, shape[1])


def _is_usual(A: Tensor, B: Tensor, first_A: Tensor, first_B: Tensor, N: int, K: int) -> bool:
    """Whether the matrices of an adapter pass :func:`_check_matrices`, given that the first adapter's do: a batch has
    many."""
    return (
        type(A) in _CLASSES
        and type(B) in _CLASSES
        and A.dtype is first_A.dtype
        and B.dtype is first_B.dtype
        and A.layout is torch.strided
        and B.layout is torch.strided
        and A is not first_A
        and len(A.shape) == 2
        and A.shape[1] == K
        and A.shape[0] > 0
        and B.shape == (N, A.shape[0])
    )


def _check_matrices(a: int, A: Tensor, B: Tensor, N: int, K: int) -> None:
    """Of adapter ``a``: lora_A [R, K] and lora_B [N, R]."""
    checks.check_tensor(f"lora_A[{a}]", A)
    checks.check_shape(f"lora_A[{a}]", A, (None, K), "[R, K]")
    if A.shape[0] == 0:
        raise ValueError(f"lora_A[{a}]: got shape [0, K], expected a rank R of at least 1")
    checks.check_tensor(f"lora_B[{a}]", B)
    checks.check_shape(f"lora_B[{a}]", B, (N, A.shape[0]), "[N, R]")


def _are_in_range(ranks: Tensor, most: int) -> bool:
    """On a CPU; on a GPU, and where torch.compile traces, the kernels take what is between 0 and ``most`` of them."""
    if torch.compiler.is_compiling() or ranks.device.type != "cpu":
        return True
    values = ranks.tolist()
    return min(values) >= 0 and max(values) <= most


def _grouped_lora(
    x: Tensor,
    weight: Tensor | None,
    base: Tensor | None,
    bias: Tensor | None,
    factors: _Checked,
    gain: Tensor | None,
    adapter: Tensor | RowGroups,
    backend: BackendName,
) -> Tensor:
    """Of checked arguments, but for bias, gain and the ids."""
    factors_A, factors_B, scaling, ranks = factors
    like = x if base is None else base
    N, count = factors_B[0].shape[-2], scaling.shape[0]
    checks.check_optional_vector("bias", bias, N, "[N]", like.device)
    if gain is not None:
        checks.check_tensor("gain", gain)
        checks.check_shape("gain", gain, (count, N), "[L, N]")
        checks.check_device("gain", gain, like.device, "the other tensors")
        gain = to_gain_dtype(gain, like.dtype).contiguous()
    name = resolved(backend)
    groups = _groups(adapter, x, count, name)
    scaling = scaling.to(torch.float64 if like.dtype == torch.float64 else torch.float32).contiguous()
    bias = as_bias(bias, like.dtype)
    keep = wants_grad(gain)
    if recorded(x, base, bias, gain, *factors_A, *factors_B):
        given = (x, weight, base, bias, scaling, gain, *groups, ranks, keep, name)
        return apply(GroupedLoraFunction, *given, *factors_A, *factors_B)[0]
    call = calls.GroupedLora(x, weight, base, bias, factors_A, factors_B, scaling, gain, *groups, ranks, keep)
    return ops.grouped_lora_fwd(call, name)[0]


def _check_ints(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor of ints")
    if value.dtype not in _INTS:
        raise TypeError(f"{name}: got dtype {value.dtype}, expected an integer dtype")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: got layout {value.layout}, expected a dense (strided) tensor")


def _groups(adapter: Tensor | RowGroups, x: Tensor, count: int, backend: str) -> RowGroups:
    """Of x's rows."""
    leading = x.shape[:-1]
    if isinstance(adapter, RowGroups):
        order, starts = adapter
        rows = math.prod(leading)
        if order.shape != (rows,) or starts.shape != (count + 3,):
            raise ValueError(
                f"adapter: got groups of {order.numel()} rows and {starts.numel() - 3} adapters, expected those of "
                f"{rows} rows and {count} adapters"
            )
        checks.check_device("adapter", order, x.device, "x")
        return adapter
    _check_ints("adapter", adapter)
    if adapter.shape == leading:
        checks.check_device("adapter", adapter, x.device, "x")
        return _group_rows(adapter, count, backend)
    more = len(leading) - adapter.dim()
    if adapter.dim() == 0 or adapter.shape != leading[: adapter.dim()]:
        raise ValueError(
            f"adapter: got shape {list(adapter.shape)}, expected x's leading sizes {list(leading)} or the first of them"
        )
    checks.check_device("adapter", adapter, x.device, "x")
    return _group_rows(adapter.reshape(*adapter.shape, *(1,) * more).expand(leading), count, backend)


def _group_rows(adapter: Tensor, count: int, backend: str) -> RowGroups:
    """Of checked ids, which may have any number of dimensions."""
    if adapter.dim() != 1:
        adapter = adapter.reshape(-1)
    return RowGroups(*ops.group_rows(calls.GroupRows(adapter, count), backend))
