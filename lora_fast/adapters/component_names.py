"""What the models of a pipeline are called in adapters' files, in diffusers' folders and in single-file checkpoints.

A key of a file is ``<component>.<name>`` or ``<component>_<name>``, in the second case with _ for each dot of the name
(flattened, as kohya's scripts and LyCORIS write it).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

# What kohya's scripts and LyCORIS call the models of diffusers; "" is a model that is none of them.
KOHYA_NAMES = {
    "": "lycoris",
    "unet": "lora_unet",
    "transformer": "lora_unet",
    "diffusion_model": "lora_unet",
    "prior": "lora_prior_unet",
    "text_encoder": "lora_te1",
    "text_encoder_2": "lora_te2",
    "text_encoder_3": "lora_te3",
    "text_encoder_4": "lora_te4",
}
# What diffusers calls the models of kohya's files, but for numbered text encoders: each tool counts in its own way.
DIFFUSERS_NAMES = {
    "lora_unet": "unet",
    "lora_transformer": "transformer",
    "lora_prior_unet": "prior",
    "lora_te": "text_encoder",
    "lycoris": "",
}

# The wrapper's name that PEFT puts before all.
WRAPPER = "base_model.model."
_FLATTENED = re.compile(
    r"(?P<component>lora_(?:prior_)?(?:unet|te\d?|transformer)|lycoris|"
    r"transformer(?=_(?:single_|joint_)?transformer_blocks_))"
    r"[_.](?P<name>.+)"
)
_DOTTED = re.compile(
    r"(?P<component>unet|transformer|prior|diffusion_model(?:\.transformer_[12])?|text_encoder(?:_[2-4])?|"
    r"text_encoders\.\w+\.transformer|clip_[lgh]|t5)\.(?P<name>.+)"
)
# Modules of diffusers' transformers: of any; of Qwen-Image alone, whose names are the original's; of those of which the
# original code has other names; of Wan and HunyuanDiT, for which kohya's files have the original's names only.
_IN_DIFFUSERS = re.compile(r"(single_|joint_)?transformer_blocks[._]\d+[._]")
_SAME_IN_DIFFUSERS = re.compile(r"transformer_blocks[._]\d+[._](img|txt)_(mod|mlp)[._]")
_ONLY_IN_DIFFUSERS = re.compile(
    r"(single_|joint_)transformer_blocks[._]|transformer_blocks[._]\d+[._](ff|ff_context|norm1|norm1_context)[._]"
)
_OTHER_IN_KOHYA = re.compile(r"blocks[._]\d+[._]attn[12][._]")
_TEXT_ENCODER = re.compile(r"(lora_(prior_)?te|text_encoder|clip|t5)")


class SingleFileModel(NamedTuple):
    """A model in a single-file checkpoint: its name in diffusers, and those that it can have in adapters' files."""

    diffusers_name: str
    names: frozenset[str]


_DENOISER = frozenset({"", "unet", "transformer", "lora_unet", "lora_transformer", "lycoris", "diffusion_model"})
_FIRST_TEXT = SingleFileModel(
    "text_encoder",
    frozenset({"", "text_encoder", "lora_te", "lora_te1", "clip_l", "text_encoders.clip_l.transformer"}),
)
_SECOND_TEXT = SingleFileModel(
    "text_encoder_2", frozenset({"", "text_encoder_2", "lora_te2", "clip_g", "text_encoders.clip_g.transformer"})
)
# How single-file checkpoints begin the names of each of their models.
SINGLE_FILE_MODELS = {
    "model.diffusion_model": SingleFileModel("unet", _DENOISER),
    "cond_stage_model.transformer": _FIRST_TEXT,
    "cond_stage_model.model": _FIRST_TEXT,
    "conditioner.embedders.0.transformer": _FIRST_TEXT,
    "conditioner.embedders.1.model": _SECOND_TEXT,
}


def split(module: str) -> tuple[str, str, bool | None]:
    """The component of a key's module, the module's name in it, and whether that is flattened.

    None: it has no dots, and no component that would say it.
    """
    module = module.removeprefix(WRAPPER)
    if found := _FLATTENED.fullmatch(module):
        return found["component"], found["name"].replace(".", "_"), True
    if found := _DOTTED.fullmatch(module):
        return found["component"], found["name"].removeprefix(WRAPPER), False
    return "", module, False if "." in module else None


def names_in_files(component: str) -> list[str]:
    """What a file can call the model that it, or diffusers, calls ``component``: the likeliest first."""
    others = [name for name, own in DIFFUSERS_NAMES.items() if own == component]
    return list(dict.fromkeys([component, KOHYA_NAMES.get(component, component), *others]))


def is_flattened_component(component: str) -> bool:
    """Whether names that begin so, with _ after it, are read back as that component's."""
    found = _FLATTENED.fullmatch(f"{component}_x")
    return found is not None and found["component"] == component


def kohya_name(component: str, modules: Collection[str], where: Path, *, is_whole: bool) -> str:
    """What kohya's files call the model with these ``modules`` that diffusers calls ``component``.

    The second text encoder is CLIP in some models, and in others T5, which is lora_te3 beside one CLIP too. A
    transformer is called as readers of such files find its modules: by diffusers' names of Flux, Stable Diffusion 3 and
    their like below lora_transformer; by the names of the original code base, which are Qwen-Image's in diffusers too,
    below lora_unet. ``is_whole``: they are all modules of the model. Raises ValueError, which begins with ``where``,
    for modules that kohya's files have under other names, or that leave it open.
    """
    if component == "text_encoder_2" and any(re.match(r"encoder[._]block[._]", module) for module in modules):
        return "lora_te3"
    if component == "transformer":
        return _kohya_transformer(modules, where, is_whole=is_whole)
    return KOHYA_NAMES.get(component, component)


def _kohya_transformer(modules: Collection[str], where: Path, *, is_whole: bool) -> str:
    way_out = "write it by the original's names (--base BASE, a checkpoint of them), or say --component"
    if name := next(filter(_OTHER_IN_KOHYA.match, modules), None):
        raise ValueError(
            f"{where}: {name} is diffusers' name of a module that kohya's files have another name for: {way_out}"
        )
    if any(map(_SAME_IN_DIFFUSERS.match, modules)):
        return "lora_unet"
    if is_whole or any(map(_ONLY_IN_DIFFUSERS.match, modules)):
        return "lora_transformer" if any(map(_IN_DIFFUSERS.match, modules)) else "lora_unet"
    if name := next(filter(_IN_DIFFUSERS.match, modules), None):
        raise ValueError(
            f"{where}: {name} is a module of lora_unet in kohya's files of Qwen-Image, of lora_transformer in those of "
            "other transformers: say which, --component, or give diffusers' folder of the model (--base BASE)"
        )
    return "lora_unet"


def is_text_encoder(component: str) -> bool:
    return _TEXT_ENCODER.match(component) is not None


def is_folder_of(component: str, folder: str) -> bool:
    """Whether a folder of diffusers with this name can hold the model that a file calls ``component``."""
    if not component:
        return True
    if is_text_encoder(component):
        return folder.startswith("text_encoder")
    return folder.startswith(("unet", "transformer", "prior", "decoder"))


def single_file_prefix(names: Iterable[str]) -> str:
    """What stands before all of these names of one model in a single-file checkpoint, with its dot; "" for others."""
    names = list(names)
    prefixes = [f"{prefix}." for prefix in SINGLE_FILE_MODELS]
    return next((prefix for prefix in prefixes if all(name.startswith(prefix) for name in names)), "")
