"""How the modules of one model are called in two code bases, and which of them are one weight in the other.

A pair is a name in the original code base, and the names of the same weight in diffusers or transformers: one, or those
whose rows the original holds one below another. ``{}`` is a number. Every part has as many rows as the weight has
columns, but the last, which has the rest; where sizes are others, the file says them (``AdapterLayer.row_parts``).

Sources: the modules of Stability's generative-models (``sgm``), OpenCLIP, Black Forest Labs' flux, torchtune and
litgpt, beside those of diffusers and transformers. tests/test_interop_diffusers.py compares the first three with
diffusers' own conversion of single-file checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

T = TypeVar("T")
Pair = tuple[str, tuple[str, ...]]


@dataclass(frozen=True)
class BlockMap:
    """``formats`` are those of the files whose names it translates. ``rotary`` names the parts, of the one with heads,
    whose rows the original has in another order: pairs of a rotation side by side, not half a head apart.
    """

    name: str
    formats: Collection[str]
    pairs: tuple[Pair, ...]
    rotary: Collection[str] = ()

    @cached_property
    def _originals(self) -> dict[str, list[tuple[re.Pattern[str], tuple[str, ...]]]]:
        return _by_first_word((original, parts) for original, parts in self.pairs)

    @cached_property
    def _parts(self) -> dict[str, list[tuple[re.Pattern[str], tuple[str, int, int]]]]:
        return _by_first_word(
            (part, (original, index, len(parts))) for original, parts in self.pairs for index, part in enumerate(parts)
        )

    def parts_of(self, original: str) -> Iterator[tuple[str, list[str]]]:
        """What stands before the part of the name that is in the map, and the names of the weight's parts."""
        for before, found, parts in _matches(original, self._originals):
            yield before, [_filled(part, found) for part in parts]

    def originals_of(self, part: str) -> Iterator[tuple[str, str, int, int]]:
        """What stands before the part of the name that is in the map; the original's name; which of how many parts."""
        for before, found, (original, index, count) in _matches(part, self._parts):
            yield before, _filled(original, found), index, count


def _by_first_word(templates: Iterable[tuple[str, T]]) -> dict[str, list[tuple[re.Pattern[str], T]]]:
    """Each template as a regular expression with what belongs to it, by its first word, which most names lack."""
    found: dict[str, list[tuple[re.Pattern[str], T]]] = {}
    for template, value in templates:
        pattern = re.compile(re.escape(template).replace(r"\{\}", r"(\d+)"))
        found.setdefault(template.partition(".")[0], []).append((pattern, value))
    return found


def _matches(
    name: str, templates: Mapping[str, list[tuple[re.Pattern[str], T]]]
) -> Iterator[tuple[str, re.Match[str], T]]:
    """Where ``name`` ends with a template: what stands before it, the numbers in it, and what belongs to it."""
    words = name.split(".")
    for start, word in enumerate(words):
        for pattern, value in templates.get(word, ()):
            if found := pattern.fullmatch(".".join(words[start:])):
                yield ".".join(words[:start]), found, value


def _filled(template: str, found: re.Match[str]) -> str:
    return template.format(*found.groups())


def _same(*pairs: tuple[str, str]) -> tuple[Pair, ...]:
    return tuple((original, (part,)) for original, part in pairs)


def _residual(original: str, part: str) -> Iterator[tuple[str, str]]:
    inside = {
        "in_layers.0": "norm1",
        "in_layers.2": "conv1",
        "emb_layers.1": "time_emb_proj",
        "out_layers.0": "norm2",
        "out_layers.3": "conv2",
        "skip_connection": "conv_shortcut",
    }
    yield from ((f"{original}.{a}", f"{part}.{b}") for a, b in inside.items())


# What a transformer of the UNet has, by the same names in both.
_TRANSFORMER = (
    "norm",
    "proj_in",
    "proj_out",
    *(f"transformer_blocks.{{}}.attn1.{each}" for each in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"transformer_blocks.{{}}.attn2.{each}" for each in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"transformer_blocks.{{}}.{each}" for each in ("ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3")),
)  # fmt: skip


def _transformer(original: str, part: str) -> Iterator[tuple[str, str]]:
    yield from ((f"{original}.{each}", f"{part}.{each}") for each in _TRANSFORMER)


def _unet() -> Iterator[tuple[str, str]]:
    yield from {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1",
        "label_emb.0.2": "add_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }.items()
    for block in range(4):  # two residual blocks down and three up in each
        for layer in range(2):
            original, part = f"input_blocks.{3 * block + layer + 1}", f"down_blocks.{block}"
            yield from _residual(f"{original}.0", f"{part}.resnets.{layer}")
            yield from _transformer(f"{original}.1", f"{part}.attentions.{layer}")
        yield f"input_blocks.{3 * block + 3}.0.op", f"down_blocks.{block}.downsamplers.0.conv"
        for layer in range(3):
            original, part = f"output_blocks.{3 * block + layer}", f"up_blocks.{block}"
            yield from _residual(f"{original}.0", f"{part}.resnets.{layer}")
            yield from _transformer(f"{original}.1", f"{part}.attentions.{layer}")
        for index in (1, 2):  # after the transformer, where the block has one
            yield f"output_blocks.{3 * block + 2}.{index}.conv", f"up_blocks.{block}.upsamplers.0.conv"
    yield from _residual("middle_block.0", "mid_block.resnets.0")
    yield from _transformer("middle_block.1", "mid_block.attentions.0")
    yield from _residual("middle_block.2", "mid_block.resnets.1")


IMAGE_FORMATS = ("kohya", "diffusers")
UNET = BlockMap("Stable Diffusion's UNet", IMAGE_FORMATS, _same(*_unet()))


def _open_clip(layer: str) -> tuple[Pair, ...]:
    block, heads = "transformer.resblocks.{}", ("q_proj", "k_proj", "v_proj")
    return (
        (f"{block}.attn.in_proj", tuple(f"{layer}.self_attn.{each}" for each in heads)),
        *_same(
            (f"{block}.attn.out_proj", f"{layer}.self_attn.out_proj"),
            (f"{block}.mlp.c_fc", f"{layer}.mlp.fc1"),
            (f"{block}.mlp.c_proj", f"{layer}.mlp.fc2"),
        ),
    )


OPEN_CLIP = BlockMap("OpenCLIP's text encoder", IMAGE_FORMATS, _open_clip("text_model.encoder.layers.{}"))
# transformers 5 leaves one level of the names out
OPEN_CLIP_5 = BlockMap("OpenCLIP's text encoder, shortened", IMAGE_FORMATS, _open_clip("encoder.layers.{}"))

_DOUBLE, _SINGLE = "transformer_blocks.{}", "single_transformer_blocks.{}"
# final_layer.adaLN_modulation, whose two halves diffusers has the other way round, is left out.
FLUX = BlockMap(
    "Flux",
    IMAGE_FORMATS,
    (
        ("double_blocks.{}.img_attn.qkv", tuple(f"{_DOUBLE}.attn.{each}" for each in ("to_q", "to_k", "to_v"))),
        (
            "double_blocks.{}.txt_attn.qkv",
            tuple(f"{_DOUBLE}.attn.{each}" for each in ("add_q_proj", "add_k_proj", "add_v_proj")),
        ),
        (
            "single_blocks.{}.linear1",
            tuple(f"{_SINGLE}.{each}" for each in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
        ),
        *_same(
            ("double_blocks.{}.img_attn.proj", f"{_DOUBLE}.attn.to_out.0"),
            ("double_blocks.{}.txt_attn.proj", f"{_DOUBLE}.attn.to_add_out"),
            ("double_blocks.{}.img_mlp.0", f"{_DOUBLE}.ff.net.0.proj"),
            ("double_blocks.{}.img_mlp.2", f"{_DOUBLE}.ff.net.2"),
            ("double_blocks.{}.txt_mlp.0", f"{_DOUBLE}.ff_context.net.0.proj"),
            ("double_blocks.{}.txt_mlp.2", f"{_DOUBLE}.ff_context.net.2"),
            ("double_blocks.{}.img_mod.lin", f"{_DOUBLE}.norm1.linear"),
            ("double_blocks.{}.txt_mod.lin", f"{_DOUBLE}.norm1_context.linear"),
            ("single_blocks.{}.linear2", f"{_SINGLE}.proj_out"),
            ("single_blocks.{}.modulation.lin", f"{_SINGLE}.norm.linear"),
            ("img_in", "x_embedder"),
            ("txt_in", "context_embedder"),
            ("time_in.in_layer", "time_text_embed.timestep_embedder.linear_1"),
            ("time_in.out_layer", "time_text_embed.timestep_embedder.linear_2"),
            ("guidance_in.in_layer", "time_text_embed.guidance_embedder.linear_1"),
            ("guidance_in.out_layer", "time_text_embed.guidance_embedder.linear_2"),
            ("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
            ("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
            ("final_layer.linear", "proj_out"),
        ),
    ),
)

_LAYER = "model.layers.{}"
TORCHTUNE = BlockMap(
    "torchtune's decoders",
    ("torchtune",),
    _same(
        ("layers.{}.attn.q_proj", f"{_LAYER}.self_attn.q_proj"),
        ("layers.{}.attn.k_proj", f"{_LAYER}.self_attn.k_proj"),
        ("layers.{}.attn.v_proj", f"{_LAYER}.self_attn.v_proj"),
        ("layers.{}.attn.output_proj", f"{_LAYER}.self_attn.o_proj"),
        ("layers.{}.mlp.w1", f"{_LAYER}.mlp.gate_proj"),
        ("layers.{}.mlp.w2", f"{_LAYER}.mlp.down_proj"),
        ("layers.{}.mlp.w3", f"{_LAYER}.mlp.up_proj"),
        ("output", "lm_head"),
    ),
    rotary=("q_proj", "k_proj"),
)
LITGPT = BlockMap(
    "litgpt's Llama-like models",
    ("litgpt",),
    (
        ("transformer.h.{}.attn.qkv", tuple(f"{_LAYER}.self_attn.{each}" for each in ("q_proj", "k_proj", "v_proj"))),
        *_same(
            ("transformer.h.{}.attn.proj", f"{_LAYER}.self_attn.o_proj"),
            ("transformer.h.{}.mlp.fc_1", f"{_LAYER}.mlp.gate_proj"),
            ("transformer.h.{}.mlp.fc_2", f"{_LAYER}.mlp.up_proj"),
            ("transformer.h.{}.mlp.proj", f"{_LAYER}.mlp.down_proj"),
            ("lm_head", "lm_head"),
        ),
    ),
)

MAPS = (UNET, OPEN_CLIP, OPEN_CLIP_5, FLUX, TORCHTUNE, LITGPT)
