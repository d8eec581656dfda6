"""The public function for a gated MLP whose linears are adapted: validate, resolve the backend, call.

    y = down(drop(act(gate(x)) * up(x)))

Shapes: x [..., K]; gate and up [I, K], or both in one weight [2I, K]; down [N, I]. Sources: SwiGLU and GEGLU, arXiv
2002.05202; LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lora_fast import checks, ops
from lora_fast.autograd import AdaptedMlpFunction, LoraGluFunction, apply, mlp_call
from lora_fast.backends import BackendName, resolved
from lora_fast.backends.torch.glu import activated
from lora_fast.calls import Activation, LoraGlu
from lora_fast.gain import dora_gain, to_gain_dtype
from lora_fast.linears import dora_linear, dropout, lora_compose, lora_linear, weight_norm
from lora_fast.norm_cache import NormCache
from lora_fast.recording import as_bias, cast, recorded, wants_grad

ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
Recompute = Literal["outputs", "all"]
RECOMPUTE: tuple[Recompute, ...] = get_args(Recompute)


class Projection(NamedTuple):
    """One linear of an MLP: F.linear(x, weight, bias) with LoRA, with DoRA (a magnitude) or without an adapter.

    As in :func:`~lora_fast.functional.dora_linear`: weight [N, K], frozen, any strides; bias [N]; lora_A [R, K]; lora_B
    [N, R]; scaling; magnitude [N]; norm [N], detach_norm and kept. With ``dropout_p`` and ``seed``, of the adapter,
    x̃ = drop(x) takes the place of x as in PEFT: in the update of LoRA, and in DoRA, which then is
    F.linear(x - x̃, weight) + dora_linear(x̃, …).
    """

    weight: Tensor
    bias: Tensor | None = None
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scaling: float = 1.0
    magnitude: Tensor | None = None
    norm: Tensor | None = None
    detach_norm: bool = True
    kept: NormCache | None = None
    dropout_p: float = 0.0
    seed: Tensor | None = None


def adapted_mlp(
    x: Tensor,
    gate: Projection,
    up: Projection | None,
    down: Projection,
    activation: Activation = "silu",
    *,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    recompute: Recompute = "outputs",
    backend: BackendName = "auto",
) -> Tensor:
    """``down(act(gate(x)) * up(x))`` as one: in backward most of what lies between is computed again, not kept.

    Args:
        x: [..., K], of the weights' dtype, or of any under autocast.
        gate, up, down: the three linears, each adapted in its own way. With ``up=None`` the upper half of gate is
            the gate and the lower half of its rows up, as in Phi-3.
        activation: "silu", "gelu" or "gelu_tanh" (the approximation by tanh).
        mask: bool [..., I], of a dropout of probability ``dropout_p`` on down's input: what of it stays, times
            1 / (1 - dropout_p). As ``F.dropout(torch.ones(...), dropout_p) != 0`` draws it.
        recompute: what backward computes again. "outputs": gate's and up's outputs, activation and product, from the
            products x Wᵀ, which are kept: 2I elements a token; separate linears keep 6I with DoRA, 4I with LoRA.
            "all": these products too, from x, for a quarter to a third more time. Where the gain of down wants a
            gradient its product is kept besides, [..., N]; and the products with lora_A, [..., R].

    With a dropout of an adapter in force the linears run one after the other and keep what they keep alone.

    Returns:
        [..., N] of x's dtype (autocast's under autocast).

    Raises TypeError, ValueError and RuntimeError as the functions for single linears, before anything is computed.
    """
    parts = (gate, down) if up is None else (gate, up, down)
    names = ("gate", "down") if up is None else ("gate", "up", "down")
    _check(x, dict(zip(names, parts, strict=True)), activation, mask, dropout_p, recompute)
    name = resolved(backend)
    x = cast(x, gate.weight)
    if any(part.dropout_p > 0.0 for part in parts):
        return _one_by_one(x, parts, activation, mask, dropout_p, backend)
    gains = [_gain(part, backend) for part in parts]
    gains = [None if gain is None else to_gain_dtype(gain, x.dtype).contiguous() for gain in gains]
    biases = [as_bias(part.bias, x.dtype) for part in parts]
    tensors = (
        *(part.weight for part in parts),
        *biases,
        *(part.lora_A for part in parts),
        *(part.lora_B for part in parts),
        *gains,
    )
    tensors = _each_once(tensors)
    is_recorded = recorded(x, *tensors)
    keep_bases = recompute == "outputs" and wants_grad(x, *tensors)
    keep_product = wants_grad(gains[-1])
    scaling = tuple(float(part.scaling) for part in parts)
    mask = None if mask is None else mask.reshape(-1, mask.shape[-1])
    inputs = x, scaling, activation, mask, float(dropout_p), keep_bases, keep_product, name, *tensors
    y: Tensor = (apply(AdaptedMlpFunction, *inputs) if is_recorded else ops.adapted_mlp_fwd(*mlp_call(inputs)))[0]
    return y


def _each_once(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Where torch.compile traces, which takes no tensor twice in a Function's inputs, others in their place."""
    if not torch.compiler.is_compiling():
        return tensors
    found: list[Tensor | None] = []
    for tensor in tensors:
        repeated = tensor is not None and any(tensor is other for other in found)
        found.append(tensor.view_as(tensor) if tensor is not None and repeated else tensor)
    return tuple(found)


def _gain(part: Projection, backend: BackendName) -> Tensor | None:
    if part.magnitude is None or part.lora_A is None or part.lora_B is None:
        return None
    norm = part.norm
    if norm is None:
        factors = (part.lora_A.detach(), part.lora_B.detach()) if part.detach_norm else (part.lora_A, part.lora_B)
        norm = weight_norm(part.weight, *factors, part.scaling, kept=part.kept, backend=backend)
    return dora_gain(part.magnitude, norm.detach() if part.detach_norm else norm)


def _one_by_one(
    x: Tensor,
    parts: tuple[Projection, ...],
    activation: Activation,
    mask: Tensor | None,
    dropout_p: float,
    backend: BackendName,
) -> Tensor:
    """The same of single linears."""
    *gated, down = parts
    outputs = [_linear(x, part, backend) for part in gated]
    gate, up = outputs if len(outputs) == 2 else outputs[0].chunk(2, dim=-1)
    a = activated(gate, activation) * up
    if mask is not None:
        a = a * mask / (1.0 - dropout_p) if dropout_p < 1.0 else a * 0.0
    return _linear(a, down, backend)


def _linear(x: Tensor, part: Projection, backend: BackendName) -> Tensor:
    weight, bias, lora_A, lora_B, scaling, magnitude, norm, detach_norm, kept, p, seed = part
    if lora_A is None or lora_B is None:
        return F.linear(x, weight, bias if bias is None else bias.to(x.dtype))
    if magnitude is None:
        return lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p=p, seed=seed, backend=backend)
    dropped = x if p == 0.0 or seed is None else dropout(x, p, seed, backend=backend)
    options: dict[str, Any] = {"norm": norm, "detach_norm": detach_norm, "kept": kept, "backend": backend}
    y = dora_linear(dropped, weight, bias, lora_A, lora_B, magnitude, scaling, **options)
    return y if p == 0.0 else y + F.linear(x - dropped, weight)


class Product(NamedTuple):
    """One linear of an MLP of which only the product is known: a quantised layer's, whose library makes it.

    product: x [..., K] → x Wᵀ [..., N] without the bias, differentiable in x, of which it keeps nothing; the others as
    in :func:`~lora_fast.functional.lora_linear`, with a gain where it is DoRA.
    """

    product: Callable[[Tensor], Tensor]
    bias: Tensor | None
    lora_A: Tensor | None
    lora_B: Tensor | None
    scaling: float
    gain: Tensor | None


def mlp_of_products(
    x: Tensor,
    gate: Product,
    up: Product | None,
    down: Product,
    activation: Activation,
    *,
    recompute: Recompute = "outputs",
    backend: BackendName = "auto",
) -> Tensor:
    """:func:`adapted_mlp` where the products are someone else's; of checked arguments, without dropout."""
    name = resolved(backend)
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))

    parts = (gate, down) if up is None else (gate, up, down)
    read = [tensor for part in parts for tensor in part[1:] if isinstance(tensor, Tensor)]
    versions: list[tuple[int, ...]] = []

    def to_down(x: Tensor) -> tuple[Tensor, Tensor]:
        if recompute == "all":  # which reads the tensors as they are then, and autograd does not look
            versions.append(tuple(tensor._version for tensor in read if not tensor.is_inference()))
            if versions[-1] != versions[0]:
                raise RuntimeError(
                    "adapted_mlp: a tensor of an adapter was modified by an inplace operation between forward and "
                    'backward, which computes with it again (recompute="all")'
                )
        return _glu_of_products(x, gate, up, down.lora_A, activation, name)

    if recompute == "all" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        a, h = checkpoint(to_down, x, use_reentrant=False, preserve_rng_state=False)
    else:
        a, h = to_down(x)
    a = a.view(*x.shape[:-1], a.shape[-1])
    product = down.product(a)
    if down.lora_B is None:
        return product if down.bias is None else product + down.bias.to(product.dtype)
    h = h.view(*x.shape[:-1], h.shape[-1]).to(product.dtype)
    return lora_compose(product, h, down.lora_B, down.scaling, down.gain, down.bias, backend=backend)


def _glu_of_products(
    x: Tensor, gate: Product, up: Product | None, A_down: Tensor | None, activation: Activation, backend: str
) -> tuple[Tensor, Tensor]:
    """Down's input [T, I], and its product with down's lora_A."""
    parts = (gate,) if up is None else (gate, up)
    bases = [_rows(part.product(x)) for part in parts]
    dtype = bases[0].dtype
    present = [part.lora_A.to(dtype) for part in parts if part.lora_A is not None]
    h: list[Tensor | None] = [None] * len(parts)
    if present:
        of_each = iter(_rows(F.linear(x.to(dtype), torch.cat(present))).split([len(A) for A in present], dim=1))
        h = [None if part.lora_A is None else next(of_each) for part in parts]
    if up is None:
        h.append(None if h[0] is None else h[0].view_as(h[0]))  # torch.compile takes no tensor twice

    def both(values: list[Any], dim: int = 0) -> Any:
        if up is not None:
            return values
        return (None, None) if values[0] is None else values[0].chunk(2, dim)

    fields: tuple[Any, ...] = (
        *both(bases, 1),
        *h,
        *both([part.lora_B for part in parts]),
        *(float(part.scaling) for part in (gate, up or gate)),
        *both([None if part.gain is None else to_gain_dtype(part.gain, dtype).contiguous() for part in parts]),
        *both([as_bias(part.bias, dtype) for part in parts]),
        activation,
    )
    if recorded(*(field for field in fields if isinstance(field, Tensor)), A_down):
        a, h_down = apply(LoraGluFunction, *fields, A_down, backend)
        return a, h_down
    a = ops.lora_glu_fwd(LoraGlu(*fields), backend)
    return a, a.new_empty(0) if A_down is None else F.linear(a, A_down.to(a.dtype))


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _check(x: Any, parts: dict[str, Projection], activation: Any, mask: Any, dropout_p: Any, recompute: Any) -> None:
    for name, part in parts.items():
        if not isinstance(part, Projection):
            raise TypeError(f"{name}: got {type(part).__name__}, expected a Projection")
        try:
            _check_projection(part)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}.{error}") from None
    gate, down = parts["gate"].weight, parts["down"].weight
    checks.check_activation("x", x, gate.shape[1], "[..., K]", gate)
    if "up" in parts:
        checks.check_shape("up.weight", parts["up"].weight, tuple(gate.shape), "[I, K], gate.weight's shape")
    elif gate.shape[0] % 2:
        raise ValueError(f"gate.weight: got shape {list(gate.shape)}, expected [2I, K] where up is None")
    width = gate.shape[0] if "up" in parts else gate.shape[0] // 2
    checks.check_shape("down.weight", down, (None, width), "[N, I]")
    for name, part in parts.items():
        checks.check_device(f"{name}.weight", part.weight, gate.device, "gate.weight")
        checks.check_dtype(f"{name}.weight", part.weight, gate.dtype, "gate.weight")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, expected one of {', '.join(map(repr, ACTIVATIONS))}")
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute: got {recompute!r}, expected 'outputs' or 'all'")
    checks.check_number("dropout_p", dropout_p)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p: got {dropout_p}, expected a probability in [0, 1]")
    if mask is None and dropout_p > 0.0:
        raise ValueError(f"mask: got None, expected a bool tensor [..., I] with dropout_p={dropout_p}")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask: got {type(mask).__name__}, expected a bool tensor")
        checks.check_shape("mask", mask, (*x.shape[:-1], width), "[..., I] with x's leading sizes")
        checks.check_device("mask", mask, x.device, "x")


def _check_projection(part: Projection) -> None:
    weight, bias, lora_A, lora_B, scaling, magnitude, norm, _, _, dropout_p, seed = part
    checks.check_tensor("weight", weight)
    checks.check_shape("weight", weight, (None, None), "[N, K]")
    N = weight.shape[0]
    if lora_A is None and lora_B is None:
        if magnitude is not None:
            raise ValueError("magnitude: got a tensor, expected None without lora_A and lora_B")
        if 0 in weight.shape:
            raise ValueError(f"weight: got shape {list(weight.shape)}, expected at least one row and one column")
    else:
        checks.check_adapter(weight, lora_A, lora_B, scaling)
    checks.check_frozen(weight)
    checks.check_optional_vector("bias", bias, N, "[N]", weight.device)
    checks.check_optional_vector("magnitude", magnitude, N, "[N]", weight.device)
    checks.check_optional_vector("norm", norm, N, "[N]", weight.device)
    checks.check_dropout(dropout_p, seed)
