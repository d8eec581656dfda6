"""grouped_lora_linear, grouped_lora_compose and grouped_weight_norm on every backend against the reference."""

from __future__ import annotations

import pytest
import torch
from grouped_cases import ADAPTERS, GROUPED_CASES, SCALINGS, Batch, fast, make_batch, specification, tensors_of
from support import check_each_alone, hold_to_budget, run, spread
from torch import Tensor

from lora_fast import functional, reference
from lora_fast.testing import Case, make_inputs, peak_bytes, poisoned_memory

CASE = Case((19,), 48, 64, 8)
FORMS = ("lora", "gain", "compose")
IDS = {
    "none": lambda rows: torch.full((rows,), -1),
    "one": lambda rows: torch.full((rows,), 1),
    "one or none": lambda rows: torch.where(torch.arange(rows) % 3 == 0, -1, 2),
    "sorted": lambda rows: torch.arange(rows) * ADAPTERS // rows,
    "interleaved": lambda rows: torch.arange(rows) % ADAPTERS,
}


def grad_of(batch: Batch) -> Tensor:
    return batch.inputs.grad_y.reshape(-1, batch.inputs.case.N)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", GROUPED_CASES, ids=str)
def test_matches_the_reference(case: Case, form: str, backend: str) -> None:
    def draw(seed: int):
        batch = make_batch(make_inputs(case, seed))
        tensors, grad_y, spec = tensors_of(batch, form), grad_of(batch), specification(batch)
        names = {name for name, tensor in tensors.items() if tensor is not None}
        wide = {name: None if tensor is None else tensor.double() for name, tensor in tensors.items()}
        truth = run(spec, wide, grad_y, names)
        eager = run(lambda **t: spec(**t, compute_dtype=case.dtype), tensors, grad_y, names)
        with poisoned_memory():
            return run(fast(batch, backend), tensors, grad_y, names), [eager], truth

    if case.dtype == torch.float64:
        actual, _, truth = draw(0)
        torch.testing.assert_close(actual, truth, rtol=1e-11, atol=1e-12)
    else:
        hold_to_budget(case.dtype, draw)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", [CASE, Case((70,), 64, 96, 16, torch.bfloat16)], ids=str)
def test_each_gradient_alone(case: Case, form: str, backend: str) -> None:
    batch = make_batch(make_inputs(case))
    check_each_alone(fast(batch, backend), tensors_of(batch, form), grad_of(batch))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("tokens", [19, 80])
def test_any_ids(ids: str, form: str, tokens: int, backend: str) -> None:
    """Empty groups, no adapter at all, one for all rows; whose gradients are zero that no row has.

    Sums of up to 80 products of order 1 in float32, in another order: how exact they are is tested above.
    """
    batch = make_batch(make_inputs(Case((tokens,), 64, 96, 8)), IDS[ids])
    tensors = tensors_of(batch, form)
    with poisoned_memory():
        actual = run(fast(batch, backend), tensors, grad_of(batch), set(tensors))
    expected = run(specification(batch), tensors, grad_of(batch), set(tensors))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    for a in set(range(ADAPTERS)) - set(batch.adapter.tolist()):
        assert not actual["lora_A"][a].any()
        assert not actual["lora_B"][a].any()


@pytest.mark.parametrize("form", FORMS)
def test_what_is_past_an_adapters_rank_is_not_read(form: str, backend: str) -> None:
    """NaN there changes nothing, and its gradients are zero, as they are where it is zero and no ranks are given."""
    batch = make_batch(make_inputs(CASE))
    tensors = tensors_of(batch, form)
    padded = run(fast(batch, backend), tensors, grad_of(batch), set(tensors))
    poisoned = {**tensors, "lora_A": tensors["lora_A"].clone(), "lora_B": tensors["lora_B"].clone()}
    for a, rank in enumerate(batch.ranks):
        poisoned["lora_A"][a, rank:], poisoned["lora_B"][a, :, rank:] = torch.nan, torch.nan
    with poisoned_memory():
        ranked = run(fast(batch, backend, with_ranks=True), poisoned, grad_of(batch), set(tensors))
    torch.testing.assert_close(ranked, padded)
    for results in (ranked, padded):
        for a, rank in enumerate(batch.ranks):
            assert not results["lora_A"][a, rank:].any()
            assert not results["lora_B"][a, :, rank:].any()


def test_an_adapter_of_rank_0_is_its_gain_alone(backend: str) -> None:
    batch = make_batch(make_inputs(CASE), IDS["one"])
    ranks, inputs = torch.tensor([8, 0, 1], device=batch.adapter.device), batch.inputs
    given = batch.lora_A, batch.lora_B, batch.scaling, batch.gain, batch.adapter, ranks
    y = functional.grouped_lora_linear(inputs.x, inputs.weight, inputs.bias, *given, backend=backend)
    torch.testing.assert_close(y, inputs.x @ inputs.weight.T * batch.gain[1] + inputs.bias)


@pytest.mark.parametrize("form", FORMS)
def test_matrices_apart_are_the_stack(form: str, backend: str) -> None:
    """Also where they lie transposed, or every other element; and each has a gradient of its own shape, if it wants."""
    batch = make_batch(make_inputs(CASE))
    tensors = tensors_of(batch, form)
    expected = run(fast(batch, backend), tensors, grad_of(batch), set(tensors))
    factors_A, factors_B = batch.matrices(batch.lora_A, batch.lora_B)
    factors_A = [A.T.contiguous().T.clone(memory_format=torch.preserve_format) for A in factors_A]
    factors_B = [torch.stack((B, B), dim=2)[:, :, 0] for B in factors_B]
    leaves = [factor.detach().requires_grad_(i != 1) for i, factor in enumerate((*factors_A, *factors_B))]
    apart = {"lora_A": leaves[:ADAPTERS], "lora_B": leaves[ADAPTERS:]}
    y = fast(batch, backend)(**{**tensors, **apart})
    torch.testing.assert_close(y.detach(), expected["y"])
    y.backward(grad_of(batch))
    assert leaves[1].grad is None
    whole_A, whole_B = batch.matrices(expected["lora_A"], expected["lora_B"])
    for i, (leaf, gradient) in enumerate(zip(leaves, (*whole_A, *whole_B), strict=True)):
        if i != 1:
            torch.testing.assert_close(leaf.grad, gradient)


@pytest.mark.parametrize("layout", ["transposed", "spread"])
def test_stacks_of_any_strides(layout: str, backend: str) -> None:
    batch = make_batch(make_inputs(CASE))
    tensors = tensors_of(batch, "gain")
    expected = run(fast(batch, backend), tensors, grad_of(batch), set(tensors))
    for name in ("lora_A", "lora_B", "gain"):
        tensor = tensors[name]
        if layout == "transposed":
            tensors[name] = tensor.transpose(0, -1).contiguous().transpose(0, -1)
        else:
            tensors[name] = torch.stack((tensor, tensor.new_full((), torch.nan).expand_as(tensor)), dim=-1)[..., 0]
    function = fast(batch, backend)
    batch.scaling = spread(batch.scaling)
    torch.testing.assert_close(run(function, tensors, grad_of(batch), set(tensors)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [7, 75])
def test_a_reshuffled_batch_gives_the_same_rows_to_the_bit(tokens: int, dtype: torch.dtype, isa: str) -> None:
    """In all that is ours: the base product is permuted with the rows. PyTorch's products promise no such thing."""
    batch = make_batch(make_inputs(Case((tokens,), 96, 160, 24, dtype)))
    tensors = tensors_of(batch, "compose")
    grad_y, order = grad_of(batch), torch.randperm(tokens, device=batch.adapter.device)
    results = run(fast(batch, "cpu"), tensors, grad_y, {"x", "base"})
    batch.adapter = batch.adapter[order]
    moved = {**tensors, "x": tensors["x"][order], "base": tensors["base"][order]}
    again = run(fast(batch, "cpu"), moved, grad_y[order], {"x", "base"})
    assert torch.equal(results["y"][order], again["y"])
    assert torch.equal(results["base"][order], again["base"])


def test_twice_the_same_to_the_bit(backend: str) -> None:
    batch = make_batch(make_inputs(Case((75,), 96, 160, 24, torch.float32)))
    tensors = tensors_of(batch, "gain")
    once, again = (run(fast(batch, backend), tensors, grad_of(batch), set(tensors)) for _ in range(2))
    for name, value in once.items():
        assert torch.equal(value, again[name]), name


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("tokens", [6, 90])
def test_one_adapters_nan_stays_in_its_rows(value: float, tokens: int, backend: str) -> None:
    batch = make_batch(make_inputs(Case((tokens,), 64, 96, 8)), IDS["interleaved"])
    batch.lora_A[1, 0, 3] = value
    batch.lora_B[1, 5] = value
    tensors = tensors_of(batch, "gain")
    results = run(fast(batch, backend), tensors, grad_of(batch), {"x"})
    touched = batch.adapter == 1
    assert torch.isfinite(results["y"][~touched]).all()
    assert torch.isfinite(results["x"][~touched]).all()
    assert not torch.isfinite(results["y"][touched][:, 5]).any()
    assert not torch.isfinite(results["x"][touched]).all()


def test_ids_of_samples_and_groups_made_before(backend: str) -> None:
    """An id for each of x's first sizes, or what group_rows made once for all layers."""
    inputs = make_inputs(Case((4, 5), 48, 64, 8))
    batch = make_batch(inputs, lambda rows: torch.tensor([2, -1, 0, 2]).repeat_interleave(5))
    given = batch.lora_A, batch.lora_B, batch.scaling, batch.gain

    def forward(adapter):
        return functional.grouped_lora_linear(inputs.x, inputs.weight, inputs.bias, *given, adapter, backend=backend)

    expected = forward(batch.adapter.view(4, 5))
    assert expected.shape == (4, 5, 48)
    samples = batch.adapter.view(4, 5)[:, 0]
    groups = functional.group_rows(batch.adapter, ADAPTERS, backend=backend)
    for adapter in (samples, samples.int(), samples.to(torch.int8), groups):
        assert torch.equal(forward(adapter), expected)


def test_a_base_given_is_left_alone(backend: str) -> None:
    batch = make_batch(make_inputs(CASE))
    tensors = tensors_of(batch, "compose")
    before = tensors["base"].clone()
    fast(batch, backend)(**tensors)
    assert torch.equal(tensors["base"], before)


def test_no_rows(backend: str) -> None:
    batch = make_batch(make_inputs(Case((0,), 48, 64, 8)))
    tensors = tensors_of(batch, "gain")
    results = run(fast(batch, backend), tensors, grad_of(batch), set(tensors))
    assert results["y"].shape == (0, 48)
    assert not any(results[name].any() for name in ("lora_A", "lora_B", "gain", "bias"))


def double_batch(form: str) -> tuple[Batch, dict[str, Tensor | None]]:
    batch = make_batch(make_inputs(Case((6,), 5, 4, 3, torch.float64)))
    return batch, {name: tensor.requires_grad_() for name, tensor in tensors_of(batch, form).items()}


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: str, backend64: str) -> None:
    batch, tensors = double_batch(form)
    names = list(tensors)
    function = fast(batch, backend64)
    assert torch.autograd.gradcheck(
        lambda *values: function(**dict(zip(names, values, strict=True))), tuple(tensors.values())
    )


def test_gradcheck_of_the_norms(backend64: str) -> None:
    batch, tensors = double_batch("lora")
    assert torch.autograd.gradcheck(
        lambda A, B: functional.grouped_weight_norm(batch.inputs.weight, A, B, batch.scaling, backend=backend64),
        (tensors["lora_A"], tensors["lora_B"]),
    )


@pytest.mark.parametrize("form", FORMS)
def test_compiles_without_a_break(form: str, backend: str) -> None:
    """One graph, which serves any ids."""
    batch = make_batch(make_inputs(Case((18,), 48, 64, 8)))
    tensors = tensors_of(batch, form)
    compiled = torch.compile(
        lambda adapter, **kw: _with_ids(batch, adapter, backend)(**kw) * 2,
        fullgraph=True,
        backend="aot_eager",
        dynamic=False,
    )
    for ids in ("interleaved", "none", "one"):
        adapter = IDS[ids](18).to(batch.adapter.device)
        results = []
        for function in (lambda adapter, **kw: _with_ids(batch, adapter, backend)(**kw) * 2, compiled):
            leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
            with (
                torch.compiler.set_stance("default"),
                torch._dynamo.config.patch(error_on_recompile=ids != "interleaved"),
            ):
                y = function(adapter, **leaves)
            y.backward(grad_of(batch))
            results.append([y, *(leaf.grad for leaf in leaves.values())])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs)


def _with_ids(batch: Batch, adapter: Tensor, backend: str):
    batch.adapter = adapter
    return fast(batch, backend)


def test_one_graph_for_any_number_of_rows(backend: str) -> None:
    """Compiled and exported; torch.export would say that a size became a constant."""
    batch = make_batch(make_inputs(Case((18,), 48, 64, 8)))
    inputs, given = batch.inputs, (batch.lora_A, batch.lora_B, batch.scaling, batch.gain)

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, adapter: Tensor) -> Tensor:
            return functional.grouped_lora_linear(x, inputs.weight, inputs.bias, *given, adapter, backend=backend)

    dynamic = {"x": {0: torch.export.Dim("T")}, "adapter": {0: torch.export.Dim("T")}}
    with torch.no_grad():
        exported = torch.export.export(Layer(), (inputs.x, batch.adapter), dynamic_shapes=dynamic).module()
        for rows in (18, 7):
            x, adapter = inputs.x[:rows], batch.adapter[:rows]
            torch.testing.assert_close(exported(x, adapter), Layer()(x, adapter))


def test_only_the_gradients_that_are_asked_for(backend: str) -> None:
    """Of many matrices one trains: its gradient is made, and no other's."""
    batch = make_batch(make_inputs(CASE))
    tensors = tensors_of(batch, "lora")
    order, starts = functional.group_rows(batch.adapter, ADAPTERS, backend=backend)
    A, B = batch.matrices(batch.lora_A, batch.lora_B)
    args = tensors["x"], None, A, B, batch.scaling, None, order, starts, None, None, None
    needs = False, False, [False, True, False], [False] * 3, False, False
    grad_A, grad_B = torch.ops.lora_fast.grouped_lora_bwd(grad_of(batch), *args, *needs, backend)[2:4]
    assert [gradient.numel() for gradient in grad_A] == [0, A[1].numel(), 0]
    assert not any(gradient.numel() for gradient in grad_B)


def test_opcheck(backend: str) -> None:
    ops = torch.ops.lora_fast
    batch = make_batch(make_inputs(Case((7,), 20, 30, 4)))
    inputs, T = batch.inputs, 7
    torch.library.opcheck(ops.group_rows.default, (batch.adapter, ADAPTERS, backend))
    order, starts = functional.group_rows(batch.adapter, ADAPTERS, backend=backend)
    ranks = torch.tensor(batch.ranks, device=order.device)
    grad_y, h = grad_of(batch), torch.randn(T, 4, device=order.device)
    apart = batch.matrices(batch.lora_A, batch.lora_B)
    for factors, own in (((batch.lora_A,), (batch.lora_B,)), ranks), (apart, None):
        for gain, product in ((None, None), (batch.gain, inputs.base)):
            keep = gain is not None
            given = *factors, batch.scaling, gain, order, starts, own
            forward = ops.grouped_lora_fwd.default
            for weight, base in ((inputs.weight, None), (None, inputs.base)):
                args = (inputs.x, weight, base, inputs.bias, *given, keep, backend)
                torch.library.opcheck(forward, args)
                each = [True] * len(factors[0])
                needs = True, weight is None, each, each, keep, True
                args = (grad_y, inputs.x, weight, *given, product, h, *needs, backend)
                torch.library.opcheck(ops.grouped_lora_bwd.default, args)
        norm_args = (inputs.weight, *factors, batch.scaling, own, backend)
        torch.library.opcheck(ops.grouped_weight_norm_fwd.default, norm_args)
        norm = ops.grouped_weight_norm_fwd(*norm_args)
        args = (torch.randn_like(norm), norm, inputs.weight, *factors, batch.scaling, own, each, each, backend)
        torch.library.opcheck(ops.grouped_weight_norm_bwd.default, args)


def test_autocast_is_that_of_the_linear(backend: str, device: torch.device) -> None:
    batch = make_batch(make_inputs(Case((30,), 64, 96, 8)))
    tensors = tensors_of(batch, "gain")
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    with torch.autocast(device.type, torch.bfloat16):
        y = fast(batch, backend)(**leaves)
        assert y.dtype == torch.bfloat16
        y.backward(grad_of(batch).bfloat16())
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    truth = run(specification(batch), wide, grad_of(batch).bfloat16(), set(tensors))
    assert (y - truth["y"]).norm() / truth["y"].norm() < 2 * torch.finfo(torch.bfloat16).eps
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == torch.float32
        assert (leaf.grad - truth[name]).norm() / truth[name].norm() < 4 * torch.finfo(torch.bfloat16).eps, name


def test_first_order_only(backend: str) -> None:
    batch = make_batch(make_inputs(Case((4,), 6, 5, 2)))
    tensors = tensors_of(batch, "gain")
    function = fast(batch, backend)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda x: function(**{**tensors, "x": x}), (tensors["x"],), (tensors["x"],))
    x = tensors["x"].requires_grad_()
    (grad,) = torch.autograd.grad(function(**tensors).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("case", [case for case in GROUPED_CASES if case.leading != (0,)], ids=str)
def test_the_norms(case: Case, backend: str) -> None:
    """Within a few roundings of float64's, as weight_norm's; of ranks, of matrices apart and under a gradient."""
    batch = make_batch(make_inputs(case))
    weight, factors = batch.inputs.weight, (batch.lora_A, batch.lora_B)
    apart = batch.matrices(*factors)
    wide = [[factor.double() for factor in side] for side in apart]
    truth = reference.grouped_weight_norm(weight.double(), *wide, SCALINGS)
    ranks = torch.tensor(batch.ranks, device=weight.device)
    tolerance = 1e-11 if case.dtype == torch.float64 else 2e-6
    for given in ((*factors, batch.scaling), (*factors, batch.scaling, ranks), (*apart, batch.scaling)):
        with poisoned_memory():
            norm = functional.grouped_weight_norm(weight, *given, backend=backend)
        assert norm.dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(norm.double(), truth, rtol=tolerance, atol=tolerance)
        for a, (A, B) in enumerate(zip(*apart, strict=True)):
            alone = functional.weight_norm(weight, A, B, SCALINGS[a], backend=backend)
            torch.testing.assert_close(norm[a], alone.to(norm.dtype), rtol=tolerance, atol=tolerance)


def test_the_norms_of_hard_rows(backend: str) -> None:
    """A zero row, rows whose squares overflow and underflow, NaN and Inf, and W that an adapter cancels."""
    torch.manual_seed(0)
    weight = torch.randn(8, 64)
    weight[0], weight[1], weight[2] = 0, 1e18 * weight[1], 1e-18 * weight[2]
    weight[3, 5], weight[4, 6] = torch.nan, torch.inf
    lora_A, lora_B = torch.randn(2, 4, 64) * 0.1, torch.zeros(2, 8, 4)
    lora_A[1, 0], lora_B[1, 5, 0] = weight[5], -1.0  # row 5 cancels but for a rounding
    lora_B[1, 6] = 0.3
    scaling = torch.tensor([1.0, 1.0])
    norm = functional.grouped_weight_norm(weight, lora_A, lora_B, scaling, backend=backend)
    for a in range(2):
        alone = functional.weight_norm(weight, lora_A[a], lora_B[a], 1.0, backend=backend)
        torch.testing.assert_close(norm[a], alone, equal_nan=True, rtol=1e-6, atol=1e-7)
    assert norm[0, 0] == 0
    assert norm[0, 3].isnan()
    assert norm[0, 4].isinf()
    assert norm[1, 5] < 1e-5


SIZE = Case((96,), 768, 1024, 8, torch.bfloat16)


def test_memory_is_that_of_one_adapters_linear(backend: str) -> None:
    """No copies of lora_A or lora_B for rows: such a step is shown to be caught."""
    batch = make_batch(make_inputs(SIZE), IDS["sorted"])
    inputs = batch.inputs
    tensors = {name: tensor.clone().requires_grad_() for name, tensor in tensors_of(batch, "gain").items()}
    single = {**tensors, "lora_A": inputs.lora_A.requires_grad_(), "lora_B": inputs.lora_B.requires_grad_()}
    single["gain"] = inputs.gain["output"].requires_grad_()

    def of_one():
        functional.lora_linear(
            single["x"], inputs.weight, single["bias"], single["lora_A"], single["lora_B"], 0.7, single["gain"],
            backend=backend,
        ).backward(inputs.grad_y)  # fmt: skip

    def step():
        fast(batch, backend)(**tensors).backward(grad_of(batch))

    def gathering():
        rows = tensors["lora_A"][batch.adapter], tensors["lora_B"][batch.adapter]
        h = torch.bmm(rows[0], tensors["x"][:, :, None])
        (tensors["x"] @ inputs.weight.T + torch.bmm(rows[1], h)[:, :, 0]).backward(grad_of(batch))

    for function in (of_one, step, gathering):
        function()  # gradients are allocated once
    one = peak_bytes(of_one)
    factors = batch.lora_A.nbytes + batch.lora_B.nbytes + 2 * batch.gain.nbytes  # whose gradients are made
    bound = one + factors + inputs.grad_y.nbytes // 4
    assert peak_bytes(step) <= bound
    assert peak_bytes(gathering) > bound
