"""Weights with room for lora_A below them: what files, copies and other modules see, and who frees the memory.

On the CPU, whose weights are stacked here by the tests alone; the products, which Triton's plan chooses, are run with
its interpreter.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from support import call, check, check_each_alone, tensors_of
from torch import Tensor, nn

import lora_fast
from lora_fast import LinearWithDoRA, LinearWithLoRA, functional, reference, stacked
from lora_fast.testing import Case, Inputs, make_inputs, peak_bytes

N, K, R = 640, 48, 16


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacked, "DEVICES", ("cpu", "cuda"))


def linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(K, N, dtype=dtype)


def layer(**options) -> LinearWithDoRA:
    return LinearWithDoRA(linear(), R, 0.5, **options)


def buffer_of(weight: Tensor) -> Tensor:
    found = stacked.find(weight)
    assert found is not None
    buffer = found.buffer()
    assert buffer is not None
    return buffer


def live_bytes() -> int:
    """Of the buffers that are not freed."""
    gc.collect()
    buffers = [found.buffer() for found in stacked._stacks.values()]
    return sum(buffer.nbytes for buffer in buffers if buffer is not None)


def test_a_layer_has_the_room_and_its_weight_an_ordinary_storage() -> None:
    before = linear()
    adapted = layer()
    buffer = buffer_of(adapted.weight)
    assert buffer.shape == (N + stacked.ROWS, K)
    assert buffer.data_ptr() == adapted.weight.data_ptr()
    assert torch.equal(adapted.weight, before.weight)
    assert adapted.weight.untyped_storage().nbytes() == N * K * 4
    assert adapted.weight.is_contiguous()
    assert not buffer[N:].any()
    buffer[0, 0] = 3.0
    assert adapted.weight[0, 0] == 3.0


def test_what_is_not_stacked() -> None:
    alias = linear()
    others = {
        "opt-out": LinearWithDoRA(linear(), R, 0.5, stack_weight=False),
        "input axis": LinearWithDoRA(linear(), R, 0.5, norm_axis="input"),
        "LoRA": LinearWithLoRA(linear(), R, 0.5),
        "few rows": LinearWithDoRA(nn.Linear(K, 511), R, 0.5),
    }
    for name, other in others.items():
        assert stacked.find(other.weight) is None, name
    view = alias.weight.data
    assert stacked.find(LinearWithDoRA(alias, R, 0.5).weight) is None  # `view` would go on showing the old memory
    assert view.data_ptr() == alias.weight.data_ptr()
    flat = torch.zeros(2 * N * K)
    part = linear()
    part.weight.data = flat[: N * K].view(N, K)
    assert stacked.find(LinearWithDoRA(part, R, 0.5).weight) is None
    transposed = linear()
    transposed.weight.data = transposed.weight.data.T.contiguous().T
    assert stacked.find(LinearWithDoRA(transposed, R, 0.5).weight) is None
    assert stacked.find(torch.zeros(N, K)) is None


def test_a_weight_is_stacked_while_it_is_frozen() -> None:
    plain = linear()
    stacked.stack(plain.weight, R)
    assert stacked.find(plain.weight) is None
    plain.requires_grad_(False)
    stacked.stack(plain.weight, R)
    assert stacked.find(plain.weight) is not None


def test_files_copies_and_pickles_have_an_ordinary_weight() -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    adapted, plain = layer(), layer(stack_weight=False)
    for module in (adapted, plain):
        stacked_state = module.state_dict()
        assert stacked_state["linear.weight"].untyped_storage().nbytes() == N * K * 4

    def sizes(module: nn.Module) -> list[int]:
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        return [len(file.getvalue()), len(safetensors.save(module.state_dict())), len(pickle.dumps(module))]

    ours, theirs = sizes(adapted), sizes(plain)
    assert all(abs(one - other) < 100 for one, other in zip(ours, theirs, strict=True))
    for copied in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        assert torch.equal(copied.weight, adapted.weight)
        assert copied.weight.data_ptr() != adapted.weight.data_ptr()
        assert copied.weight.untyped_storage().nbytes() == N * K * 4
        copied.weight.data.zero_()
        assert adapted.weight.any()


def test_pickles_of_before_have_the_room() -> None:
    """Whose layers lack the attribute."""
    adapted = layer()
    del adapted.__dict__["stack_weight"]
    copied = pickle.loads(pickle.dumps(adapted)).to("cpu")
    assert stacked.find(copied.weight) is not None
    assert "stack_weight" not in repr(copied)
    model = wide_peft_model()
    lora_fast.accelerate(model)
    accelerated = next(module for module in model.modules() if hasattr(module, "_lora_fast"))
    del accelerated._lora_fast.__dict__["stack_weights"]
    assert stacked.find(base_weight(pickle.loads(pickle.dumps(model)).to("cpu"))) is not None


def test_load_state_dict_copies_into_it_or_takes_another_weights_place() -> None:
    adapted, other = layer(), layer(stack_weight=False)
    other.weight.data.mul_(2)
    address = adapted.weight.data_ptr()
    adapted.load_state_dict(other.state_dict())
    assert adapted.weight.data_ptr() == address
    assert torch.equal(buffer_of(adapted.weight)[:N], other.weight)
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    adapted.load_state_dict(state, assign=True)
    del state
    assert torch.equal(adapted.weight, other.weight)


def release(adapted: LinearWithDoRA, how: str) -> None:
    if how == "to":
        adapted.to(torch.bfloat16)
    elif how == "swap":
        adapted.weight.data = adapted.weight.data.clone()
    elif how == "parameter":
        adapted.linear.weight = nn.Parameter(adapted.weight.detach().clone(), requires_grad=False)
    else:
        stacked.unstack(adapted.weight)


@pytest.mark.parametrize("how", ["to", "swap", "parameter", "unstack"])
def test_another_storage_frees_the_buffer(how: str) -> None:
    adapted = layer()
    before = live_bytes()
    found = stacked.find(adapted.weight)
    assert found is not None
    release(adapted, how)
    assert found.buffer() is None
    if how == "to":  # into a buffer of half the size
        assert live_bytes() == before - (N + stacked.ROWS) * K * 2
        assert buffer_of(adapted.weight).dtype == torch.bfloat16
    else:
        assert live_bytes() == before - (N + stacked.ROWS) * K * 4
        assert stacked.find(adapted.weight) is None


def test_a_freed_buffer_leaves_no_entry_behind() -> None:
    for _ in range(5):
        layer()
        gc.collect()
    kept = layer()
    assert len([found for found in stacked._stacks.values() if found.buffer() is not None]) == 1
    assert len(stacked._stacks) <= 2
    del kept


def test_a_whole_model_grows_by_one_layer_at_a_time() -> None:
    size, layers = 512, 8
    made: list[nn.Module] = []

    def make(stack_weight: bool) -> None:
        made[:] = [nn.Sequential(*(nn.Linear(size, size) for _ in range(layers)))]
        lora_fast.apply(made[0], R, 0.5, stack_weight=stack_weight)

    without = peak_bytes(lambda: make(False))
    made.clear()
    grown = peak_bytes(lambda: make(True)) - without
    assert grown < 4 * (layers * stacked.ROWS * size + 1.3 * size * size)
    assert all(stacked.find(module.weight) is not None for module in made[0])


def test_tied_weights_share_one() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(N, K)
            self.head = nn.Linear(K, N, bias=False)
            self.head.weight = self.embedding.weight

    model = Model()
    lora_fast.apply(model, R, 0.5, targets=["head"])
    assert model.head.weight is model.embedding.weight
    assert buffer_of(model.embedding.weight).data_ptr() == model.head.weight.data_ptr()


def test_another_adapter_with_more_rows_gets_them() -> None:
    plain = linear().requires_grad_(False)
    for rank, rows in ((1, 64), (64, 64), (65, 128), (16, 128)):
        stacked.stack(plain.weight, rank)
        assert buffer_of(plain.weight).shape[0] == N + rows or rows > N // 8
    assert buffer_of(plain.weight).shape[0] == N + 64  # 128 would be a fifth of N


def test_merging_in_place_keeps_it() -> None:
    adapted = layer()
    nn.init.normal_(adapted.lora_B)
    adapted.eval()
    x = torch.randn(3, K)
    expected = adapted(x)
    adapted.merge_()
    torch.testing.assert_close(adapted(x), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(buffer_of(adapted.weight)[:N], adapted.weight)
    assert stacked.find(adapted.merged().weight) is None


def product_of(weight: Tensor, lora_A: Tensor, grad_v: Tensor, grad_h: Tensor) -> Tensor | None:
    found = stacked.find(weight)
    assert found is not None
    grad_vh = torch.zeros(grad_v.shape[0], found.shape[0], dtype=grad_v.dtype)
    grad_vh[:, :N], grad_vh[:, N : N + grad_h.shape[1]] = grad_v, grad_h
    with found.holding(lora_A) as rows:
        return None if rows is None else grad_vh @ rows


def test_every_product_is_of_its_own_lora_A() -> None:
    """Also of a smaller one after a larger one with an element that is not finite."""
    weight = layer().weight
    grad_v, factors = torch.randn(5, N), [torch.randn(16, K), torch.randn(7, K), torch.randn(64, K)]
    for index, lora_A in enumerate((*factors, factors[1])):
        grad_h = torch.randn(5, lora_A.shape[0])
        actual = product_of(weight, lora_A, grad_v, grad_h)
        torch.testing.assert_close(actual, grad_v @ weight + grad_h @ lora_A, rtol=1e-4, atol=1e-4)
        if index == 2:
            buffer_of(weight)[-1] = torch.nan


def test_threads_do_not_mix_their_adapters() -> None:
    weight = layer().weight
    factors = [torch.full((16, K), float(value)) for value in range(4)]
    grad_v, grad_h = torch.zeros(5, N), torch.ones(5, 16)
    wrong: list[Tensor] = []

    def run(lora_A: Tensor) -> None:
        for _ in range(200):
            actual = product_of(weight, lora_A, grad_v, grad_h)
            if actual is None or not torch.equal(actual, grad_h @ lora_A):
                wrong.append(lora_A)

    threads = [threading.Thread(target=run, args=(lora_A,)) for lora_A in factors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


class Streams:
    """Stands for the current stream: its number, and whether it is captured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = (1, False)
        monkeypatch.setattr(stacked, "_stream", lambda tensor: self.current)


def test_another_adapter_on_another_stream_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing orders its write after the product of the first; the first itself may change its stream."""
    streams, weight = Streams(monkeypatch), layer().weight
    first, second = torch.randn(16, K), torch.randn(16, K)
    operands = torch.randn(5, N), torch.randn(5, 16)
    for current, lora_A, is_taken in (
        ((1, False), first, True),
        ((1, False), second, True),
        ((2, False), first, False),
        ((2, False), second, True),
        ((2, False), first, True),
        ((3, True), first, True),  # captured: a replay may come at any time
        ((3, False), second, False),
        ((1, False), first, True),
    ):
        streams.current = current
        actual = product_of(weight, lora_A, *operands)
        assert (actual is not None) == is_taken
        if actual is not None:
            torch.testing.assert_close(actual, operands[0] @ weight + operands[1] @ lora_A, rtol=1e-4, atol=1e-4)


def test_a_part_of_an_adapter_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the same address: its rows are not those that the whole's product reads on another stream."""
    streams, weight, whole = Streams(monkeypatch), layer().weight, torch.randn(16, K)
    for stream, lora_A, is_taken in ((1, whole, True), (2, whole[:8], False), (1, whole[:8], True)):
        streams.current = (stream, False)
        actual = product_of(weight, lora_A, torch.randn(5, N), torch.randn(5, lora_A.shape[0]))
        assert (actual is not None) == is_taken


def test_nothing_is_moved_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = Streams(monkeypatch)
    streams.current = (1, True)
    assert stacked.find(layer().weight) is None


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Triton's plan takes the product from one token on; whether it was taken, call by call."""
    constants = pytest.importorskip("lora_fast.triton_kernels.constants")
    taken: list[bool] = []
    holding = stacked.Stack.holding

    @contextlib.contextmanager
    def recorded(self: stacked.Stack, lora_A: Tensor) -> Iterator[Tensor | None]:
        with holding(self, lora_A) as rows:
            taken.append(rows is not None)
            yield rows

    monkeypatch.setattr(stacked.Stack, "holding", recorded)
    with constants.instead(replace(constants.PREDICTED, stacked_tokens=1)):
        yield taken


def with_room(inputs: Inputs) -> Inputs:
    weight = nn.Parameter(inputs.weight.clone(), requires_grad=False)
    stacked.stack(weight, inputs.case.R)
    assert stacked.find(weight) is not None
    return replace(inputs, weight=weight)


@pytest.mark.interp
@pytest.mark.parametrize("form", ["gain", "output", "output-full"])
@pytest.mark.parametrize("rank", [1, 16, 20, 130])  # in whole tiles and not, by our kernel and by PyTorch's product
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dx_of_one_product(dtype: torch.dtype, rank: int, form: str, products: list[bool]) -> None:
    case = Case((3, 17), 1543 if rank > 64 else 520, 72, rank, dtype)
    check(
        lambda inputs: call(functional, with_room(inputs), form, backend="triton"),
        lambda inputs: call(reference, inputs, form),
        lambda inputs: tensors_of(inputs, form),
        case,
    )
    assert products
    assert all(products)


@pytest.mark.interp
def test_dx_with_wider_adapters(products: list[bool]) -> None:
    """PEFT's are float32; they are rounded as they are in the pass that the product saves."""
    check(
        lambda inputs: call(functional, with_room(inputs), "output", backend="triton"),
        lambda inputs: call(reference, inputs, "output"),
        lambda inputs: tensors_of(inputs, "output"),
        Case((3, 17), 528, 72, 16, torch.bfloat16, torch.float32),
    )
    assert all(products)


@pytest.mark.interp
def test_each_gradient_alone(products: list[bool]) -> None:
    inputs = with_room(make_inputs(Case((33,), 520, 72, 16)))
    check_each_alone(call(functional, inputs, "output", backend="triton"), tensors_of(inputs, "output"), inputs.grad_y)
    assert products


@pytest.mark.interp
@pytest.mark.parametrize("change", ["dropout", "lora", "input", "dtype", "no x"])
def test_where_the_product_is_not_taken(change: str, products: list[bool], device: torch.device) -> None:
    inputs = with_room(make_inputs(Case((33,), 520, 72, 16)))
    form = change if change in ("lora", "input") else "output"
    tensors = {name: tensor.requires_grad_() for name, tensor in tensors_of(inputs, form).items()}
    options = {"dropout_p": 0.5, "seed": functional.draw_seed(device)} if change == "dropout" else {}
    if change == "no x":
        tensors["x"].requires_grad_(False)
    with torch.autocast(device.type, torch.bfloat16, enabled=change == "dtype"):
        y = call(functional, inputs, form, backend="triton", **options)(**tensors)
        y.backward(inputs.grad_y.to(y.dtype))
    assert products == []


@pytest.mark.interp
def test_two_adapters_before_their_backwards(products: list[bool]) -> None:
    """Each backward multiplies with its own lora_A, whichever was written last."""
    inputs = with_room(make_inputs(Case((33,), 520, 72, 16)))
    results = []
    for other in (False, True):
        tensors = {name: tensor.clone().requires_grad_() for name, tensor in tensors_of(inputs, "output").items()}
        if other:
            tensors["lora_A"] = (tensors["lora_A"].detach() * -3).requires_grad_()
        results.append((tensors, call(functional, inputs, "output", backend="triton")(**tensors)))
    for tensors, y in results:
        y.backward(inputs.grad_y)
        expected = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
        call(reference, inputs, "output")(**expected).backward(inputs.grad_y)
        torch.testing.assert_close(tensors["x"].grad, expected["x"].grad.float(), rtol=1e-4, atol=1e-4)
    assert products == [True, True]


@pytest.mark.interp
def test_a_backward_whose_rows_another_has_is_right_too(products: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = with_room(make_inputs(Case((33,), 520, 72, 16)))
    monkeypatch.setattr(stacked.Stack, "_claim", lambda self, lora_A: False)
    tensors = {name: tensor.clone().requires_grad_() for name, tensor in tensors_of(inputs, "output").items()}
    call(functional, inputs, "output", backend="triton")(**tensors).backward(inputs.grad_y)
    expected = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    call(reference, inputs, "output")(**expected).backward(inputs.grad_y)
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor.grad, expected[name].grad.float(), rtol=1e-4, atol=1e-4)
    assert products == [False]


def wide_peft_model(use_dora: bool = True) -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(linear(), nn.Linear(N, K))
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    config = peft.LoraConfig(r=R, target_modules=["0"], use_dora=use_dora, init_lora_weights=False)
    return peft.get_peft_model(base, config)


def base_weight(model: nn.Module) -> nn.Parameter:
    return next(parameter for name, parameter in model.named_parameters() if name.endswith("0.base_layer.weight"))


def test_an_accelerated_dora_layer_has_the_room_until_it_is_restored() -> None:
    model, state = wide_peft_model(), wide_peft_model().state_dict()
    before = live_bytes()
    lora_fast.accelerate(model, stack_weights=False)
    assert stacked.find(base_weight(model)) is None
    lora_fast.accelerate(model)
    assert buffer_of(base_weight(model)).shape == (N + stacked.ROWS, K)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    lora_fast.restore(model)
    assert stacked.find(base_weight(model)) is None
    assert live_bytes() == before
    lora = wide_peft_model(use_dora=False)
    lora_fast.accelerate(lora)
    assert stacked.find(base_weight(lora)) is None


def test_merge_and_unload_frees_it() -> None:
    model, before = wide_peft_model(), live_bytes()
    lora_fast.accelerate(model)
    assert live_bytes() > before
    merged = model.merge_and_unload()
    assert stacked.find(merged[0].weight) is None
    assert live_bytes() == before


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is not there")
def test_fully_shard_frees_it() -> None:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    before = live_bytes()
    model = nn.Sequential(layer())
    assert live_bytes() > before
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        fsdp.fully_shard(model[0], mesh=mesh)
        fsdp.fully_shard(model, mesh=mesh)
        model(torch.randn(2, K)).sum().backward()
        assert live_bytes() == before
    finally:
        torch.distributed.destroy_process_group()
