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

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_fast.adapters import reading
from lora_fast.adapters.adapter import (
    CONVERTED,
    DTYPES,
    Adapter,
    AdapterFile,
    AdapterLayer,
    Faults,
    check_layer,
    shortened,
)
from lora_fast.adapters.formats import axis, peft
from lora_fast.calls import Axis

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
NUMBERS = (*DTYPES, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
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
    "embeddings of new words": r"(.*\.)?bundle_emb\..+|emb_params",
    "a raw state dict of PEFT, which has no alpha (save it with save_pretrained)": (
        r"lora_[AB]\.[^.]+\.weight|lora_magnitude_vector\.[^.]+(\.weight)?|base_layer\.\w+|"
        r"(modules_to_save|original_module)\..+"
    ),
}
_OTHERS = {name: re.compile(rf"(.+\.)?({pattern})") for name, pattern in OTHER_METHODS.items()}

_FLATTENED = re.compile(
    r"(?P<component>lora_(?:prior_)?(?:unet|te\d?|transformer)|lycoris|transformer(?=_(?:single_)?transformer_blocks_))"
    r"[_.](?P<name>.+)"
)
_DOTTED = re.compile(
    r"(?P<component>unet|transformer|prior|diffusion_model(?:\.transformer_[12])?|text_encoder(?:_[2-4])?|"
    r"text_encoders\.\w+\.transformer|clip_[lgh]|t5)\.(?P<name>.+)"
)
# the wrapper's name that PEFT puts before all
_WRAPPER = "base_model.model."
DIFFUSERS_METADATA = "lora_adapter_metadata"


def is_flattened_component(component: str) -> bool:
    """Whether names that begin so, with _ after it, are read back as that component's."""
    found = _FLATTENED.fullmatch(f"{component}_x")
    return found is not None and found["component"] == component


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
    word = axis.Word(user_axis, origin.axis, origin.noted_as, not origin.has_own_shapes)
    notes: list[str] = []
    components: dict[str, Adapter] = {}
    flattened: dict[str, bool] = {}
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    for module, parts in modules.items():
        component, name, is_flattened = _component(module)
        if flattened.setdefault(component, is_flattened) != is_flattened:
            faults(f"{path}: has names of {component} with dots and with _: {module} is one of them")
        if (twin := found.setdefault(component, {}).setdefault(name, parts)) is not parts:
            # diffusers' conversion leaves a dot in the name of a magnitude
            if twin.keys() & parts.keys() or not (twin.keys() == {"magnitude"} or parts.keys() == {"magnitude"}):
                faults(f"{path}: has {module} under two names")
            twin |= parts
    is_peft = any(_WRAPPER in module for module in modules)
    for component, named in found.items():
        is_flattened = flattened[component] and (component != "" or not any("." in name for name in named))
        config = _configuration(metadata, component, path)
        reader = _Reader(path, component, is_flattened, is_peft, word, origin, norm_eps, config, faults, notes)
        components[component] = Adapter(
            weights_path=path,
            config_path=path,
            layers=dict(reader.layers(named)),
            added=dict(_added(named)),
            only_linears=True,
            is_flattened=is_flattened,
            format="kohya" if is_flattened else "diffusers",
            component=component,
            config=config or {},
        )
    if not faults.found and not any(adapter.layers or adapter.added for adapter in components.values()):
        faults(f"{path}: holds no LoRA: {', '.join(list(tensors)[:4]) or 'it is empty'}")
    kind = "kohya" if any(adapter.is_flattened for adapter in components.values()) else "diffusers"
    return AdapterFile(path, kind, origin.tool, components, metadata, notes, unknown)


def _by_module(
    tensors: Mapping[str, Tensor], path: Path, faults: Faults
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """The parts of each module, and the keys that belong to none."""
    modules: dict[str, dict[str, Tensor]] = {}
    others: dict[str, list[str]] = {}
    unknown: list[str] = []
    for key, tensor in tensors.items():
        if (found := _KEY.fullmatch(key)) is None:
            method = next((name for name, pattern in _OTHERS.items() if pattern.fullmatch(key)), None)
            (unknown if method is None else others.setdefault(method, [])).append(key)
        elif tensor.dtype not in (NUMBERS if found["part"] == "alpha" else DTYPES):
            expected = "expected float64, float32, bfloat16 or float16"
            faults(f"{path}: {key} has dtype {tensor.dtype}, {expected}")
        elif modules.setdefault(found["module"], {}).setdefault(PARTS[found["part"]], tensor) is not tensor:
            faults(f"{path}: {found['module']} has two {PARTS[found['part']]}")
        elif found["part"].startswith("lora_embedding"):
            modules[found["module"]]["is_embedding"] = tensor
    for method, keys in others.items():
        faults(f"{path}: holds {method}, which is not LoRA or DoRA: {shortened(keys)}")
    if unknown:
        faults(f"{path}: {shortened(unknown)} is no part of LoRA or DoRA that is known here")
    return modules, unknown + [key for keys in others.values() for key in keys]


def _component(module: str) -> tuple[str, str, bool]:
    """The component of a key's module, the module's name in it, and whether that has _ for its dots."""
    module = module.removeprefix(_WRAPPER)
    if found := _FLATTENED.fullmatch(module):
        return found["component"], found["name"].replace(".", "_"), True
    if found := _DOTTED.fullmatch(module):
        return found["component"], found["name"].removeprefix(_WRAPPER), False
    return "", module, True


@dataclass(frozen=True)
class _Reader:
    """The layers of one component. ``config`` is PEFT's configuration of it, where the file has one."""

    path: Path
    component: str
    is_flattened: bool
    is_peft: bool
    word: axis.Word
    origin: Origin
    norm_eps: float | None
    config: Mapping[str, Any] | None
    faults: Faults
    notes: list[str]

    def layers(self, modules: Mapping[str, Mapping[str, Tensor]]) -> Iterator[tuple[str, AdapterLayer]]:
        for name, parts in modules.items():
            if not any(part in parts for part in FACTORS):
                continue
            try:
                yield name, self._layer(name, parts)
            except ValueError as error:
                self.faults(str(error))

    def _layer(self, name: str, parts: Mapping[str, Tensor]) -> AdapterLayer:
        where, called = self.path, f"{self.component} {name}".strip()
        if missing := [part for part in ("lora_A", "lora_B") if part not in parts]:
            raise ValueError(f"{where}: {called} has {', '.join(parts)}, but no {' and no '.join(missing)}")
        if both := parts.keys() & {"weight", "bias"}:
            raise ValueError(f"{where}: {called} has LoRA and a difference of its {' and '.join(sorted(both))} too")
        if "dora_scale" in parts and "magnitude" in parts:
            raise ValueError(f"{where}: {called} has two magnitudes")
        is_embedding = "is_embedding" in parts
        layer = AdapterLayer(parts["lora_A"], parts["lora_B"], None, 0.0, is_embedding, lora_mid=parts.get("lora_mid"))
        check_layer(called, layer, where)
        if self.config is not None and bool(self.config.get("use_dora")) != ("magnitude" in parts):
            has = "a magnitude" if "magnitude" in parts else "no magnitude"
            raise ValueError(
                f"{where}: {called} has {has}, but use_dora is {self.config.get('use_dora')} in the header"
            )
        scaling = self._scaling(name, called, parts, layer.rank)
        norm_axis: Axis = "output"
        reason, eps, magnitude = "", 0.0, None
        if "magnitude" in parts:
            magnitude = peft.flat_magnitude(called, parts["magnitude"], layer.lora_B, where)
            reason = "a magnitude by its name: one per output"
            if self.word.user == "input":
                raise ValueError(f"{where}: {called} has one magnitude for each output; magnitude_axis says 'input'")
        elif "dora_scale" in parts:
            scale = parts["dora_scale"]
            magnitude = scale.reshape(-1)
            try:
                norm_axis, reason = axis.decide(
                    scale, layer.out_features, layer.in_features, layer.lora_A.dim(), self.word
                )
            except ValueError as error:
                self.faults(f"{where}: dora_scale of {called} {error}")
                reason = axis.UNDECIDED
            eps = self._eps(scale.dtype)
        return AdapterLayer(
            lora_A=layer.lora_A,
            lora_B=layer.lora_B,
            magnitude=magnitude,
            scaling=scaling,
            is_embedding=is_embedding,
            norm_axis=norm_axis,
            axis_reason=reason,
            norm_eps=eps,
            lora_mid=layer.lora_mid,
        )

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
            if self.config is not None and (told := peft.scaling_of(self.config, name, rank, where)) != value / rank:
                raise ValueError(
                    f"{where}: the alpha of {called} gives the factor {value / rank:.9g}, its header {told:.9g}"
                )
            return value / rank
        if self.config is not None:
            return peft.scaling_of(self.config, name, rank, where)
        if self.is_peft:
            raise ValueError(
                f"{where}: has PEFT's names and no alpha, which PEFT has in an {peft.CONFIG_NAME} that is not beside it"
            )
        if "magnitude" in parts and self.is_flattened:
            raise ValueError(
                f"{where}: {called} has no alpha. ai-toolkit does not save that of DoRA for Stable Diffusion, and "
                "without it nothing says what the layer computes"
            )
        self._note("has no alpha: its updates are taken with the factor 1, as tools do that write such files")
        return 1.0

    def _eps(self, dtype: torch.dtype) -> float:
        """What is added to the norm of a layer whose dora_scale is stored in ``dtype``."""
        if self.norm_eps is not None:
            return self.norm_eps
        stored = torch.finfo(dtype).eps
        if self.origin.eps is None:
            who = f"is {self.origin.tool}'s, without its settings" if self.origin.tool else "does not say who wrote it"
            self._note(
                f"{who}: nothing is added to the norms, where LyCORIS would add {stored:.3g} (norm_eps, --norm-eps)"
            )
            return 0.0
        eps = self.origin.eps(dtype)
        if eps:
            half = dtype.itemsize == 2 and eps == stored
            doubt = f", if it was trained in {str(dtype)[6:]}; else say --norm-eps 1.19e-7" if half else ""
            self._note(f"is {self.origin.tool}'s, which adds {eps:.3g} to each norm{doubt}")
        return eps

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def _added(modules: Mapping[str, Mapping[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """What is added to the base's own tensors, by their names."""
    for name, parts in modules.items():
        if not any(part in parts for part in FACTORS):
            yield from ((f"{name}.{part}", tensor) for part, tensor in parts.items())


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
        return Origin("OneTrainer")
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
