"""MLX-LM itself loads the folders that convert writes, and its own folders are merged as it fuses them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("safetensors", reason="the adapters extra is not installed")
import torch
from file_helpers import Update, assert_close, kohya_file, make_update
from safetensors.torch import load_file, save_file
from torch import Tensor

import lora_fast
from lora_fast.merge_checkpoint import merge_checkpoint

pytestmark = pytest.mark.interop


def llama() -> Any:
    import mlx.core as mx
    from mlx_lm.models import llama

    mx.set_default_device(mx.cpu)
    mx.random.seed(0)
    arguments = llama.ModelArgs(
        model_type="llama", hidden_size=16, num_hidden_layers=2, intermediate_size=24, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5, vocab_size=20, tie_word_embeddings=False,
    )  # fmt: skip
    return llama.Model(arguments)


def tensors_of(model: Any) -> dict[str, Tensor]:
    import numpy as np
    from mlx.utils import tree_flatten

    return {key: torch.from_numpy(np.array(value)) for key, value in tree_flatten(model.parameters())}


def base_of(folder: Path, model: Any) -> Path:
    folder.mkdir()
    save_file(tensors_of(model), folder / "model.safetensors")
    (folder / "config.json").write_text('{"tie_word_embeddings": false}')
    return folder


def fused(folder: Path) -> dict[str, Tensor]:
    """What MLX-LM makes of the adapter in ``folder``: its own loader, its own fuse."""
    from mlx.utils import tree_unflatten
    from mlx_lm.tuner.utils import load_adapters

    model = load_adapters(llama(), str(folder))
    layers = [(name, module.fuse()) for name, module in model.named_modules() if hasattr(module, "fuse")]
    model.update_modules(tree_unflatten(layers))
    return tensors_of(model)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert_close(ours[key], tensor, 2e-6)  # it computes in float32


SHAPES = {
    "model.layers.0.self_attn.q_proj": (16, 16),
    "model.layers.1.self_attn.k_proj": (8, 16),
    "model.layers.1.mlp.down_proj": (16, 24),
    "lm_head": (20, 16),
}


@pytest.mark.parametrize("axis", ["output", None])
@pytest.mark.parametrize("mixed", [True, False])
def test_mlx_loads_what_convert_writes(mixed: bool, axis: str | None, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", llama())
    weights = load_file(base / "model.safetensors")
    updates: dict[str, Update] = {}
    for index, (name, shape) in enumerate(SHAPES.items()):
        rank = 2 + index % 2 if mixed else 2
        updates[name] = make_update(
            *shape, rank=rank, alpha=3.0 + mixed * index, axis=axis, dtype=torch.float32, seed=index
        )
        updates[name].weight = weights[f"{name}.weight"].double()
    source = kohya_file(tmp_path / "a.safetensors", updates)
    lora_fast.convert_adapter(source, tmp_path / "mlx", "mlx", base=base)
    theirs = fused(tmp_path / "mlx")
    for key, tensor in weights.items():
        update = updates.get(key.removesuffix(".weight"))
        assert_close(theirs[key], tensor if update is None else update.merged(), 2e-6)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_mlx_s_own_folder_is_merged_as_it_fuses_it(kind: str, tmp_path: Path) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import save_config

    model = llama()
    base = base_of(tmp_path / "base", model)
    parameters = {"rank": 3, "dropout": 0.0, "scale": 2.5}
    parameters["keys"] = ["self_attn.q_proj", "mlp.down_proj", "model.embed_tokens", "lm_head"]
    model.freeze()
    linear_to_lora_layers(model, 2, parameters, use_dora=kind == "dora")
    trained = {}
    for key, value in tree_flatten(model.trainable_parameters()):
        noise = mx.random.uniform(-0.4, 0.4, value.shape)
        trained[key] = value * (1 + noise) if key.endswith(".m") else noise
    model.update(tree_unflatten(list(trained.items())))
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_config(
        {"fine_tune_type": kind, "num_layers": 2, "lora_parameters": parameters}, folder / "adapter_config.json"
    )
    mx.save_safetensors(str(folder / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
    done = merge_checkpoint(base, folder, tmp_path / "out")
    assert done.merged == 6
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), fused(folder))
