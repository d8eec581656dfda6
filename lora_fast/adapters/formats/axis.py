"""Whether a magnitude has one entry for each output or for each input, and what decides it.

    V = W + ΔW [N, K, *kernel]      "output": m [N], ‖V[n]‖      "input": m [K], ‖V[:, k]‖

PEFT's, ai-toolkit's, torchtune's and MLX's is the output. LyCORIS and OneTrainer have both under one name,
``dora_scale``, and tell them apart by the shape: [N, 1, …] and [1, K, 1, …], also where N = K. What is left open by the
shape is decided by what the file notes of itself, or by the user; never by what is usual.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lora_fast.calls import Axis

# Of a magnitude that is not called dora_scale.
BY_NAME = "a magnitude by its name: one per output"
UNDECIDED = "undecided"  # the reason for an axis that decide refused to say


@dataclass(frozen=True)
class Claims:
    """What others say of the axis: the user, and the file of itself, ``noted_as`` in the words of its metadata.

    ``has_own_shapes``: a tool wrote it that has LyCORIS's shapes. Without it they may be PEFT's under LyCORIS's name.
    """

    user: Axis | None = None
    noted: Axis | None = None
    noted_as: str = ""
    has_own_shapes: bool = False


def decide(magnitude: Tensor, N: int, K: int, dim: int, claims: Claims) -> tuple[Axis, str]:
    """The axis of a ``dora_scale`` of a weight with ``dim`` dimensions, and why.

    Raises ValueError, as the end of a sentence that begins with the tensor, for what cannot be decided.
    """
    shape = list(magnitude.shape)
    ones = [1] * (dim - 2)
    found: dict[Axis, str] = {}
    if shape == [N, 1, *ones]:
        found["output"] = f"its shape is {_form('[N, 1', dim)}"
    if shape == [1, K, *ones]:
        found["input"] = f"its shape is {_form('[1, K', dim)}"
    # PEFT's shape for a convolution's, which some converters leave under LyCORIS's name
    if not claims.has_own_shapes and dim > 2 and shape == [1, N, *ones]:
        found["output"] = f"its shape is {_form('[1, N', dim)}, PEFT's"
    if shape == [N]:
        found["output"] = "it has N entries" + ("" if N == K else ", not K")
    if shape == [K]:
        found["input"] = "it has K entries" + ("" if N == K else ", not N")
    if N == K == 1 and found:
        return "output", "it has one entry, and the two norms are one"
    if not found:
        expected = f"{_form('[N, 1', dim)} or {_form('[1, K', dim)}"
        raise ValueError(f"has shape {shape}, expected {expected} with N = {N} and K = {K}")

    said = claims.user or claims.noted
    by = "magnitude_axis says so" if claims.user else f"the file says so ({claims.noted_as})"
    if said is not None and said not in found:
        (axis, reason), *_ = found.items()
        if claims.user:
            raise ValueError(f"has shape {shape}: it is of the {axis} axis, as {reason}; magnitude_axis says {said!r}")
        raise ValueError(
            f"has shape {shape}: it is of the {axis} axis, as {reason}, but the file notes {claims.noted_as}; "
            f"say which is right: magnitude_axis, --magnitude-axis {axis} or {said}"
        )
    if len(found) == 1:
        (axis, reason), *_ = found.items()
        return axis, reason
    if said is not None:
        return said, by
    raise ValueError(
        f"has shape {shape} on a layer with N = K = {N}, which may be of either axis; say which: magnitude_axis, "
        "--magnitude-axis output or input"
    )


def _form(start: str, dim: int) -> str:
    return start + (", 1, …]" if dim > 2 else "]")
