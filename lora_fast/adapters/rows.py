"""Updates of some rows of a weight: of one of several modules that another code base holds one below another.

With W = [W_1; W_2; …] and an update s · B A of W, that of W_i is s · B_i A, with the rows B_i of B: LoRA, and DoRA with
a norm for each output, whose magnitude has the same rows. A norm for each input is one over all of W's rows, so that no
part of it computes the same alone. The other way round B = blockdiag(B_1, B_2, …) and A = [A_1; A_2; …].
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from lora_fast.adapters.adapter import AdapterLayer, Rows


def of_parts(N: int, K: int, index: int, count: int, what: str) -> Rows:
    """The rows of part ``index`` of a weight [N, K] of ``count`` parts: each has K rows, the last the rest."""
    if (count - 1) * K + 1 > N:
        raise ValueError(f"{what}: a weight [{N}, {K}] does not hold the rows of {count} others, which have {K} each")
    return Rows(index * K, N if index == count - 1 else (index + 1) * K)


def part(layer: AdapterLayer, index: int, count: int, what: str) -> Rows:
    """The rows of part ``index`` of a layer's weight: by the sizes that its file gives, or as :func:`of_parts`."""
    if layer.row_parts:
        ends = [sum(layer.row_parts[: each + 1]) for each in range(len(layer.row_parts))]
        return Rows(ends[index] - layer.row_parts[index], ends[index])
    return of_parts(layer.out_features, layer.in_features, index, count, what)


def taken(layer: AdapterLayer, rows: Rows, what: str) -> AdapterLayer:
    """The update of ``rows`` of the layer's weight."""
    if layer.magnitude is not None and layer.norm_axis == "input":
        raise ValueError(
            f"{what} has one norm for each input, over all rows of the weight, of which a part alone cannot be "
            "computed; merge into a checkpoint that has the weight whole"
        )
    if not 0 <= rows.start < rows.stop <= layer.out_features:
        raise ValueError(f"{what} has {layer.out_features} outputs, which do not hold rows {rows.start} to {rows.stop}")
    lora_A, lora_B = layer.lora_A, layer.lora_B[rows.start : rows.stop]
    used = lora_B.flatten(1).any(0)  # of a block diagonal, the part's own block
    if layer.lora_mid is None and used.any() and not used.all():
        lora_A, lora_B = lora_A[used], lora_B[:, used]
    return dataclasses.replace(
        layer,
        lora_A=lora_A.contiguous(),
        lora_B=lora_B.contiguous(),
        magnitude=None if layer.magnitude is None else layer.magnitude[rows.start : rows.stop].contiguous(),
        row_parts=(),
    )


def fused(parts: dict[Rows, AdapterLayer], N: int, what: str, row_parts: tuple[int, ...] = ()) -> AdapterLayer:
    """One update of a weight with N rows that does what ``parts`` do to theirs, of the sum of their ranks.

    Where their factors differ they are multiplied into lora_B. ValueError where one update cannot do it: a norm for
    each input, and DoRA of some rows only.
    """
    ordered = dict(sorted(parts.items()))
    layers = list(ordered.values())
    with_magnitude = [layer for layer in layers if layer.magnitude is not None]
    covered = sum(rows.stop - rows.start for rows in ordered)
    if with_magnitude and (len(with_magnitude) < len(layers) or covered < N):
        raise ValueError(f"{what}: DoRA of some of its rows only, which one adapter of all of them cannot express")
    for rows, layer in ordered.items():
        if layer.kernel or layer.out_features != rows.stop - rows.start or layer.in_features != layers[0].in_features:
            sizes = f"lora_A {list(layer.lora_A.shape)} and lora_B {list(layer.lora_B.shape)}"
            raise ValueError(f"{what}: has {sizes} for rows {rows.start} to {rows.stop} of the weight")
    if len({layer.norm_eps for layer in with_magnitude}) > 1:
        raise ValueError(f"{what}: its tool adds different numbers to the norms of its rows; merge it")
    if any(layer.norm_axis == "input" for layer in with_magnitude):
        raise ValueError(f"{what}: several norms for each input, which one adapter of all its rows cannot express")
    scalings = {layer.scaling for layer in layers}
    lora_A = torch.cat([layer.lora_A for layer in layers])
    lora_B = lora_A.new_zeros(N, len(lora_A))
    column = 0
    for rows, layer in ordered.items():
        own = layer.lora_B if len(scalings) == 1 else scaled(layer)
        lora_B = lora_B.to(torch.promote_types(lora_B.dtype, own.dtype))
        lora_B[rows.start : rows.stop, column : column + layer.rank] = own
        column += layer.rank
    return AdapterLayer(
        lora_A=lora_A,
        lora_B=lora_B,
        magnitude=torch.cat([layer.magnitude for layer in layers if layer.magnitude is not None])
        if with_magnitude
        else None,
        scaling=scalings.pop() if len(scalings) == 1 else 1.0,
        axis_reason=layers[0].axis_reason,
        norm_eps=layers[0].norm_eps,
        row_parts=row_parts,
    )


def are_rounded(parts: dict[Rows, AdapterLayer]) -> bool:
    """Whether :func:`fused` multiplies different factors into lora_B, which rounds it."""
    return len({layer.scaling for layer in parts.values()}) > 1


def scaled(layer: AdapterLayer) -> Tensor:
    """lora_B times the factor, rounded once to float32, or to float64 where it is that."""
    dtype = torch.promote_types(layer.lora_B.dtype, torch.float32)
    return (layer.lora_B.double() * layer.scaling).to(dtype)


def half_rotation(layer: AdapterLayer, heads: int, what: str) -> AdapterLayer:
    """The rows of a projection to queries or keys in transformers' order, from that of torchtune and Meta's models.

    These rotate rows 2i and 2i + 1 of a head together, transformers rows i and i + D / 2.
    """
    N = layer.out_features
    if N % (2 * heads):
        raise ValueError(f"{what} has {N} outputs, which {heads} heads do not share evenly")
    order = torch.arange(N).view(heads, N // heads // 2, 2).transpose(1, 2).reshape(-1)
    magnitude = None if layer.magnitude is None else layer.magnitude[order]
    return dataclasses.replace(layer, lora_B=layer.lora_B[order], magnitude=magnitude)
