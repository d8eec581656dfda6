"""Files of sharded models: every process calls, one writes, whole; and what cannot be done with shards says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parallel_helpers import adapted, assert_equal, batch, layers_of, together
from test_parallel_fsdp1 import each_apart, per_block as per_block_fsdp1
from test_parallel_fsdp2 import checkpointed, hybrid, per_block, per_linear, root_only
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

import lora_fast
from lora_fast.parallel import fsdp2

pytest.importorskip("peft", reason="the peft extra is not installed")
pytest.importorskip("safetensors", reason="the adapters extra is not installed")

import peft
from safetensors.torch import load_file

FILE = "adapter_model.safetensors"
SHARDINGS = (per_linear, root_only, hybrid, checkpointed)
WAYS = ("apply LoRA", "apply DoRA", "PEFT LoRA", "PEFT DoRA")


def write(model: Any, folder: Path) -> None:
    if isinstance(model, peft.PeftModel):
        model.save_pretrained(str(folder))
    else:
        lora_fast.save_adapter(model, folder)


def evaluated(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(batch(0)[0])


def check_saved_whole(tmp: Path) -> None:
    """The bytes of the file that one process would write: before a forward, after one, and after a backward."""
    for way in WAYS:
        whole = adapted(way)
        if dist.get_rank() == 0:
            write(whole, tmp / way)
        dist.barrier()
        wanted = load_file(tmp / way / FILE)
        assert len(wanted) == 4 * (3 if way.endswith("DoRA") else 2)
        for shard in SHARDINGS:
            model = adapted(way)
            shard(model)
            for moment in ("at rest", "gathered", "after a backward"):
                if moment == "gathered":
                    evaluated(model)
                if moment == "after a backward":
                    model.train()(batch(1)[0]).sum().backward()
                folder = tmp / f"{way}, {shard.__name__}, {moment}"
                write(model, folder)
                dist.barrier()
                assert_equal(load_file(folder / FILE), wanted, rtol=0, atol=0)


def check_loaded(tmp: Path) -> None:
    for way in WAYS[:2]:
        wanted = evaluated(adapted(way))
        for shard in SHARDINGS:
            model = adapted(way, fresh=True)
            shard(model)
            evaluated(model)  # after which the root is gathered still
            lora_fast.load_adapter(model, tmp / way)
            torch.testing.assert_close(evaluated(model), wanted)
            model.train()(batch(1)[0]).sum().backward()
            torch.testing.assert_close(evaluated(model), wanted)
    for way in WAYS[2:]:
        model = adapted(way, fresh=True)
        per_linear(model)
        peft.set_peft_model_state_dict(model, peft.utils.load_peft_weights(str(tmp / way)))
        torch.testing.assert_close(evaluated(model), evaluated(adapted(way)))


def check_given_states_are_saved_as_they_are(tmp: Path) -> None:
    """As Trainers do it: the state dict is gathered by others, and rank 0 alone saves."""
    model = adapted("PEFT DoRA")
    checkpointed(model)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        model.save_pretrained(str(tmp / "given"), state_dict=state)
    dist.barrier()
    assert_equal(load_file(tmp / "given" / FILE), load_file(tmp / "PEFT DoRA" / FILE), rtol=0, atol=0)
    model.save_pretrained(str(tmp / "nobody"), is_main_process=False)
    assert not (tmp / "nobody" / FILE).exists()
    lora_fast.restore(model)
    assert "save_pretrained" not in vars(model)


def refusals(model: Any, layer: Any) -> dict[str, Callable[[], object]]:
    model.eval()
    return {
        "merge_": layer.merge_,
        "merged": layer.merged,
        "reset_parameters": layer.reset_parameters,
        "freeze_norms": lambda: lora_fast.freeze_norms(model),
    }


def check_refused_while_sharded() -> None:
    for shard in (per_block, per_linear, root_only, per_block_fsdp1, each_apart):
        model = adapted("apply DoRA")
        layers = layers_of(model)
        sharded = shard(model) or model
        wanted = evaluated(sharded)
        for gathered in (False, True):
            if not gathered:
                fsdp2.reshard(model)
            for action, call in refusals(sharded, layers[0]).items():
                if gathered and shard is root_only and action in ("merged", "freeze_norms"):  # which write nothing
                    continue
                with pytest.raises(RuntimeError, match=f"{action}.*: \\w+ is sharded over processes by F"):
                    call()
            torch.testing.assert_close(evaluated(sharded), wanted, rtol=0, atol=0)
        assert not layers[0].is_merged
    for shard in (per_block, root_only):
        model = adapted("PEFT DoRA")
        shard(model)
        wanted = evaluated(model)
        for call in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(RuntimeError, match="merge: weight is sharded over processes by FSDP2"):
                call()
        torch.testing.assert_close(evaluated(model), wanted, rtol=0, atol=0)


def adapters_of(model: nn.Module) -> dict[str, Any]:
    return get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))


def save_checkpoint(tmp: str) -> None:
    for way in ("apply DoRA", "PEFT DoRA"):
        for shard in (per_block, per_linear):
            model = adapted(way)
            shard(model)
            checkpoint.save(adapters_of(model), checkpoint_id=f"{tmp}/{way} {shard.__name__}")


def load_checkpoint(tmp: str) -> None:
    for way in ("apply DoRA", "PEFT DoRA"):
        wanted = evaluated(adapted(way))
        for shard in (per_block, per_linear):
            model = adapted(way, fresh=True)
            shard(model)
            state = adapters_of(model)
            assert len(state) == 12
            checkpoint.load(state, checkpoint_id=f"{tmp}/{way} {shard.__name__}")
            set_model_state_dict(model, state, options=StateDictOptions(strict=False))
            torch.testing.assert_close(evaluated(model), wanted)


def check(tmp: Path) -> None:
    check_saved_whole(tmp)
    check_loaded(tmp)
    check_given_states_are_saved_as_they_are(tmp)
    check_refused_while_sharded()


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    together(2, tmp_path, check, tmp_path)


@pytest.mark.slow
def test_a_distributed_checkpoint_of_four_processes_is_loaded_by_two(tmp_path: Path) -> None:
    together(4, tmp_path, save_checkpoint, str(tmp_path / "adapters"))
    together(2, tmp_path, load_checkpoint, str(tmp_path / "adapters"))
