"""diffusers' pipelines with accelerated adapters: what they draw after each of their own calls, and their files."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fast

pytestmark = pytest.mark.interop

KINDS = ("stable diffusion", "flux")
EXACT = {"rtol": 1e-10, "atol": 1e-10}
Call = Callable[[Any], Any]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Any:
    from pipeline_helpers import KINDS

    return KINDS[request.param]


@pytest.fixture
def files(kind: Any, tmp_path: Path) -> dict[str, Path]:
    from pipeline_helpers import write_adapter

    return {
        "lora": write_adapter(kind, tmp_path / "lora", seed=1),
        "dora": write_adapter(kind, tmp_path / "dora", seed=2, use_dora=True, r=3, lora_alpha=2.0),
        "other": write_adapter(kind, tmp_path / "other", seed=3, use_dora=True, targets=kind.targets[:4]),
    }


def part(kind: Any, pipe: Any) -> Any:
    return getattr(pipe, kind.part)


def pair(kind: Any, files: dict[str, Path]) -> tuple[Any, Any]:
    """The same pipeline twice, with the adapters; the first accelerated."""
    pipes = kind.make(), kind.make()
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
        for name, file in files.items():
            pipe.load_lora_weights(file, adapter_name=name)
    report = lora_fast.accelerate(pipes[0])
    assert report.layers
    assert report.left_alone == []
    assert report.mlps == ()  # attention, whose k and v are of another width than its q, is taken for none
    return pipes


def check(kind: Any, pipes: tuple[Any, Any], *calls: Call) -> list[Tensor]:
    """Both pipelines draw the same after each of the calls, and what the calls return is the same."""
    drawn = []
    for call in calls:
        returned = [call(pipe) for pipe in pipes]
        assert returned[0] == returned[1]
        found, wanted = (kind.run(pipe) for pipe in pipes)
        torch.testing.assert_close(found, wanted, **EXACT)
        drawn.append(wanted)
    return drawn


def differ(*drawn: Tensor) -> bool:
    return all(not torch.allclose(one, other, atol=1e-4) for one, other in itertools.pairwise(drawn))


def test_switched_weighted_and_turned_off(kind: Any, files: dict[str, Path]) -> None:
    pipes = pair(kind, files)
    by_block = {"set": kind.weights or 0.4}
    drawn = check(
        kind,
        pipes,
        lambda pipe: pipe.set_adapters("lora"),
        lambda pipe: pipe.set_adapters("dora"),
        lambda pipe: pipe.get_active_adapters(),
        lambda pipe: pipe.get_list_adapters(),
        lambda pipe: pipe.set_adapters(["lora", "dora", "other"], [0.5, 0.25, 1.5]),
        lambda pipe: pipe.set_adapters("dora", -0.5),
        lambda pipe: pipe.set_adapters("dora", 0.0),
        lambda pipe: pipe.set_adapters("dora", by_block["set"]),
        lambda pipe: pipe.disable_lora(),
        lambda pipe: pipe.enable_lora(),
        lambda pipe: pipe.set_adapters(["other"]),
    )
    lora, dora, _, _, several, negative, zero, blocks, disabled, enabled, other = drawn
    assert differ(lora, dora, several, negative, zero, blocks, disabled, enabled, other)


@pytest.mark.parametrize("number", ["float32", "float64"])
def test_weights_of_numpy(kind: Any, files: dict[str, Path], number: str) -> None:
    import numpy as np

    pipes = pair(kind, files)
    check(kind, pipes, lambda pipe: pipe.set_adapters("dora", getattr(np, number)(0.75)))
    assert lora_fast.accelerate(pipes[0]).left_alone == []


def test_the_scale_of_a_call(kind: Any, files: dict[str, Path]) -> None:
    pipes = pair(kind, files)
    for pipe in pipes:
        pipe.set_adapters(["lora", "dora"])
    for scale in (0.5, 0.0, -1.0, None):
        found, wanted = (kind.run(pipe, scale) for pipe in pipes)
        torch.testing.assert_close(found, wanted, **EXACT)


@pytest.mark.parametrize("names", [None, ["dora"], ["lora", "dora"]], ids=str)
def test_fused_and_unfused(kind: Any, files: dict[str, Path], names: list[str] | None) -> None:
    pipes = pair(kind, files)
    components = [kind.part]
    before, fused, after = check(
        kind,
        pipes,
        lambda pipe: pipe.set_adapters(["lora", "dora"]),
        lambda pipe: pipe.fuse_lora(components=components, adapter_names=names, safe_fusing=True),
        lambda pipe: pipe.unfuse_lora(components=components),
    )
    weights = [dict(part(kind, pipe).named_parameters()) for pipe in pipes]
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    torch.testing.assert_close(after, before, **EXACT)
    if names != ["dora"]:
        torch.testing.assert_close(fused, before, **EXACT)
    check(kind, pipes, lambda pipe: pipe.fuse_lora(components=components, lora_scale=0.3), lambda pipe: None)


def test_loaded_deleted_and_unloaded(kind: Any, files: dict[str, Path]) -> None:
    """An adapter that comes later runs in the layers that are taken; accelerate takes the others when called again."""
    few = {"other": files["other"]}
    pipes = pair(kind, few)
    drawn = check(
        kind,
        pipes,
        lambda pipe: pipe.load_lora_weights(files["dora"], adapter_name="dora"),
        lambda pipe: pipe.set_adapters(["other", "dora"]),
    )
    report = lora_fast.accelerate(pipes[0])
    assert report.left_alone == []
    drawn += check(
        kind,
        pipes,
        lambda pipe: None,
        lambda pipe: pipe.delete_adapters("other"),
        lambda pipe: pipe.unload_lora_weights(),
        lambda pipe: pipe.load_lora_weights(files["lora"], adapter_name="lora"),
    )
    assert differ(drawn[1], drawn[3], drawn[4], drawn[5])


def test_restored_in_every_state(kind: Any, files: dict[str, Path]) -> None:
    states: list[Call] = [
        lambda pipe: pipe.set_adapters(["lora", "dora"]),
        lambda pipe: pipe.disable_lora(),
        lambda pipe: (pipe.enable_lora(), pipe.fuse_lora(components=[kind.part]))[0],
    ]
    for state in states:
        pipes = pair(kind, files)
        check(kind, pipes, state)
        lora_fast.restore(pipes[0])
        classes = [[type(module) for module in part(kind, pipe).modules()] for pipe in pipes]
        assert classes[0] == classes[1]
        check(kind, pipes, lambda pipe: None)


def test_layerwise_casting_and_restore(kind: Any, files: dict[str, Path]) -> None:
    """diffusers keeps the bound forward of each layer, which outlives the class."""
    pipes = pair(kind, {"lora": files["lora"]})
    for pipe in pipes:
        part(kind, pipe).enable_layerwise_casting(torch.float32, torch.float64)
    check(kind, pipes, lambda pipe: None)
    lora_fast.restore(pipes[0])
    check(kind, pipes, lambda pipe: None)


def test_a_hotswap_is_seen(kind: Any, files: dict[str, Path], tmp_path: Path) -> None:
    from pipeline_helpers import write_adapter

    pipes = pair(kind, {"lora": files["lora"]})
    again = write_adapter(kind, tmp_path / "again", seed=7)
    before, after = check(
        kind,
        pipes,
        lambda pipe: None,
        lambda pipe: pipe.load_lora_weights(again, adapter_name="lora", hotswap=True),
    )
    assert differ(before, after)


def test_a_prepared_hotswap_runs_peft_s_forward(kind: Any, files: dict[str, Path]) -> None:
    pipes = kind.make(), kind.make()
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
        pipe.enable_lora_hotswap(target_rank=4)
        pipe.load_lora_weights(files["lora"], adapter_name="lora")
    report = lora_fast.accelerate(pipes[0])
    assert report.accelerated == []
    assert "its scaling is a tensor, as diffusers' enable_lora_hotswap makes it" in report.summary()
    check(kind, pipes, lambda pipe: None)
    if kind.part == "transformer":  # the other takes long to be compiled
        part(kind, pipes[0]).compile(backend="eager", fullgraph=True)
        check(kind, pipes, lambda pipe: None)


def test_trained(kind: Any, files: dict[str, Path]) -> None:
    pipes = pair(kind, {"dora": files["dora"]})
    models = [part(kind, pipe) for pipe in pipes]
    gradients = []
    for pipe, model in zip(pipes, models, strict=True):
        model.train()
        model.enable_gradient_checkpointing()
        for name, p in model.named_parameters():
            p.requires_grad_("lora_" in name)
        seen: list[Tensor] = []
        model.register_forward_hook(lambda module, args, y, seen=seen: seen.append(y[0]))
        with torch.enable_grad():
            type(pipe).__call__.__wrapped__(pipe, **inputs(kind, pipe))
        sum(y.square().mean() for y in seen).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0]
    torch.testing.assert_close(*gradients, **EXACT)


def inputs(kind: Any, pipe: Any) -> dict[str, Any]:
    """What kind.run gives the pipeline."""
    given: dict[str, Any] = {}

    class Recorder:
        text_encoder = pipe.text_encoder

        def __call__(self, **kwargs: Any) -> Any:
            given.update(kwargs)
            return pipe(**kwargs)

    kind.run(Recorder())
    return given


def test_files_are_those_of_diffusers(kind: Any, files: dict[str, Path], tmp_path: Path) -> None:
    from peft.utils import get_peft_model_state_dict

    written = []
    for index, pipe in enumerate(pair(kind, {"dora": files["dora"]})):
        part(kind, pipe).save_lora_adapter(tmp_path / str(index), adapter_name="dora")
        state = get_peft_model_state_dict(part(kind, pipe), adapter_name="dora")
        kind.pipeline.save_lora_weights(tmp_path / f"pipeline {index}", **{f"{kind.part}_lora_layers": state})
        folders = tmp_path / str(index), tmp_path / f"pipeline {index}"
        written.append([content(folder / "pytorch_lora_weights.safetensors") for folder in folders])
    for found, wanted in zip(*written, strict=True):
        torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=0)
        assert found[1] == wanted[1]


def content(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, and the adapter's configuration with the sets in it sorted."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        metadata = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors, {name: sorted(value) if isinstance(value, list) else value for name, value in metadata.items()}


def test_copies(kind: Any, files: dict[str, Path]) -> None:
    pipes = pair(kind, {"lora": files["lora"]})
    copied = copy.deepcopy(part(kind, pipes[0]))
    assert [type(module) for module in copied.modules()] == [type(module) for module in part(kind, pipes[0]).modules()]
    setattr(pipes[0], kind.part, copied)
    check(kind, pipes, lambda pipe: None)


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_compiled_whole(name: str, tmp_path: Path) -> None:
    """One kind: the other takes three times as long. PEFT's own DoRA cannot be compiled so."""
    from pipeline_helpers import KINDS, write_adapter

    kind = KINDS["flux"]
    pipes = pair(kind, {name: write_adapter(kind, tmp_path, seed=2, use_dora=name == "dora")})
    wanted = kind.run(pipes[1])
    part(kind, pipes[0]).compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(kind.run(pipes[0]), wanted, **EXACT)


def test_a_kohya_dora_through_conversion(tmp_path: Path) -> None:
    """diffusers drops the magnitudes of kohya's DoRA; a file that lora_fast converts for it has them."""
    from pipeline_helpers import KINDS
    from safetensors.torch import save_file

    kind = KINDS["stable diffusion"]
    model, generator = kind.model(), torch.Generator().manual_seed(0)
    model.save_pretrained(tmp_path / "unet")
    tensors, merged = {}, {}
    for name in ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.resnets.0.conv1"):
        module = model.get_submodule(name)
        N, K, *kernel = shape = module.weight.shape
        down = torch.randn(2, K, *kernel, generator=generator, dtype=torch.float64)
        up = torch.randn(N, 2, *(1 for _ in kernel), generator=generator, dtype=torch.float64)
        V = module.weight.detach() + 0.5 * (up.flatten(1) @ down.flatten(1)).view(shape)
        norm = V.flatten(1).norm(dim=1).view(N, *(1 for _ in shape[1:]))
        magnitude = norm * (1 + 0.3 * torch.rand(norm.shape, generator=generator, dtype=torch.float64))
        merged[name] = V * (magnitude / norm)
        key = "lora_unet_" + name.replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.dora_scale": magnitude}
        tensors[f"{key}.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "kohya.safetensors")
    lora_fast.convert_adapter(tmp_path / "kohya.safetensors", tmp_path / "made", "diffusers", base=tmp_path / "unet")

    truth, pipe = kind.make(), kind.make()
    for name, weight in merged.items():
        part(kind, truth).get_submodule(name).weight.data = weight
    pipe.load_lora_weights(next((tmp_path / "made").glob("*.safetensors")))
    report = lora_fast.accelerate(pipe)
    assert len(report.accelerated) == 2
    assert report.summary().count("DoRA") == 2
    torch.testing.assert_close(kind.run(pipe), kind.run(truth), **EXACT)


def test_a_pipeline_without_adapters_and_what_is_none(kind: Any) -> None:
    pipe = kind.make()
    with pytest.raises(ValueError, match="model: it has no PEFT layer"):
        lora_fast.accelerate(pipe)
    lora_fast.restore(pipe)
    with pytest.raises(TypeError, match="got str, expected a torch.nn.Module with PEFT layers, or a pipeline"):
        lora_fast.accelerate("pipe")
    with pytest.raises(TypeError, match="got int"):
        lora_fast.restore(3)
    assert isinstance(part(kind, pipe), nn.Module)
