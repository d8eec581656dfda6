"""The compiled extension ``lora_fast._C``: whether it is there, and the schemas of its operators, ``lora_fast_c::…``.

The operators are implemented in csrc, and called by the backends cpu and cuda alone.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType, SimpleNamespace

import torch

_LINEAR_FWD = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, float scaling, Tensor? gain, "
    "Tensor? magnitude, bool keep_base, Tensor(a!)? kept_norm, Tensor(b!)? kept_key, int version) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_GLU = (
    "Tensor base_gate, Tensor base_up, Tensor? h_gate, Tensor? h_up, Tensor? lora_B_gate, Tensor? lora_B_up, "
    "float scaling_gate, float scaling_up, Tensor? gain_gate, Tensor? gain_up, Tensor? bias_gate, Tensor? bias_up, "
    "int activation"
)
_SCHEMAS = (
    "weight_norm_fwd(Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, bool per_output) -> Tensor",
    "weight_norm_kept(Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, bool per_output, "
    "Tensor(a!) kept_norm, Tensor(b!) kept_key, int version) -> Tensor",
    "quantised_norm_fwd(Tensor codes, Tensor scale, Tensor? levels, ScalarType dtype, Tensor lora_A, Tensor lora_B, "
    "float scaling) -> Tensor",
    "quantised_linear_small_fwd(Tensor x, Tensor codes, Tensor scale, Tensor? levels, Tensor lora_A, Tensor lora_B, "
    "float scaling, Tensor? gain, Tensor? bias) -> Tensor",
    "load_kept_norm(Tensor kept_norm, Tensor kept_key, Tensor key, Tensor(a!) norm) -> bool",
    "keep_norm(Tensor(a!) kept_norm, Tensor(b!) kept_key, Tensor key, Tensor norm) -> ()",
    "weight_norm_bwd(Tensor grad, Tensor norm, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, "
    "bool per_output, bool need_A, bool need_B) -> (Tensor, Tensor)",
    "lora_compose_fwd(Tensor base, Tensor h, Tensor lora_B, float scaling, Tensor? gain, Tensor? bias, "
    "Tensor(a!) out, Tensor(b!)? product) -> ()",
    "lora_gain_bwd(Tensor grad_y, Tensor? product, Tensor? gain, bool need_scaled, bool need_gain, bool need_bias) "
    "-> (Tensor, Tensor, Tensor)",
    "lora_linear_fwd(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, Tensor gain, "
    "Tensor? bias, Tensor(a!) y, Tensor(b!)? product) -> Tensor",
    "dora_linear_fwd(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, Tensor magnitude, "
    "Tensor? bias, Tensor(a!) y, Tensor(b!)? product, Tensor(c!) norm, bool norm_known) -> Tensor",
    "lora_linear_bwd(Tensor grad_y, Tensor? x, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, "
    "Tensor? gain, Tensor? product, Tensor? h, bool need_x, bool need_A, bool need_B, bool need_gain, bool need_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "lora_linear_small_fwd(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, Tensor? gain, "
    "Tensor? bias, Tensor(a!) y, Tensor(b!)? product) -> Tensor",
    "dora_linear_small_fwd(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, Tensor magnitude, "
    "Tensor? bias, Tensor(a!) y, Tensor(b!)? product, Tensor(c!) norm, Tensor(d!)? kept_norm, Tensor(e!)? kept_key, "
    "int version) -> Tensor",
    "lora_linear_small_bwd(Tensor grad_y, Tensor? x, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, "
    "Tensor? gain, Tensor? product, Tensor? h, bool need_x, bool need_A, bool need_B, bool need_gain, bool need_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "linear_fwd" + _LINEAR_FWD,
    "linear_small_fwd" + _LINEAR_FWD,
    "linear_bwd(Tensor grad_y, Tensor? x, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, Tensor? gain, "
    "Tensor? magnitude, Tensor? norm, Tensor? product, Tensor? h, bool from_base, bool need_x, bool need_A, "
    "bool need_B, bool need_gain, bool need_bias, Tensor? stacked=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "is_zero(Tensor matrix) -> bool",
    "group_rows(Tensor adapter, int count) -> (Tensor, Tensor)",
    "grouped_weight_norm_fwd(Tensor weight, Tensor[] lora_A, Tensor[] lora_B, float[] scaling) -> Tensor",
    "grouped_project(Tensor x, Tensor[] lora_A, Tensor order, Tensor starts, Tensor? ranks) -> Tensor",
    "grouped_compose(Tensor base, Tensor h, Tensor[] factors, bool transposed, Tensor? scaling, Tensor? gain, "
    "Tensor? bias, Tensor order, Tensor starts, Tensor? ranks, Tensor(a!) out, Tensor(b!)? product) -> ()",
    "grouped_linear_small_fwd(Tensor x, Tensor weight, Tensor[] lora_A, Tensor[] lora_B, Tensor scaling, Tensor? gain, "
    "Tensor? bias, Tensor order, Tensor starts, Tensor? ranks, Tensor(a!) y, Tensor(b!)? product) -> Tensor",
    "grouped_gain_bwd(Tensor grad_y, Tensor? product, Tensor? gain, Tensor order, Tensor starts, bool need_scaled, "
    "bool need_gain, bool need_bias) -> (Tensor, Tensor, Tensor)",
    f"lora_glu_fwd({_GLU}) -> Tensor",
    f"lora_glu_bwd(Tensor grad, {_GLU}, bool need_output, bool need_gain_gate, bool need_gain_up, "
    "bool need_bias_gate, bool need_bias_up, bool joined) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "dropout(Tensor x, Tensor seed, float p) -> Tensor",
    "merge_weight(Tensor(a!) weight, Tensor lora_A, Tensor lora_B, float scaling, Tensor? gain, bool per_output) -> ()",
    "content_key(Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, bool per_output, int version) -> Tensor",
    "content_key_of(Tensor lora_A, Tensor lora_B, Tensor[] made_of, int host) -> Tensor",
    "scratch_events(bool record) -> Tensor",
)

_library = torch.library.Library("lora_fast_c", "DEF")
for _schema in _SCHEMAS:
    _library.define(_schema)


@functools.cache
def module() -> ModuleType:
    """The extension, which is to be there."""
    return importlib.import_module("lora_fast._C")


@functools.cache
def operators() -> SimpleNamespace:
    """By name, without the choice of an overload, which takes the host half a microsecond at each call."""
    names = (schema.partition("(")[0] for schema in _SCHEMAS)
    return SimpleNamespace(**{name: getattr(torch.ops.lora_fast_c, name).default for name in names})


def amx_enabled() -> bool:
    """Whether the CPU's kernels use AMX: the processor has it, and no test has turned it off."""
    return module().amx_enabled()


def avx512_bf16_enabled() -> bool:
    """The same of the pairwise products of AVX512-BF16."""
    return module().avx512_bf16_enabled()


@functools.cache
def has_torchs_vectors() -> bool:
    """Whether the kernels' vectors are as wide as PyTorch's here: not every compiler makes more than generic ones."""
    widths, capability = ("DEFAULT", "AVX2", "AVX512"), torch.backends.cpu.get_cpu_capability()
    return capability not in widths or widths.index(module().vectors()) >= widths.index(capability)


def cpu_family() -> tuple[str, int]:
    """The maker of an x86 processor and its family, ("AuthenticAMD", 26) for Zen 5; ("", 0) of others."""
    return module().cpu_family()


@functools.cache
def status() -> tuple[bool, str, dict]:
    """``(loaded, reason, build_info)`` of the extension; never raises.

    ``reason`` says why it is missing, or "loaded"; ``build_info`` is what the extension says of itself.
    """
    try:
        return True, "loaded", module().build_info()
    except Exception as error:  # a broken binary raises anything from ImportError to OSError; it is reported
        return False, _why_missing(error), {}


def missing() -> str | None:
    """Why the extension is not there; None if it is."""
    loaded, reason, _ = status()
    return None if loaded else reason


def _why_missing(error: Exception) -> str:
    try:
        from lora_fast import _build
    except ImportError:
        return f"lora_fast._C could not be imported: {error}"
    if _build.KIND == "none":
        return f"this installation is pure Python: {_build.REASON}"
    return f"lora_fast._C was built ({_build.KIND}) but could not be loaded: {error}"
