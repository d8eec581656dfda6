"""One safetensors file with all there is: of kohya's scripts, LyCORIS, OneTrainer, ComfyUI, ai-toolkit and diffusers.

    <module>.lora_down.weight [R, K, *kernel], .lora_up.weight [N, R, 1, …], .lora_mid.weight [R, R, *kernel]
    <module>.lora_A.weight, .lora_B.weight                                   the same, in PEFT's words
    <module>.alpha                    s = alpha / R; a file without any has s = 1
    <module>.dora_scale               [N, 1, …] or [1, K, 1, …]: see axis.py
    <module>.magnitude, .lora_magnitude_vector, .lora_magnitude_vector.weight      [N], of a convolution [1, N, 1, …]
    <module>.diff, .diff_b, .w_norm, .b_norm                                 added to the weight, and to the bias

A module is called ``<component>.<name>`` or ``<component>_<name>``, in the second case with _ for each dot of the name.
Which key belongs to what is decided by its end alone; a key with another end is unknown, and the file refused.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_fast.adapters import component_names, reading
from lora_fast.adapters.adapter import (
    CONVERTED,
    Adapter,
    AdapterFile,
    AdapterLayer,
    Faults,
    Format,
    check_layer,
    check_made,
    shortened,
)
from lora_fast.adapters.formats import axis, peft, peft_targets
from lora_fast.calls import Axis
from lora_fast.dtypes import FLOATS, FLOATS_SAID, name_of

PARTS = {
    "lora_down.weight": "lora_A",
    "lora_up.weight": "lora_B",
    "lora_mid.weight": "lora_mid",
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora.down.weight": "lora_A",  # diffusers before 0.22
    "lora.up.weight": "lora_B",
    "lora_linear_layer.down.weight": "lora_A",
    "lora_linear_layer.up.weight": "lora_B",
    "lora_embedding_A": "lora_A",
    "lora_embedding_B": "lora_B",
    "alpha": "alpha",
    "dora_scale": "dora_scale",
    "magnitude": "magnitude",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "diff": "weight",
    "w_norm": "weight",
    "diff_b": "bias",
    "b_norm": "bias",
}
NUMBERS = (*FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
FACTORS = ("lora_A", "lora_B", "lora_mid", "alpha", "dora_scale", "magnitude")
_KEY = re.compile(rf"(?P<module>.+?)\.(?P<part>{'|'.join(map(re.escape, PARTS))})")

# Other methods, by the ends of their keys.
OTHER_METHODS = {
    "LoHa": r"hada_(w[12]_[ab]|t[12])",
    "LoKr": r"lokr_(w[12]|w[12]_[ab]|t[12])",
    "GLoRA": r"(a1|a2|b1|b2|bm)\.weight",
    "IA3": "on_input",
    "OFT or BOFT": r"oft_blocks(\.\d+)?|rescale",
    "OFTv2": r"oft_R\.(weight|scaled_oft)",
    "T-LoRA": r"(q_layer|p_layer)\.weight|lambda_layer",
    "set_weight, which replaces a weight": "set_weight",
    "reshape_weight, which gives a weight another shape": "reshape_weight",
    "LoRA with a bias of its own": r"(lora_B|lora_up)\.bias",
    "a sparse bias": "bias_(indices|values|size)",
    "a raw split of q, k and v, as before sd-scripts saves it": r"lora_(up|down)\.\d+\.weight",
    "XLabs' attention processors": r"processor\.(qkv|proj)_lora[12]?\.(down|up)\.weight",
    "diffusers' attention processors of before 0.18": r"processor\.to_(q|k|v|out)_lora\.(down|up)\.weight",
    "a Control-LoRA": "lora_controlnet|up|down",
    "embeddings of new words": r"bundle_emb\..+|emb_params",
    "a raw state dict of PEFT, which has no alpha (save it with save_pretrained)": (
        r"lora_[AB]\.[^.]+\.weight|lora_magnitude_vector\.[^.]+(\.weight)?|base_layer\.\w+|"
        r"(modules_to_save|original_module)\..+"
    ),
}
_OTHERS = {name: re.compile(rf"(.+\.)?({pattern})") for name, pattern in OTHER_METHODS.items()}

DIFFUSERS_METADATA = "lora_adapter_metadata"


@dataclass(frozen=True)
class Origin:
    """Who wrote the file, and what its metadata says: the axis, and what the tool adds to a norm.

    ``has_own_shapes``: it is a tool that has dora_scale in LyCORIS's shapes, never in PEFT's. ``eps`` takes the dtype
    in which the magnitude is stored; it is None where it is not known.
    """

    tool: str
    axis: Axis | None = None
    noted_as: str = ""
    has_own_shapes: bool = False
    eps: Callable[[torch.dtype], float] | None = None


def read(path: Path, user_axis: Axis | None, norm_eps: float | None, faults: Faults) -> AdapterFile:
    """The adapters in the file ``path``; see :func:`lora_fast.adapters.files.read_file`."""
    tensors, metadata = reading.read_safetensors(path)
    modules, unknown = _by_module(tensors, path, faults)
    origin = _origin(metadata, path)
    notes: list[str] = []
    components: dict[str, Adapter] = {}
    is_peft = any(component_names.WRAPPER in module for module in modules)
    for component, (named, is_flattened) in _by_component(modules, path, faults).items():
        config = _configuration(metadata, component, path)
        reader = _Reader(
            path=path,
            component=component,
            is_flattened=is_flattened,
            is_peft=is_peft,
            claims=axis.Claims(user_axis, origin.axis, origin.noted_as, origin.has_own_shapes),
            origin=origin,
            norm_eps=norm_eps,
            config=config,
            scalings=None if config is None else peft.Scalings(config, named, path),
            faults=faults,
            notes=notes,
        )
        layers = reader.layers(named)
        if config is not None:
            with faults.collected():
                peft_targets.check_targets(layers, config, path, "the file")
        components[component] = Adapter(
            weights_path=path,
            config_path=path,
            layers=layers,
            added=_added(named),
            only_linears=True,
            is_flattened=is_flattened,
            format="kohya" if is_flattened else "diffusers",
            component=component,
            config=config or {},
        )
    if not faults.found and not any(adapter.layers or adapter.added for adapter in components.values()):
        faults(f"{path}: holds no LoRA: {', '.join(list(tensors)[:4]) or 'it is empty'}")
    kind: Format = "kohya" if any(adapter.is_flattened for adapter in components.values()) else "diffusers"
    return AdapterFile(path, kind, origin.tool, components, metadata, notes, unknown)


@dataclass
class _Module:
    """What a file has for one module, by the values of ``PARTS``."""

    parts: dict[str, Tensor] = field(default_factory=dict)
    is_embedding: bool = False

    @property
    def has_update(self) -> bool:
        return any(part in self.parts for part in FACTORS)


def _by_module(tensors: Mapping[str, Tensor], path: Path, faults: Faults) -> tuple[dict[str, _Module], list[str]]:
    """The parts of each module, and the keys that belong to none."""
    modules: dict[str, _Module] = {}
    others: dict[str, list[str]] = {}
    unknown: list[str] = []
    for key, tensor in tensors.items():
        if (found := _KEY.fullmatch(key)) is None:
            method = next((name for name, pattern in _OTHERS.items() if pattern.fullmatch(key)), None)
            (unknown if method is None else others.setdefault(method, [])).append(key)
        elif tensor.dtype not in (NUMBERS if found["part"] == "alpha" else FLOATS):
            faults(f"{path}: {key} has dtype {tensor.dtype}, expected {FLOATS_SAID}")
        else:
            module = modules.setdefault(found["module"], _Module())
            if PARTS[found["part"]] in module.parts:
                faults(f"{path}: {found['module']} has two {PARTS[found['part']]}")
            module.parts[PARTS[found["part"]]] = tensor
            module.is_embedding |= found["part"].startswith("lora_embedding")
    for method, keys in others.items():
        faults(f"{path}: holds {method}, which is not LoRA or DoRA: {shortened(keys)}")
    if unknown:
        faults(f"{path}: {shortened(unknown)} is no part of LoRA or DoRA that is known here")
    return modules, unknown + [key for keys in others.values() for key in keys]


def _by_component(
    modules: Mapping[str, _Module], path: Path, faults: Faults
) -> dict[str, tuple[dict[str, _Module], bool]]:
    """The modules of each component by their names in it, and whether these have _ for their dots."""
    found: dict[str, dict[str, _Module]] = {}
    kinds: dict[str, set[bool]] = {}  # of each component's names: flattened or not
    for whole, module in modules.items():
        component, name, is_flattened = component_names.split(whole)
        named = found.setdefault(component, {})
        if is_flattened is not None:
            kinds.setdefault(component, set()).add(is_flattened)
        if (twin := named.get(name)) is None:
            named[name] = module
            continue
        # diffusers' conversion leaves a dot in the flattened name of a magnitude
        is_magnitude = {"magnitude"} in (twin.parts.keys(), module.parts.keys())
        if not is_magnitude or twin.parts.keys() & module.parts.keys():
            faults(f"{path}: has {whole} under two names")
        twin.parts |= module.parts
    for component, own in kinds.items():
        if len(own) > 1:
            faults(f"{path}: has names of {component} with dots and with _ for them")
    # names without a component are flattened if none has a dot and one could have had it
    return {
        component: (named, any("_" in name for name in named) if component not in kinds else kinds[component] == {True})
        for component, named in found.items()
    }


@dataclass(frozen=True)
class _Reader:
    """The layers of one component. ``config`` and ``scalings`` are PEFT's for it, where the file has them."""

    path: Path
    component: str
    is_flattened: bool
    is_peft: bool
    claims: axis.Claims
    origin: Origin
    norm_eps: float | None
    config: Mapping[str, Any] | None
    scalings: peft.Scalings | None
    faults: Faults
    notes: list[str]

    def layers(self, modules: Mapping[str, _Module]) -> dict[str, AdapterLayer]:
        updates = {name: module for name, module in modules.items() if module.has_update}
        found: dict[str, AdapterLayer] = {}
        for name, module in updates.items():
            with self.faults.collected():
                found[name] = self._layer(name, module)
        self._note_alphas(updates)
        cores = [layer for layer in found.values() if layer.lora_mid is not None]
        made = sum(layer.lora_A.numel() * math.prod(layer.kernel) for layer in cores)
        with self.faults.collected():
            check_made(
                made, f"{self.path}: its lora_A with their lora_mid", sum(layer.lora_A.numel() for layer in cores)
            )
        return found

    def _layer(self, name: str, module: _Module) -> AdapterLayer:
        where, called, parts = self.path, self._called(name), module.parts
        if missing := [part for part in ("lora_A", "lora_B") if part not in parts]:
            raise ValueError(f"{where}: {called} has {', '.join(parts)}, but no {' and no '.join(missing)}")
        if "weight" in parts:
            raise ValueError(f"{where}: {called} has LoRA and a difference of its weight too, expected one of them")
        if "dora_scale" in parts and "magnitude" in parts:
            raise ValueError(f"{where}: {called} has two magnitudes")
        lora_A, lora_B, lora_mid = parts["lora_A"], parts["lora_B"], parts.get("lora_mid")
        layer = AdapterLayer(lora_A, lora_B, None, 1.0, module.is_embedding, lora_mid=lora_mid)
        check_layer(called, layer, where)
        if self.config is not None:
            _check_use_dora(self.config, called, parts, where)
        layer = dataclasses.replace(layer, scaling=self._scaling(name, called, parts, layer.rank))
        if "magnitude" in parts:
            if self.claims.user == "input":
                raise ValueError(f"{where}: {called} has one magnitude for each output; magnitude_axis says 'input'")
            return dataclasses.replace(
                layer,
                magnitude=peft.flat_magnitude(called, parts["magnitude"], lora_B, where),
                axis_reason=axis.BY_NAME,
                norm_eps=self.norm_eps or 0.0,
            )
        if "dora_scale" in parts:
            return self._with_scale(called, layer, parts["dora_scale"])
        return layer

    def _with_scale(self, called: str, layer: AdapterLayer, scale: Tensor) -> AdapterLayer:
        norm_axis: Axis = "output"
        try:
            norm_axis, reason = axis.decide(
                scale, layer.out_features, layer.in_features, layer.lora_A.dim(), self.claims
            )
        except ValueError as error:
            self.faults(f"{self.path}: dora_scale of {called} {error}")
            reason = axis.UNDECIDED
        return dataclasses.replace(
            layer,
            magnitude=scale.reshape(-1),
            norm_axis=norm_axis,
            axis_reason=reason,
            norm_eps=self._eps(scale.dtype),
        )

    def _called(self, name: str) -> str:
        return f"{self.component} {name}".strip()

    def _scaling(self, name: str, called: str, parts: Mapping[str, Tensor], rank: int) -> float:
        where = self.path
        if "alpha" in parts:
            alpha = parts["alpha"]
            if alpha.numel() != 1:
                raise ValueError(f"{where}: the alpha of {called} has shape {list(alpha.shape)}, expected []")
            value = reading.finite(alpha.item(), f"the alpha of {called}", where)
            if value == 0:
                raise ValueError(
                    f"{where}: the alpha of {called} is 0, which LyCORIS takes for the rank; expected another"
                )
            if self.scalings is not None and (told := self.scalings.of(name, rank)) != value / rank:
                raise ValueError(
                    f"{where}: the alpha of {called} gives the factor {value / rank:.9g}, its header {told:.9g}"
                )
            return value / rank
        if self.scalings is not None:
            return self.scalings.of(name, rank)
        if self.is_peft:
            raise ValueError(
                f"{where}: has PEFT's names and no alpha, which PEFT has in an {peft.CONFIG_NAME}; put it beside the "
                f"file, name that {peft.WEIGHTS_NAME}, and give the folder"
            )
        if "magnitude" in parts and self.is_flattened:
            raise ValueError(
                f"{where}: {called} has no alpha. ai-toolkit does not save that of DoRA for Stable Diffusion, and "
                "without it nothing says what the layer computes"
            )
        return 1.0

    def _note_alphas(self, modules: Mapping[str, _Module]) -> None:
        """Note which updates are taken with the factor 1 because nothing says another."""
        without = [self._called(name) for name, module in modules.items() if "alpha" not in module.parts]
        if self.config is not None or not without:
            return
        if len(without) == len(modules):
            self._note("has no alpha: its updates are taken with the factor 1, as tools do that write such files")
        else:
            self._note(
                f"has no alpha for {shortened(without)}: the factor is taken for 1 there, as kohya's scripts and "
                "ComfyUI take it"
            )

    def _eps(self, dtype: torch.dtype) -> float:
        """What is added to the norm of a layer whose dora_scale is stored in ``dtype``."""
        if self.norm_eps is not None:
            return self.norm_eps
        stored = torch.finfo(dtype).eps
        if self.origin.eps is None:
            who = "does not say who wrote it"
            if self.origin.tool:
                who = f"is {self.origin.tool}'s, and does not say what is added"
            self._note(
                f"{who}: nothing is added to the norms, where LyCORIS would add {stored:.3g} (norm_eps, --norm-eps)"
            )
            return 0.0
        eps = self.origin.eps(dtype)
        if eps:
            half = dtype.itemsize == 2 and eps == stored
            doubt = f", if it was trained in {name_of(dtype)}; else say --norm-eps 1.19e-7" if half else ""
            self._note(f"is {self.origin.tool}'s, which adds {eps:.3g} to each norm{doubt}")
        return eps

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def _added(modules: Mapping[str, _Module]) -> dict[str, Tensor]:
    """What is added to the base's own tensors, by their names: of a bias, also beside LoRA of the weight."""
    return {
        f"{name}.{part}": module.parts[part]
        for name, module in modules.items()
        for part in ("weight", "bias")
        if part in module.parts
    }


def _check_use_dora(config: Mapping[str, Any], called: str, parts: Mapping[str, Tensor], path: Path) -> None:
    """Raise ValueError unless the layer has a magnitude in PEFT's words if its header says so, and only then."""
    if "dora_scale" in parts:
        raise ValueError(
            f"{path}: {called} has a dora_scale, expected lora_magnitude_vector beside PEFT's configuration in the "
            "header"
        )
    use_dora = config.get("use_dora")
    if bool(use_dora) != ("magnitude" in parts):
        has = "a magnitude" if "magnitude" in parts else "no magnitude"
        raise ValueError(f"{path}: {called} has {has}, but use_dora is {use_dora} in the header")


def _configuration(metadata: Mapping[str, str], component: str, path: Path) -> Mapping[str, Any] | None:
    """PEFT's configuration of one component, which diffusers writes into the header; None where there is none."""
    if DIFFUSERS_METADATA not in metadata:
        return None
    content = reading.parse_json(metadata[DIFFUSERS_METADATA], f"{path}: its {DIFFUSERS_METADATA}")
    own = {
        key.removeprefix(f"{component}."): value for key, value in content.items() if key.startswith(f"{component}.")
    }
    config = own or content
    if not own and "r" not in config and "lora_alpha" not in config:
        return None  # the header is of other models
    peft.check_config({"peft_type": "LORA"} | config, f"{path}: its {DIFFUSERS_METADATA}")
    return config


def _origin(metadata: Mapping[str, str], path: Path) -> Origin:
    if CONVERTED in metadata:
        return Origin("lora_fast", has_own_shapes=True, eps=_none)
    if "ot_branch" in metadata or "ot_revision" in metadata or "ot_config" in metadata:
        return _one_trainer(metadata, path)
    if "ai-toolkit" in metadata.get("software", ""):
        return Origin("ai-toolkit", eps=_none)
    if "lycoris_config" in metadata:
        return _lycoris("SimpleTuner with LyCORIS", metadata["lycoris_config"], metadata, path)
    module = metadata.get("ss_network_module", "")
    if module.startswith("lycoris"):
        return _lycoris("LyCORIS", metadata.get("ss_network_args", "{}"), metadata, path)
    if module.startswith("networks."):
        is_musubi = "ss_full_bf16" in metadata or "ss_num_train_items" in metadata
        return Origin("musubi-tuner" if is_musubi else "sd-scripts")
    if DIFFUSERS_METADATA in metadata:
        return Origin("diffusers", eps=_none)
    return Origin("")


def _lycoris(tool: str, arguments: str, metadata: Mapping[str, str], path: Path) -> Origin:
    content = {} if arguments in ("", "None") else reading.parse_json(arguments, f"{path}: its network arguments")
    said = str(content.get("wd_on_output", content.get("wd_on_out", ""))).lower()
    axes: dict[str, Axis] = {"true": "output", "false": "input"}

    told = {torch.float16: metadata.get("ss_full_fp16"), torch.bfloat16: metadata.get("ss_full_bf16")}
    trained_in = next((dtype for dtype, flag in told.items() if flag == "True"), None)

    def eps(stored: torch.dtype) -> float:
        """Of the parameters' dtype in training, where the file says it; else of the dtype in which they are stored."""
        is_wider = trained_in is None and told.get(stored) == "False"
        return torch.finfo(torch.float32 if is_wider else trained_in or stored).eps

    return Origin(tool, axes.get(said), f"wd_on_output={said}", True, eps)


def _one_trainer(metadata: Mapping[str, str], path: Path) -> Origin:
    if "ot_config" not in metadata:
        return Origin("OneTrainer", has_own_shapes=True)
    config = reading.parse_json(metadata["ot_config"], f"{path}: its ot_config")
    said = config.get("lora_decompose_output_axis")
    if said not in (True, False, None):
        raise ValueError(f"{path}: lora_decompose_output_axis in its ot_config is {reading.described(said)}")
    eps = torch.finfo(torch.float32).eps if config.get("lora_decompose_norm_epsilon") is True else 0.0
    # settings without the choice are from before there was one
    noted_as = "no lora_decompose_output_axis" if said is None else f"lora_decompose_output_axis={json.dumps(said)}"
    return Origin("OneTrainer", "output" if said else "input", noted_as, True, lambda dtype: eps)


def _none(dtype: torch.dtype) -> float:
    return 0.0
