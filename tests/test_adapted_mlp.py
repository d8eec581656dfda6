"""adapted_mlp on every backend against the reference, and against the composition of single linears."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from mlp_cases import ACTIVATIONS, FORMS, RECOMPUTE, Mlp, composed, fast, make_mlp, specification
from support import check_each_alone, hold_to_budget, run
from torch import Tensor

from lora_fast import functional
from lora_fast.backends import mlp as blocked
from lora_fast.functional import Projection, draw_seed
from lora_fast.testing import CASES, EAGER, Case, poisoned_memory

# one ragged, one of whole tiles
RAGGED, TILES = Case((13,), 31, 37, 5), Case((2, 19), 64, 96, 16, torch.bfloat16)
every_form = pytest.mark.parametrize("form", FORMS)
each_recompute = pytest.mark.parametrize("recompute", RECOMPUTE)


def check(case: Case, form: str, backend: str, activation: str, p: float = 0.0, **options: Any) -> None:
    """Hold y and all gradients to the error budget, float64 to the last digits; ``p`` is of a dropout between."""

    def draw(seed: int):
        mlp = make_mlp(case, form, seed)
        tensors = mlp.tensors()
        names = {name for name, tensor in tensors.items() if tensor is not None}
        between = {"mask": mlp.mask(p), "dropout_p": p} if p else {}
        spec = specification(mlp, activation, **between)
        wide = {name: None if tensor is None else tensor.double() for name, tensor in tensors.items()}
        truth = run(spec, wide, mlp.grad_y, names)
        eagers = [
            run(partial(spec, compute_dtype=case.dtype, **formula), tensors, mlp.grad_y, names) for formula in EAGER
        ]
        with poisoned_memory():
            return run(fast(mlp, backend, activation, **between, **options), tensors, mlp.grad_y, names), eagers, truth

    if case.dtype == torch.float64:
        actual, _, truth = draw(0)
        torch.testing.assert_close(actual, truth, rtol=1e-11, atol=1e-12)
    else:
        hold_to_budget(case.dtype, draw)


# all but those whose norm is over one element, whose error in the reference is no yardstick
SHARED = [
    pytest.param(case, form, ACTIVATIONS[i % 3], RECOMPUTE[i % 2], id=f"{case}-{form}")
    for i, case in enumerate(CASES)
    for form in ("lora", "dora-full", "joined")
    if case.K > 1 or form == "lora"
]


@pytest.mark.parametrize(("case", "form", "activation", "recompute"), SHARED)
def test_against_the_reference(case: Case, form: str, activation: str, recompute: str, backend: str) -> None:
    check(case, form, backend, activation, recompute=recompute)


@each_recompute
@pytest.mark.parametrize("activation", ACTIVATIONS)
@every_form
@pytest.mark.parametrize("case", [RAGGED, TILES], ids=str)
def test_every_form_against_the_reference(case: Case, form: str, activation: str, recompute: str, backend: str) -> None:
    check(case, form, backend, activation, recompute=recompute)


@each_recompute
@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize("form", ["dora", "joined-lora"])
@pytest.mark.parametrize("case", [RAGGED, TILES], ids=str)
def test_a_dropout_between_against_the_reference(case: Case, form: str, p: float, recompute: str, backend: str) -> None:
    check(case, form, backend, "silu", p, recompute=recompute)


@each_recompute
@every_form
@pytest.mark.parametrize("case", [RAGGED, TILES], ids=str)
def test_each_gradient_alone(case: Case, form: str, recompute: str, backend: str) -> None:
    mlp = make_mlp(case, form)
    check_each_alone(fast(mlp, backend, recompute=recompute), mlp.tensors(), mlp.grad_y)


def results(mlp: Mlp, function: Any) -> dict[str, Tensor]:
    """y and every gradient."""
    tensors = mlp.tensors()
    return run(function, tensors, mlp.grad_y, {name for name, tensor in tensors.items() if tensor is not None})


DOUBLE = Case((2, 5), 24, 17, 3, torch.float64)


@each_recompute
@pytest.mark.parametrize("activation", ACTIVATIONS)
@every_form
def test_is_the_composition_of_single_linears(form: str, activation: str, recompute: str, backend64: str) -> None:
    mlp = make_mlp(DOUBLE, form)
    ours = results(mlp, fast(mlp, backend64, activation, recompute=recompute))
    theirs = results(mlp, composed(mlp, backend64, activation))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("linears", [("gate",), ("down",), ("gate", "up", "down")], ids="+".join)
@pytest.mark.parametrize("form", ["dora", "dora-full", "lora", "joined", "joined-lora"])
def test_a_dropout_of_an_adapter_is_the_compositions(form: str, linears: tuple[str, ...], backend64: str) -> None:
    """In PEFT's form, of one seed each, with a dropout between besides."""
    mlp = make_mlp(DOUBLE, form)
    names = [name for name in linears if name in FORMS[form]]
    dropped = {name: (0.3, draw_seed(mlp.x.device)) for name in names}
    mask = mlp.mask(0.5)

    def ours(x: Tensor, **tensors: Tensor | None) -> Tensor:
        parts = {name: functional.Projection(**given) for name, given in mlp.parts(tensors).items()}
        parts |= {name: parts[name]._replace(dropout_p=p, seed=seed) for name, (p, seed) in dropped.items()}
        given = parts["gate"], parts.get("up"), parts["down"]
        return functional.adapted_mlp(x, *given, "gelu", mask=mask, dropout_p=0.5, backend=backend64)

    expected = results(mlp, composed(mlp, backend64, "gelu", mask, 0.5, **dropped))
    torch.testing.assert_close(results(mlp, ours), expected, rtol=1e-12, atol=1e-12)
    assert not torch.equal(expected["y"], results(mlp, composed(mlp, backend64, "gelu", mask, 0.5))["y"])


def test_a_norm_that_is_known_already(backend64: str) -> None:
    """It takes the place of the one that would be made, and its gradient is followed where it is not detached."""
    mlp = make_mlp(DOUBLE, "dora-full")
    tensors = mlp.tensors()
    names = {f"{name}.norm" for name in FORMS["dora-full"]}
    for name in ("gate", "up", "down"):
        tensors[f"{name}.norm"] = tensors[f"{name}.magnitude"] + 0.3
    wanted = {*tensors}
    ours = run(fast(mlp, backend64), tensors, mlp.grad_y, wanted)
    expected = run(specification(mlp), tensors, mlp.grad_y, wanted)
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)
    assert all(ours[name].any() for name in names)


@each_recompute
@every_form
def test_gradcheck(form: str, recompute: str, backend64: str) -> None:
    mlp = make_mlp(Case((3,), 4, 3, 2, torch.float64), form)
    tensors = {name: tensor.requires_grad_() for name, tensor in mlp.tensors().items() if tensor is not None}
    mlp.scalings = dict.fromkeys(mlp.scalings, 0.7)
    names = list(tensors)
    for kinds in FORMS[form].values():  # numerical differences see a norm that the gradient takes for a constant
        if kinds == "dora":
            for name in ("gate", "up", "down"):
                if FORMS[form].get(name) == "dora":
                    tensors[f"{name}.norm"] = tensors[f"{name}.magnitude"].detach() + 0.5
    function = fast(mlp, backend64, recompute=recompute)
    constants = {name: tensors[name] for name in tensors if name not in names}
    assert torch.autograd.gradcheck(
        lambda *values: function(**dict(zip(names, values, strict=True)), **constants),
        tuple(tensors[name] for name in names),
    )


@each_recompute
@pytest.mark.parametrize("form", ["dora", "mixed", "joined"])
@pytest.mark.parametrize("tokens", [257, 300, 1025])
def test_blocks_of_tokens_are_one_block(
    tokens: int, form: str, recompute: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the order of sums over tokens, which are of order √T."""
    mlp = make_mlp(Case((tokens,), 24, 20, 4), form)
    mask = mlp.mask(0.3)
    function = fast(mlp, backend, recompute=recompute, mask=mask, dropout_p=0.3)
    for least in ("BLOCK_ON_GPU", "BLOCK"):
        monkeypatch.setattr(blocked, least, blocked.SMALL_BLOCK)
    assert len(list(blocked.blocks(mlp.x, [], []))) > 1
    ours = results(mlp, function)
    monkeypatch.setattr(blocked, "BLOCKS", 1)
    assert len(list(blocked.blocks(mlp.x, [], []))) == 1
    for name, value in results(mlp, function).items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))


@pytest.mark.parametrize("tokens", [5, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_recompute
def test_twice_the_same_to_the_bit(recompute: str, dtype: torch.dtype, tokens: int, backend: str) -> None:
    mlp = make_mlp(Case((tokens,), 48, 40, 8, dtype), "dora-full")
    once, again = (results(mlp, fast(mlp, backend, recompute=recompute)) for _ in range(2))
    for name, value in once.items():
        assert torch.equal(value, again[name]), name


def leaves_of(mlp: Mlp) -> dict[str, Any]:
    return {name: t if t is None else t.detach().clone().requires_grad_() for name, t in mlp.tensors().items()}


@each_recompute
@pytest.mark.parametrize("form", ["dora-full", "lora", "joined", "down-frozen"])
def test_a_backward_leaves_all_as_it_was(form: str, recompute: str, backend: str) -> None:
    """The inputs, the weights and what is kept: so a second backward gives the same; and y may be written in place."""
    mlp = make_mlp(Case((300,), 24, 20, 4), form)
    leaves, kept = leaves_of(mlp), list[Tensor]()
    mask = mlp.mask(0.5)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        y = fast(mlp, backend, recompute=recompute, mask=mask, dropout_p=0.5)(**leaves)
    given = [*leaves.values(), *(inputs.weight for inputs in mlp.linears.values()), mask, mlp.grad_y, *kept]
    before = [tensor.detach().clone() for tensor in given]
    names, tensors = list(leaves), list(leaves.values())
    once = torch.autograd.grad(y, tensors, mlp.grad_y, retain_graph=True)
    with torch.no_grad():
        y.mul_(0)
    again = torch.autograd.grad(y, tensors, mlp.grad_y)
    for name, one, other in zip(names, once, again, strict=True):
        assert torch.equal(one, other), name
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(given, before, strict=True))


def test_in_place_write_on_the_output_keeps_gradients_right(backend: str) -> None:
    mlp = make_mlp(RAGGED, "dora-full")
    ours = results(mlp, lambda **tensors: fast(mlp, backend)(**tensors).relu_())
    theirs = results(mlp, lambda **tensors: fast(mlp, backend)(**tensors).relu())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@each_recompute
def test_nan_and_inf_come_out(value: float, recompute: str, backend: str) -> None:
    """Of a token in its row and every sum over tokens, of W and lora_A in every token."""
    mlp = make_mlp(Case((9,), 20, 30, 2), "dora")
    function = fast(mlp, backend, recompute=recompute)
    mlp.x[3, 5] = value
    found = results(mlp, function)
    assert not torch.isfinite(found["y"][3]).any()
    others = torch.arange(9) != 3
    assert torch.isfinite(found["y"][others]).all()
    assert torch.isfinite(found["x"][others]).all()
    for name in ("gate.lora_A", "up.lora_A", "down.lora_A", "gate.magnitude", "down.lora_B"):
        assert not torch.isfinite(found[name]).all(), name
    for linear, tensor in (("gate", "weight"), ("up", "lora_A"), ("down", "weight"), ("down", "lora_A")):
        mlp = make_mlp(Case((9,), 20, 30, 2), "dora")
        getattr(mlp.linears[linear], tensor)[1, 5] = value
        y = results(mlp, fast(mlp, backend, recompute=recompute))["y"]
        assert not torch.isfinite(y).all(dim=1).any(), (linear, tensor)


@each_recompute
@pytest.mark.parametrize("form", ["dora-full", "lora", "joined"])
def test_autocast_is_that_of_the_linear(form: str, recompute: str, backend: str, device: torch.device) -> None:
    """float32 parameters, bfloat16 products and output, float32 gradients; also when backward runs inside."""
    mlp = make_mlp(Case((6, 5), 40, 48, 8), form)
    leaves, grad_y = leaves_of(mlp), mlp.grad_y.bfloat16()
    with torch.autocast(device.type, torch.bfloat16):
        y = fast(mlp, backend, recompute=recompute)(**leaves)
        assert y.dtype == torch.bfloat16
        y.backward(grad_y)
    wide = {name: leaf.detach().double() for name, leaf in leaves.items()}
    truth = run(specification(mlp), wide, grad_y, set(leaves))
    # three products one after the other instead of one
    assert (y - truth["y"]).norm() / truth["y"].norm() < 3 * torch.finfo(torch.bfloat16).eps
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == torch.float32
        error = (leaf.grad - truth[name]).norm() / truth[name].norm()
        assert error < 6 * torch.finfo(torch.bfloat16).eps, name


@each_recompute
@every_form
def test_compiles_without_a_break(form: str, recompute: str, backend: str) -> None:
    mlp = make_mlp(Case((6, 5), 20, 24, 4), form)

    def function(**tensors: Tensor) -> Tensor:
        return fast(mlp, backend, recompute=recompute)(**tensors) * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(results(mlp, compiled), results(mlp, function))


def test_compiles_where_linears_share_tensors(backend: str) -> None:
    """Which torch.compile takes once among the inputs of a Function."""
    mlp = make_mlp(Case((6, 5), 20, 24, 4), "dora")
    gate, down = (Projection(**mlp.parts(mlp.tensors())[name]) for name in ("gate", "down"))
    x = mlp.x.clone().requires_grad_()

    def function() -> Tensor:
        return functional.adapted_mlp(x, gate, gate, down, backend=backend)

    y, compiled = function(), torch.compile(function, fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(compiled, y)
    grad_y = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(compiled, x, grad_y), torch.autograd.grad(y, x, grad_y))


@each_recompute
def test_one_compiled_graph_for_any_number_of_tokens(recompute: str, backend: str) -> None:
    """Forward and backward, with the tokens of one block and of several."""
    mlp = make_mlp(Case((300,), 20, 24, 4), "dora")
    tensors, function = leaves_of(mlp), fast(mlp, backend, recompute=recompute)

    def step(x: Tensor, **others: Tensor) -> Tensor:
        return function(x, **others)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for tokens in (300, 7, 40):
        x = mlp.x[:tokens].clone().requires_grad_()
        torch._dynamo.mark_dynamic(x, 0)
        others = {name: tensor for name, tensor in tensors.items() if name != "x"}
        wanted = [x, *others.values()]
        with torch._dynamo.config.patch(error_on_recompile=tokens != 300):
            y = compiled(x, **others)
        gradients = torch.autograd.grad(y, wanted, mlp.grad_y[:tokens])
        expected = function(x, **others)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(gradients, torch.autograd.grad(expected, wanted, mlp.grad_y[:tokens]))


def test_exports_for_any_number_of_tokens(backend: str) -> None:
    mlp = make_mlp(Case((18,), 20, 24, 4), "dora")
    tensors = {name: tensor for name, tensor in mlp.tensors().items() if name != "x"}

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return fast(mlp, backend)(x, **tensors)

    with torch.no_grad():
        exported = torch.export.export(Module(), (mlp.x,), dynamic_shapes={"x": {0: torch.export.Dim("T")}}).module()
        for tokens in (18, 7):
            torch.testing.assert_close(exported(mlp.x[:tokens]), Module()(mlp.x[:tokens]))


def test_first_order_only(backend: str) -> None:
    mlp = make_mlp(Case((4,), 6, 5, 2), "lora")
    tensors = mlp.tensors()
    function = partial(fast(mlp, backend), **{name: tensor for name, tensor in tensors.items() if name != "x"})
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(function, (mlp.x,), (mlp.x,))
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(function)(mlp.x)
    x = mlp.x.requires_grad_()
    (grad,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_form
def test_opcheck(form: str, dtype: torch.dtype, backend: str) -> None:
    """The two ops, all gradients and none, with what is kept and without."""
    mlp, ops = make_mlp(Case((2, 4), 12, 10, 2, dtype), form), torch.ops.lora_fast
    parts = list(mlp.parts(mlp.tensors()).values())
    columns = [[part.get(name) for part in parts] for name in ("weight", "bias", "lora_A", "lora_B", "scaling")]
    given = *columns, [part.get("magnitude") for part in parts], "gelu", mlp.mask(0.5).flatten(0, 1), 0.5
    for keep in (True, False):
        keep_product = keep and given[5][-1] is not None
        forward = mlp.x, *given, keep, keep_product, backend
        torch.library.opcheck(ops.adapted_mlp_fwd.default, forward)
        _, bases, product, h = ops.adapted_mlp_fwd(*forward)
        asked = [[keep and tensor is not None for tensor in given[i]] for i in (2, 3, 5, 1)]
        saved = bases, product if keep_product else None, h
        if not keep:
            asked[2] = [False] * len(parts)
        backward = mlp.grad_y, mlp.x, *given, *saved, True, *asked, backend
        torch.library.opcheck(ops.adapted_mlp_bwd.default, backward)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("joined", [True, False])
def test_opcheck_of_what_is_between(joined: bool, dtype: torch.dtype, backend: str) -> None:
    T, width, ops = 7, 12, torch.ops.lora_fast
    both, h = torch.randn(T, 2 * width).to(dtype), torch.randn(T, 5).to(dtype)
    bases = both.chunk(2, 1) if joined else torch.randn(2, T, width).to(dtype).unbind()
    factors = torch.randn(width, 2).to(dtype), torch.randn(width, 3).to(dtype)
    gains, bias = torch.rand(2, width).unbind(), torch.randn(width).to(dtype)
    full = *bases, h[:, :2], h[:, 2:], *factors, 0.5, 2.0, *gains, bias, bias, "gelu_tanh"
    bare = *bases, None, None, None, None, 1.0, 1.0, None, None, None, None, "silu"
    grad = torch.randn(T, width).to(dtype)
    for given, needs in ((full, [True] * 5), (bare, [False] * 5)):
        torch.library.opcheck(ops.lora_glu_fwd.default, (*given, backend))
        torch.library.opcheck(ops.lora_glu_bwd.default, (grad, *given, *needs, joined, backend))
