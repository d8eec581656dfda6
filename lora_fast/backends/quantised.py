"""LoRA and DoRA of few tokens on a quantised W, on a CPU: one C++ kernel that makes W's rows and multiplies by them.

It is for inference, and so is no op of the contract: it has no backward and is not traced. Everything else on a
quantised W is its library's product and :func:`lora_fast.functional.lora_compose`.
"""

from __future__ import annotations

from torch import Tensor

from lora_fast.backends import extension, registry


def takes(x: Tensor, lora_A: Tensor, lora_B: Tensor, name: str) -> bool:
    """Whether the named backend, or "auto", has the kernel for x [..., K], where no gradient is wanted."""
    return (
        name in ("auto", "cpu")
        and x.device.type == "cpu"
        and extension.missing() is None
        and bool(registry.get("cpu").plan.takes_quantised(x, lora_A, lora_B))
    )


def lora_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    levels: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    gain: Tensor | None,
) -> Tensor:
    """gain ⊙ (x Wᵀ + s x lora_Aᵀ lora_Bᵀ) + bias, [..., N] of x's dtype, to which the rows of W are rounded.

    codes, scale and levels: as of :class:`lora_fast.calls.QuantisedNorm`; gain and bias: [N].
    """
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    factors = lora_A.contiguous(), lora_B.contiguous(), scaling
    vectors = (None if vector is None else vector.float().contiguous() for vector in (gain, bias))
    y: Tensor = extension.operators().quantised_linear_small_fwd(flat, codes, scale, levels, *factors, *vectors)
    return y.view(*x.shape[:-1], y.shape[1])
