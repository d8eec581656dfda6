"""The plans of the Triton kernels: the limits are constants of :mod:`lora_fast.triton_kernels.constants`."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lora_fast import calls
from lora_fast.backends.passes import LINEAR, MATMUL, STACKED
from lora_fast.backends.plan import Linear, LinearGrad, Plan, Refusal, Step, is_stacked, joined, may_keep_norm
from lora_fast.triton_kernels import constants
from lora_fast.triton_kernels.constants import FEW_TOKENS
from lora_fast.triton_kernels.lora_gain_bwd import has_pieces, makes_h
from lora_fast.triton_kernels.target import current, has_vectors

# Whether a kernel of ours takes the product dv W, or cuBLAS and a pass over the output after it (predicted): the pass
# reads and writes 4 bytes an element in 16 bits, 1.0 ps at 4 TB/s. The product is 2 N FLOPs an element: at 990 TFLOPS,
# of which cuBLAS reaches 70% and a plain Triton kernel 55%, ours costs N · 0.79 fs more. They meet at N = 1270. x Wᵀ is
# cuBLAS's, since it is what training keeps. On an H200 a product with update, gain and bias in its epilogue took 408 µs
# at 8192 × 4096 × 4096, cuBLAS 345, and a pass from base to y, which moves two tensors, takes 40 (predicted from 0.79
# of a copy's bandwidth, which was measured).
#
# Products along the rank that nothing is fused with (h, dh, d lora_A, an update without a gain) are 2 R FLOPs an
# element of what they read, 2 or 4 bytes: above rank 200 the tensor cores decide, which cuBLAS keeps 70% busy, plain
# Triton kernels 55%, and less at 8192 × 4096, rank 384: 192 tiles of 128 × 128 are 1.5 turns of 132 multiprocessors.
# Three such products of a step at that size: 45 µs each against 65 to 85 (predicted).
#
# Up to this rank a call of training looks at no kept norm: lora_A and lora_B differ at almost every step, and to tell
# so costs a third of the norm: at 4096 × 4096 and rank 16 an H200 takes 6.4 µs for the key and 18.2 for the norm; at
# 8192 × 8192 and rank 384 the norm takes 126: there one that holds, as for micro-batches, is worth the look.
RENEWED_RANK = 64

_ONE_READ = "one read of W, s BA on the tensor cores; dense B@A moves W's bytes seven times"
_NO_GAIN = "without a gain the product is PyTorch's: lora_B = 0 gives nn.Linear's output to the bit"
_FLOAT32 = "float32 products follow PyTorch's TF32 setting, in cuBLAS"
_FUSED = "the pass over the output that is saved outweighs cuBLAS's lead in the product"
_KEPT = "cuBLAS's product is what training keeps, and one pass makes y of it"
_PRODUCTS = "cuBLAS's lead in a product of so many columns outweighs one pass over the output"
_STACKED = "[dv | dh] [W; lora_A]: no pass after cuBLAS's product; while another adapter has the rows, as without them"
_DROPOUT = "dropout in the epilogue; apart it takes six passes over [T, K]"
_EPILOGUE = "update, gain and bias in one pass after the product"
_ALONG_RANK = "the activation is read once, dropout and an input's gain on the way"
_GEMM = "at this rank the tensor cores decide, which cuBLAS keeps busier"
_RAGGED = "float32, or rows that do not come in 16-byte pieces"
_FEW = Plan({"y": Step("lora_linear_small_fwd", "W's bytes bound it: W is read once, by at most two launches")})
_NORM = Plan({"norm": Step("weight_norm_fwd", _ONE_READ)})
_NORM_KEPT = Plan({"norm": Step("weight_norm_kept", f"{_ONE_READ}; nothing where nothing has changed")})
_NORM_RENEWED = Plan({"norm": Step("weight_norm_fwd", f"{_ONE_READ}; in training the factors change, no key is made")})
_CODES = (
    "the codes are read once, W is in registers alone; by blocks of rows it is written and read, by three launches each"
)
_QUANTISED = Plan({"norm": Step("quantised_norm_fwd", _CODES)})
_QUANTISED_KEPT = Plan({"norm": Step("quantised_norm_kept", f"{_CODES}; nothing where nothing has changed")})
_ODD_BLOCK = Refusal("its kernel gives both codes of a byte one scale, of which blocks of an odd length have two")
weight_norm_bwd = Plan({"grad_V": Step("weight_norm_bwd", _ONE_READ)})
_GAIN_BWD = Step("lora_gain_bwd", "dv, d lora_B and the sums of the gain and the bias in one pass over dy")
_SAME_PASS = Step("lora_gain_bwd", "in that pass, its sums over blocks of columns added with the others")
lora_compose_fwd = Plan({"y": Step("lora_compose_fwd", _EPILOGUE)})
dropout = Plan({"y": Step("dropout", "one pass, the mask never in memory")})
merge_weight = Plan({"weight": Step("merge_weight", _ONE_READ)})


def weight_norm_fwd(call: calls.WeightNorm | calls.DoraLinear) -> Plan:
    return _NORM_KEPT if may_keep_norm(call) else _NORM


def quantised_norm_fwd(call: calls.QuantisedNorm) -> Plan | Refusal:
    blocks, K = call.scale.shape[1], call.lora_A.shape[1]
    if call.levels is not None and blocks > 1 and K // blocks % 2:
        return _ODD_BLOCK
    return _QUANTISED_KEPT if may_keep_norm(call) else _QUANTISED


def lora_linear_fwd(call: Linear) -> Plan:
    x = call.x
    chosen = constants.of(current(x.device))
    rank_gemm = chosen.gemm_rank <= call.lora_A.shape[0]
    plain = call.axis == "output" or not call.has_gain
    project = LINEAR if rank_gemm and plain and call.dropout_p == 0.0 else "lora_project"
    if not call.has_gain:
        return forward(project, "addmm_" if rank_gemm else "lora_compose_fwd", _NO_GAIN)
    # the kernel for few tokens has base before it has the product
    if x.shape[0] <= FEW_TOKENS and call.keep != "product":
        return _FEW
    return forward(project, "lora_compose_fwd", _FLOAT32 if x.dtype == torch.float32 else _KEPT)


@functools.cache
def forward(project: str, last: str, why: str) -> Plan:
    """h by ``project``; y by ``last``, after PyTorch's product."""
    h, y = (
        Step(project, _GEMM if project == LINEAR else _ALONG_RANK),
        Step(last, _GEMM if last == "addmm_" else _EPILOGUE),
    )
    return Plan({"h": h, "base": Step(LINEAR, why), "y": y})


def lora_linear_bwd(call: LinearGrad) -> Plan:
    grad_y = call.grad_y
    chosen = constants.of(current(grad_y.device))
    rank_gemm = chosen.gemm_rank <= call.lora_A.shape[0]
    plain = call.dropout_p == 0.0 and (call.axis == "output" or not call.has_gain)
    grad_A = MATMUL if rank_gemm and plain and call.lora_A.dtype == grad_y.dtype else "lora_A_grad"
    grad_h = _grad_h(call)
    if call.dropout_p > 0.0:
        return backward(grad_h, grad_A, "lora_input_grad", _DROPOUT)
    if is_stacked(call, chosen.stacked_tokens):
        return backward(grad_h, grad_A, STACKED, _STACKED)
    last = "addmm_" if rank_gemm else "lora_compose_fwd"
    if grad_y.dtype == torch.float32:
        return backward(grad_h, grad_A, last, _FLOAT32)
    if call.weight.shape[0] <= chosen.input_grad_contraction:
        return backward(grad_h, grad_A, "lora_input_grad", _FUSED)
    return backward(grad_h, grad_A, last, _PRODUCTS)


def lora_compose_bwd(call: calls.LoraComposeGrad) -> Plan:
    return Plan({"grad_v": _GAIN_BWD, "grad_h": _grad_h(call)})


def _grad_h(call: LinearGrad | calls.LoraComposeGrad) -> Step:
    """dh = s dv lora_B; float32's dots run outside the tensor cores, and elements of ragged rows come one by one."""
    grad_y: Tensor = call.grad_y
    if grad_y.dtype == torch.float32 or grad_y.shape[1] % 16 != 0:
        return Step(MATMUL, _RAGGED)
    target, (N, R) = current(grad_y.device), call.lora_B.shape
    if constants.of(target).gemm_rank <= R:
        return Step(MATMUL, _GEMM)
    if call.need_B and not call.need_bias:
        assert call.h is not None
        vectors = has_vectors(grad_y) and (call.product is None or has_vectors(call.product)) and has_pieces(call.h)
        if makes_h(grad_y.shape[0], N, R, grad_y.dtype, vectors, target):
            return _SAME_PASS
    return Step("lora_project", _ALONG_RANK)


@functools.cache
def backward(grad_h: Step, grad_A: str, last: str, why: str) -> Plan:
    """dh by that step, d lora_A by ``grad_A``; dx by ``last``, after PyTorch's product or with the product in it."""
    steps = {"grad_v": _GAIN_BWD, "grad_h": grad_h}
    steps["grad_A"] = Step(grad_A, _GEMM if grad_A == MATMUL else _ALONG_RANK)
    if last not in ("lora_input_grad", STACKED):
        steps["grad_base"] = Step(MATMUL, why)
    steps["grad_x"] = Step(last, _GEMM if last == "addmm_" else _EPILOGUE if "grad_base" in steps else why)
    return Plan(steps)


def dora_linear_fwd(call: calls.DoraLinear) -> Plan:
    renews = call.keep != "nothing" and call.lora_A.shape[0] <= RENEWED_RANK
    return joined(_NORM_RENEWED if renews else weight_norm_fwd(call), lora_linear_fwd(call))


def dora_linear_bwd(call: calls.DoraLinearGrad) -> Plan:
    linear = lora_linear_bwd(call)
    return joined(weight_norm_bwd, linear) if call.through_norm else linear


_SORT = "a stable sort of the ids: launches alone, the host does not wait"
_FIND = (
    "a block of rows of one adapter a program, which finds it from where the groups start: no copies of rows or factors"
)
_ONE_PRODUCT = "one product with W for all rows, whatever their adapters"
_PROJECT = Step("grouped_project", _FIND)
_COMPOSE = Step("grouped_compose", f"{_EPILOGUE}; {_FIND}")
group_rows = Plan({"order, starts": Step("torch.sort", _SORT)})
_GROUPED = Plan({"h": _PROJECT, "base": Step(LINEAR, _ONE_PRODUCT), "y": _COMPOSE})
_GROUPED_FEW = Plan({"y": Step("grouped_linear_small_fwd", "W's bytes bound it: W is read once, by two launches")})
_GROUPED_BASE_GIVEN = Plan({"h": _PROJECT, "y": _COMPOSE})
grouped_lora_bwd = Plan(
    {
        "grad_v": Step("grouped_gain_bwd", "dv and the sums of the gains and the bias in one pass over dy"),
        "grad_h": _PROJECT,
        "grad_A, grad_B": Step("grouped_outer", "each adapter's rows in order, sums in registers, no atomics"),
        "grad_base": Step(MATMUL, _ONE_PRODUCT),
        "grad_x": Step("grouped_compose", f"dh lora_A, in place; {_FIND}"),
    }
)
grouped_weight_norm_fwd = Plan(
    {"norm": Step("grouped_weight_norm_fwd", "all adapters meet a block of W's rows while L2 has it: W is read once")}
)
grouped_weight_norm_bwd = Plan({"grad_V": Step("weight_norm_bwd", f"an adapter after the other; {_ONE_READ}")})


def grouped_lora_fwd(call: calls.GroupedLora) -> Plan:
    """With a gain, and few tokens, W's bytes bind, which one kernel reads beside what each token reads of lora_B.

    Above 16 tokens every block of W's rows would read more of x from L2 than of W from memory, and where a token reads
    half of W's bytes, adapters that several tokens share are read too often (predicted). Without a gain the rows of the
    base are to be nn.Linear's to the bit.
    """
    if call.base is not None:
        return _GROUPED_BASE_GIVEN
    (T, K), R = call.x.shape, max(lora_A.shape[-2] for lora_A in call.lora_A)
    return _GROUPED_FEW if call.gain is not None and T <= FEW_TOKENS and 2 * T * R <= K else _GROUPED


_GLU = "both updates, gains and biases, the activation and the product of both sides in one pass over the base products"
_GLU_BWD = "both sides made again from the base products, with both gradients, the output and all sums in one pass"
lora_glu_fwd = Plan({"output": Step("lora_glu_fwd", _GLU)})
lora_glu_bwd = Plan({"grad_bases": Step("lora_glu_bwd", _GLU_BWD)})
_BLOCKS = "cuBLAS's products, for a block of tokens after the other where nothing of them is kept"
adapted_mlp_fwd = Plan({"base": Step(LINEAR, _BLOCKS), **lora_glu_fwd.steps, **lora_compose_fwd.steps})
adapted_mlp_bwd = Plan(
    {
        "base": Step(MATMUL, _BLOCKS),
        "grad_v": Step("lora_gain_bwd", "dv of down and the sums of its gain and bias in one pass over dy"),
        **lora_glu_bwd.steps,
        "grad_x": Step("lora_compose_fwd", _EPILOGUE),
    }
)
