"""Random adapters as PEFT writes them for small models: merged, and loaded, they are PEFT's own function in float64."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("safetensors", reason="the adapters extra is not installed")
import peft
import transformers
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

import lora_fast
from lora_fast.merge_checkpoint import merge_checkpoint

WORDS, RESIZED = 11, 13
TOKENS = torch.arange(10).reshape(2, 5) % WORDS
SMALL = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
NEWEST = tuple(int(part) for part in peft.__version__.split(".")[:2]) >= (0, 21)
pytestmark = pytest.mark.filterwarnings("ignore")


@dataclasses.dataclass(frozen=True)
class Kind:
    """A model of transformers, what of it can be a target or be saved whole, and its output for TOKENS."""

    make: Callable[[bool], Any]  # tied or not
    targets: list[str]
    whole: list[str]
    run: Callable[[Any], Tensor] = lambda model: model(input_ids=TOKENS).logits
    can_resize: bool = True


def llama(tie: bool, kind: Any = transformers.LlamaForCausalLM) -> Any:
    return kind(
        transformers.LlamaConfig(
            **SMALL, vocab_size=WORDS, tie_word_embeddings=tie, attention_bias=True, pad_token_id=0
        )
    )


def gpt2(tie: bool) -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=8, n_layer=2, n_head=2, vocab_size=WORDS, n_positions=8, bos_token_id=0, eos_token_id=1,
            tie_word_embeddings=tie,
        )
    )  # fmt: skip


def bert(tie: bool) -> Any:
    config = transformers.BertConfig(**SMALL, vocab_size=WORDS, max_position_embeddings=8, tie_word_embeddings=tie)
    return transformers.BertForMaskedLM(config)


def bart(tie: bool) -> Any:
    config = transformers.BartConfig(
        d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=12, decoder_ffn_dim=12, vocab_size=WORDS, max_position_embeddings=8, tie_word_embeddings=tie,
        pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


def clip(tie: bool) -> Any:
    """Two towers with layers of the same names."""
    text = {**SMALL, "vocab_size": WORDS, "max_position_embeddings": 8, "eos_token_id": 1, "bos_token_id": 0}
    vision = {**SMALL, "image_size": 8, "patch_size": 4}
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config={**text, "pad_token_id": 1}, vision_config=vision, projection_dim=4)
    )


def run_clip(model: Any) -> Tensor:
    pixels = torch.linspace(-1, 1, 2 * 3 * 64, dtype=torch.float64).reshape(2, 3, 8, 8)
    tokens = torch.cat([TOKENS[:, :-1], torch.ones_like(TOKENS[:, :1])], 1)
    out = model(input_ids=tokens, pixel_values=pixels)
    return torch.cat([out.text_embeds, out.image_embeds])


KINDS = {
    "llama": Kind(
        llama,
        ["q_proj", "o_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"],
        ["embed_tokens", "lm_head", "norm"],
    ),
    "llama with a classifier": Kind(
        lambda tie: llama(tie, transformers.LlamaForSequenceClassification),
        ["q_proj", "up_proj", "embed_tokens", "score"],
        ["score", "norm", "embed_tokens"],
    ),
    "gpt2": Kind(gpt2, ["c_attn", "c_proj", "c_fc", "wte", "lm_head"], ["wte", "lm_head", "ln_f", "wpe"]),
    "bert": Kind(bert, ["query", "dense", "word_embeddings", "position_embeddings"], ["word_embeddings", "LayerNorm"]),
    "bart": Kind(
        bart,
        ["q_proj", "fc1", "lm_head", "shared"],
        ["lm_head", "layernorm_embedding"],
        lambda model: model(input_ids=TOKENS, decoder_input_ids=TOKENS).logits,
        can_resize=False,  # PEFT does not save its final_logits_bias
    ),
    "clip": Kind(
        clip,
        ["q_proj", "fc1", "token_embedding", "visual_projection", "patch_embedding"],
        ["text_projection", "post_layernorm"],
        run_clip,
        can_resize=False,
    ),
}


def random_config(draw: random.Random, targets: list[str], whole: list[str]) -> dict[str, Any]:
    chosen = draw.sample(targets, draw.randint(1, 3))
    saved = [name for name in draw.sample(whole, draw.randint(0, 2)) if name not in chosen]
    config: dict[str, Any] = {
        "r": draw.choice([1, 2, 4]),
        "lora_alpha": draw.choice([1, 3, 8]),
        "target_modules": chosen,
        "modules_to_save": saved or None,
        "use_dora": draw.random() < 0.4,
        "use_rslora": draw.random() < 0.3,
        "bias": draw.choice(["none", "none", "all", "lora_only"]),
        "init_lora_weights": False,
    }
    if draw.random() < 0.2:
        config["target_modules"] = f".*({'|'.join(chosen)})"
    if draw.random() < 0.3:
        config["rank_pattern"] = {chosen[0]: 3}
    if draw.random() < 0.3:
        config["alpha_pattern"] = {chosen[-1]: 5}
    return config


def attempt(function: Callable[[], Any]) -> tuple[Any, str]:
    """(result, ""), or (None, why it was refused)."""
    try:
        return function(), ""
    except ValueError as error:
        return None, str(error)


def train(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", KINDS)
def test_adapters_of_transformers_models(name: str, seed: int, tmp_path: Path) -> None:
    kind, draw = KINDS[name], random.Random(f"{name} {seed}")
    torch.manual_seed(seed)
    tie = draw.random() < 0.6
    config = random_config(draw, kind.targets, kind.whole)
    if tie and NEWEST and name == "llama" and not config.get("rank_pattern") and draw.random() < 0.5:
        config["ensure_weight_tying"] = True  # of others PEFT does not load the function that it saved
    resized = kind.can_resize and draw.random() < 0.25
    original = train(kind.make(tie).double())
    original.save_pretrained(tmp_path / "base", max_shard_size=draw.choice(["5KB", "5GB"]))

    def base() -> Any:
        torch.manual_seed(seed)  # of a resized vocabulary the new rows are random
        model = type(original).from_pretrained(tmp_path / "base", dtype=torch.float64)
        if resized:
            model.resize_token_embeddings(RESIZED)
        return model.eval()

    theirs = train(peft.get_peft_model(base(), peft.LoraConfig(**config)))
    theirs.save_pretrained(str(tmp_path / "adapter"))
    with torch.no_grad():
        # of what the file holds: PEFT's first releases did not save all biases
        wanted = kind.run(peft.PeftModel.from_pretrained(base(), tmp_path / "adapter").eval())
        folders = [tmp_path / name for name in ("base", "adapter", "out")]
        done, refusal = attempt(lambda: merge_checkpoint(*folders))
        if done is None:  # PEFT saves not always all that was resized
            assert resized, refusal
            assert "another vocabulary" in refusal
        else:
            merged, loading = type(original).from_pretrained(
                tmp_path / "out", dtype=torch.float64, output_loading_info=True
            )
            assert not any(loading.values()), config
            torch.testing.assert_close(kind.run(merged.eval()), wanted, rtol=1e-9, atol=1e-9)
            shards = (tmp_path / "out").glob("*.safetensors")
            assert done.merged + done.replaced + done.kept == sum(len(load_file(shard)) for shard in shards)
        model, refusal = attempt(lambda: lora_fast.load_adapter(base(), tmp_path / "adapter"))
        if model is None:
            assert "load_adapter takes torch.nn.Linear" in refusal
        else:
            torch.testing.assert_close(kind.run(model.eval()), wanted, rtol=1e-9, atol=1e-9)


class Tower(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.q, self.up, self.down = nn.Linear(8, 8, bias=bias), nn.Linear(8, 12), nn.Linear(12, 8, bias=bias)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(torch.tanh(self.up(self.q(x)))))


class Model(nn.Module):
    """Two towers, Conv1D beside Linear, square and not, convolutions, an embedding, buffers."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 8)
        self.text, self.vision = Tower(draw.random() < 0.5), Tower(draw.random() < 0.5)
        squares = [("c_square", Conv1D(8, 8)), ("linear_square", nn.Linear(8, 8))]
        for name, square in draw.sample(squares, 2):  # PEFT notes the last one's fan_in_fan_out
            setattr(self, name, square)
        self.widen = Conv1D(12, 8) if draw.random() < 0.5 else nn.Linear(8, 12)
        self.plane, self.line = nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.Conv1d(8, 8, 3, padding=1)
        self.tail = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8))

    def forward(self) -> Tensor:
        image = torch.linspace(-1, 1, 3 * 64, dtype=torch.float64).reshape(1, 3, 8, 8)
        v = self.vision(self.line(self.plane(image).flatten(2)).mean(-1))
        x = self.text(self.words(torch.arange(10) % WORDS)) + v
        return self.tail(self.widen(torch.tanh(self.c_square(self.linear_square(x)))))


LINEARS = ["q", "up", "down", "linear_square"]
OTHERS = ["words", "c_square", "widen", "plane", "line"]


@pytest.mark.parametrize("seed", range(40))
def test_adapters_of_another_model(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    base = Model(draw).double().eval()
    targets = LINEARS if seed % 2 else LINEARS + OTHERS  # all of which load, or some of which merge only
    config = random_config(draw, targets, ["tail", "norm", "words"])
    theirs = train(peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config)))
    theirs.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    prefix = draw.choice(["", "", "model."])
    folders = [tmp_path / name for name in ("base", "adapter", "out")]
    folders[0].mkdir()
    save_file({prefix + key: value for key, value in base.state_dict().items()}, folders[0] / "model.safetensors")
    (folders[0] / "config.json").write_text(json.dumps({"tie_word_embeddings": False}))
    done, refusal = attempt(lambda: merge_checkpoint(*folders))
    if done is None:
        assert "is square" in refusal
        conv1d = [name for name in ["c_square"] if name in theirs.peft_config["default"].target_modules]
        done = merge_checkpoint(*folders, fan_in_fan_out=conv1d)
    merged = load_file(folders[2] / "model.safetensors")
    assert done.merged + done.replaced + done.kept == len(merged)
    model = copy.deepcopy(base)
    model.load_state_dict({key.removeprefix(prefix): value for key, value in merged.items()})
    with torch.no_grad():
        wanted = peft.PeftModel.from_pretrained(copy.deepcopy(base), folders[1]).eval()()
        torch.testing.assert_close(model(), wanted, rtol=1e-9, atol=1e-9)
        loaded, refusal = attempt(lambda: lora_fast.load_adapter(copy.deepcopy(base), folders[1]))
        if loaded is None:
            assert "load_adapter takes torch.nn.Linear" in refusal
            assert targets is not LINEARS
        else:
            torch.testing.assert_close(loaded.eval()(), wanted, rtol=1e-9, atol=1e-9)
