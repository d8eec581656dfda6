"""LinearWithLoRA and LinearWithDoRA: the function, the parameters, what they accept."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nn_helpers import (
    DORA_KINDS,
    IN,
    KINDS,
    OUT,
    RANK,
    adapter_names,
    assert_same_function,
    expected,
    gradients,
    make_layer,
    move_adapter,
    snapshot,
)
from support import few_roundings
from torch import nn
from torch.nn.utils import parametrizations, prune

import lora_fast
from lora_fast import LinearWithDoRA, LinearWithLoRA

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_are_the_references(kind: str, bias: bool, backend: str) -> None:
    layer = make_layer(kind, bias=bias, backend=backend)
    assert_same_function(layer, torch.randn(5, IN))


@pytest.mark.parametrize("kind", DORA_KINDS)
def test_full_norm_gradient(kind: str, backend: str) -> None:
    layer = make_layer(kind, dtype=torch.float64, detach_norm=False, backend=backend)
    x = torch.randn(5, IN, dtype=torch.float64)
    assert_same_function(layer, x)
    detached = make_layer(kind, dtype=torch.float64, backend=backend)
    # the two gradients differ, so the test above could tell
    assert not torch.allclose(gradients(layer(x), layer)[0], gradients(detached(x), detached)[0])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(kind: str, dtype: torch.dtype, backend: str) -> None:
    layer = make_layer(kind, dtype=dtype, backend=backend)
    x = torch.randn(9, IN).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected(layer, x), rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
    assert {layer.lora_A.dtype, layer.lora_B.dtype, layer.linear.weight.dtype} == {dtype}
    if kind != "lora":
        assert layer.magnitude.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_dtype(kind: str, backend: str) -> None:
    layer = make_layer(kind, dtype=torch.bfloat16, adapter_dtype=torch.float32, backend=backend)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    x = torch.randn(9, IN, dtype=torch.bfloat16)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected(layer, x), **few_roundings(y.dtype))
    assert {gradient.dtype for gradient in gradients(y, layer)} == {torch.float32}


@pytest.mark.parametrize("shape", [(IN,), (1, IN), (3, IN), (2, 3, IN), (2, 1, 3, IN), (0, IN), (2, 0, IN)])
@pytest.mark.parametrize("kind", KINDS)
def test_one_to_n_dimensions_and_zero_tokens(kind: str, shape: tuple[int, ...], backend: str) -> None:
    layer = make_layer(kind, backend=backend)
    x = torch.randn(shape)
    assert layer(x).shape == (*shape[:-1], OUT)
    assert_same_function(layer, x)


@pytest.mark.parametrize("kind", KINDS)
def test_non_contiguous_input_and_weight(kind: str, backend: str) -> None:
    layer = make_layer(kind, backend=backend)
    layer.linear.weight = nn.Parameter(layer.linear.weight.detach().T.contiguous().T, requires_grad=False)
    assert not layer.weight.is_contiguous()
    assert_same_function(layer, torch.randn(IN, 6).T)
    assert_same_function(layer, torch.randn(6, 2 * IN)[:, ::2])
    assert_same_function(layer, torch.randn(1, IN).expand(4, IN))


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_fresh_lora_is_the_linear_to_the_bit(dtype: torch.dtype, backend: str) -> None:
    layer = make_layer("lora", fresh=True, dtype=dtype, backend=backend)
    x = torch.randn(9, IN).to(dtype)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("kind", DORA_KINDS)
def test_a_fresh_dora_has_gain_one(kind: str, backend: str) -> None:
    layer = make_layer(kind, fresh=True, backend=backend)
    norm = lora_fast.functional.weight_norm(
        layer.weight, layer.lora_A, layer.lora_B, layer.alpha, axis=layer.norm_axis, backend=backend
    )
    assert torch.equal(layer.magnitude, norm)
    x = torch.randn(9, IN)
    torch.testing.assert_close(layer(x), layer.linear(x))


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_and_state_dict_keys(kind: str) -> None:
    layer = make_layer(kind, fresh=True)
    adapter = {"lora_A": (RANK, IN), "lora_B": (OUT, RANK)}
    if kind != "lora":
        adapter["magnitude"] = (OUT,) if kind == "dora-output" else (IN,)
    keys = {"linear.weight": (OUT, IN), "linear.bias": (OUT,), **adapter}
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == keys
    assert set(adapter_names(layer)) == set(adapter)
    assert not list(layer.buffers())


def test_properties_and_repr() -> None:
    linear = nn.Linear(IN, OUT)
    layer = LinearWithDoRA(linear, RANK, 2, dropout=0.25, norm_axis="input", detach_norm=False, backend="torch")
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert (layer.in_features, layer.out_features, layer.rank) == (IN, OUT, RANK)
    assert layer.alpha == layer.scaling == 2.0
    text = repr(layer)
    for part in (
        "rank=4, alpha=2, dropout=0.25",
        "backend='torch'",
        "norm_axis='input', detach_norm=False",
        "Linear(in_fea",
    ):
        assert part in text
    assert LinearWithLoRA(nn.Linear(IN, OUT, bias=False), RANK, 1.0).bias is None


def test_initialisation_is_kaiming_uniform_and_follows_the_seed() -> None:
    def fresh() -> LinearWithLoRA:
        torch.manual_seed(3)
        return LinearWithLoRA(nn.Linear(64, 32), 16, 1.0)

    layer = fresh()
    assert not layer.lora_B.any()
    bound = 1 / 64**0.5
    assert layer.lora_A.abs().max() <= bound * (1 + 1e-6)
    assert layer.lora_A.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert torch.equal(layer.lora_A, fresh().lora_A)


def test_the_layer_takes_the_linears_mode() -> None:
    assert LinearWithLoRA(nn.Linear(IN, OUT), RANK, 1.0).training
    assert not LinearWithLoRA(nn.Linear(IN, OUT).eval(), RANK, 1.0).training


@pytest.mark.parametrize("kind", KINDS)
def test_meta_linear(kind: str) -> None:
    with torch.device("meta"):
        linear = nn.Linear(IN, OUT)
    layer = LinearWithLoRA(linear, RANK, 1.0) if kind == "lora" else LinearWithDoRA(linear, RANK, 1.0)
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}
    layer.to_empty(device="cpu")
    with torch.no_grad():
        layer.linear.reset_parameters()
    layer.reset_parameters()
    x = torch.randn(3, IN)
    torch.testing.assert_close(layer(x), layer.linear(x))


# dropout


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_acts_on_the_adapters_input_only(kind: str, backend: str) -> None:
    layer = make_layer(kind, n_in=64, dropout=0.5, backend=backend)
    x = torch.randn(200, 64)
    torch.manual_seed(5)
    y = layer(x)
    torch.manual_seed(5)
    seed = lora_fast.functional.draw_seed("cpu")
    # drop(1), read through an identity: W = 0, A = B = 1
    eye = torch.eye(64)
    mask = lora_fast.functional.lora_linear(
        torch.ones_like(x), torch.zeros(64, 64), None, eye, eye, 1.0, dropout_p=0.5, seed=seed, backend=backend
    )
    assert set(mask.unique().tolist()) == {0.0, 2.0}
    torch.testing.assert_close(y, expected(layer, x, mask), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients(y, layer), gradients(expected(layer, x, mask), layer), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_follows_the_mode_and_the_generator(kind: str, backend: str) -> None:
    layer = make_layer(kind, dropout=0.5, backend=backend)
    x = torch.randn(20, IN)
    assert not torch.equal(layer(x), layer(x))
    state = torch.random.get_rng_state()
    first = layer(x)
    torch.random.set_rng_state(state)
    assert torch.equal(layer(x), first)
    layer.eval()
    state = torch.random.get_rng_state()
    torch.testing.assert_close(layer(x), expected(layer, x))
    assert torch.equal(torch.random.get_rng_state(), state)


# bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank: got 0"),
        ({"rank": -1}, ValueError, "rank: got -1"),
        ({"rank": 2.0}, TypeError, "rank: got 2.0"),
        ({"rank": True}, TypeError, "rank: got True"),
        ({"alpha": float("nan")}, ValueError, "alpha: got nan"),
        ({"alpha": float("inf")}, ValueError, "alpha: got inf"),
        ({"alpha": "16"}, TypeError, "alpha: got '16'"),
        ({"alpha": None}, TypeError, "alpha: got None"),
        ({"dropout": 1.0}, ValueError, "dropout: got 1.0"),
        ({"dropout": -0.1}, ValueError, "dropout: got -0.1"),
        ({"dropout": "0.1"}, TypeError, "dropout: got '0.1'"),
        ({"backend": "fast"}, ValueError, "backend: got 'fast', expected one of 'auto', 'cpu', "),
        ({"adapter_dtype": torch.int8}, TypeError, "adapter_dtype: got torch.int8"),
        ({"adapter_dtype": "bfloat16"}, TypeError, "adapter_dtype: got 'bfloat16'"),
    ],
)
@pytest.mark.parametrize("layer_class", [LinearWithLoRA, LinearWithDoRA])
def test_bad_arguments_are_named_and_change_nothing(
    layer_class: type, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    linear = nn.Linear(IN, OUT)
    before = snapshot(linear)
    with pytest.raises(error, match=message):
        layer_class(linear, **{"rank": RANK, "alpha": 1.0, **options})
    assert all(parameter.requires_grad for parameter in linear.parameters())
    assert all(torch.equal(linear.get_parameter(name), value) for name, value in before.items())


def test_bad_norm_axis() -> None:
    with pytest.raises(ValueError, match="norm_axis: got 'rows', expected 'output' or 'input'"):
        LinearWithDoRA(nn.Linear(IN, OUT), RANK, 1.0, norm_axis="rows")


def test_a_large_rank_is_allowed_with_a_warning(backend: str) -> None:
    with pytest.warns(UserWarning, match=r"rank 9 is above min\(in_features, out_features\) = 7") as caught:
        layer = LinearWithDoRA(nn.Linear(IN, OUT), OUT + 2, 1.0, backend=backend)
    assert caught[0].filename == __file__
    move_adapter(layer)
    assert_same_function(layer, torch.randn(3, IN))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LinearWithLoRA(nn.Linear(IN, OUT), OUT, 1.0)


class OwnForward(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


class PackedTensor(torch.Tensor):
    """Stands for torchao's, bitsandbytes' and DTensor's: a tensor subclass as the weight."""


def _with(change: Any) -> nn.Linear:
    linear = nn.Linear(IN, OUT)
    change(linear)
    return linear


def _instance_forward(linear: nn.Linear) -> None:
    linear.forward = lambda x: x  # what accelerate's add_hook_to_module does


def _subclass_weight(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(PackedTensor), requires_grad=False)


def _integer_weight(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(torch.ones(OUT, IN, dtype=torch.int8), requires_grad=False)


UNSUITABLE = {
    "other module": (nn.Conv1d(1, 1, 1), "got torch.nn.modules.conv.Conv1d, expected torch.nn.Linear"),
    "bilinear": (nn.Bilinear(2, 2, 2), "expected torch.nn.Linear"),
    "tensor": (torch.ones(2, 2), "expected torch.nn.Linear"),
    "own forward": (OwnForward(IN, OUT), "has a forward of its own"),
    "instance forward": (_with(_instance_forward), "has a forward of its own"),
    "subclass weight": (_with(_subclass_weight), "linear.weight: got PackedTensor"),
    "integer weight": (_with(_integer_weight), "linear.weight: got torch.int8"),
    "complex weight": (nn.Linear(IN, OUT, dtype=torch.complex64), "linear.weight: got torch.complex64"),
    "parametrized": (parametrizations.weight_norm(nn.Linear(IN, OUT)), "parametrized"),
    "pruned": (_with(lambda linear: prune.identity(linear, "weight")), "linear.weight: got Tensor"),
    "forward hook": (_with(lambda linear: linear.register_forward_hook(lambda *_: None)), "has hooks"),
    "pre-hook": (_with(lambda linear: linear.register_forward_pre_hook(lambda *_: None)), "has hooks"),
    "backward hook": (_with(lambda linear: linear.register_full_backward_hook(lambda *_: None)), "has hooks"),
}


@pytest.mark.parametrize("name", UNSUITABLE)
@pytest.mark.parametrize("layer_class", [LinearWithLoRA, LinearWithDoRA])
def test_unsuitable_linears_get_a_type_error(layer_class: type, name: str) -> None:
    linear, message = UNSUITABLE[name]
    with pytest.raises(TypeError, match=message):
        layer_class(linear, RANK, 1.0)


@pytest.mark.parametrize("layer_class", [LinearWithLoRA, LinearWithDoRA])
def test_an_adapted_layer_is_refused(layer_class: type) -> None:
    with pytest.raises(ValueError, match="adapted already"):
        layer_class(make_layer("lora"), RANK, 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_weight_that_requires_grad_is_refused_in_forward(kind: str) -> None:
    layer = make_layer(kind)
    layer.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="weight: got requires_grad=True"):
        layer(torch.randn(3, IN))


@pytest.mark.parametrize("kind", KINDS)
def test_bad_activations(kind: str) -> None:
    layer = make_layer(kind)
    with pytest.raises(ValueError, match="x: got shape"):
        layer(torch.randn(3, IN + 1))
    with pytest.raises(TypeError, match=r"x: got dtype torch.float64"):
        layer(torch.randn(3, IN, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"x: got dtype torch.int64"):
        layer(torch.ones(3, IN, dtype=torch.int64))


@pytest.mark.parametrize("train", [False, True])
def test_the_default_device_and_dtype_change_nothing(train: bool, backend: str) -> None:
    layer = lora_fast.LinearWithDoRA(nn.Linear(64, 96), 4, 1.0, backend=backend).train(train)
    x = torch.randn(5, 64)
    expected = layer(x)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            actual = layer(x)
            actual.backward(actual.detach())
    finally:
        torch.set_default_dtype(default)
    assert torch.equal(actual, expected)
    assert layer.magnitude.grad is not None
    assert layer.magnitude.grad.device == x.device
