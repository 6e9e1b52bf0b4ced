"""Configs of a pipeline folder's components, checked before a network is made of them.

A key that diffusers or transformers obey and the compiled pipeline would not is refused by name. Every other key has
the kind their own signatures give it, and a size that a network can have: what they say to a wrong one, after a while,
names neither file nor key.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig
from transformers.activations import ACT2FN

from mtu_compile.core.families import Family, family_of
from mtu_compile.core.schema import Length, Mismatch, Range, Rule, conform, read_json, show
from mtu_compile.model.tokenizer import check_lengths, check_tokenizer
from mtu_compile.model.unet_config import MTU_KEYS, MTUConfig
from mtu_compile.model.unet_support import check_unet

Config = Mapping[str, Any]

#: Sizes beyond these are slips of the keyboard; a network of them would be made, slowly, before anybody noticed.
WIDEST, LONGEST = 1 << 20, 64

#: Whole numbers that may come in lists of lists (SSD-1B), that may be 0, and that count layers.
_NESTED = frozenset({"transformer_layers_per_block", "reverse_transformer_layers_per_block"})
_FROM_ZERO = frozenset({"freq_shift", "downsample_padding", "pad_token_id", "bos_token_id", "eos_token_id", *_NESTED})
_LAYERS = frozenset({"layers_per_block", "num_hidden_layers", *_NESTED})

_ABOVE_ZERO = Annotated[float, Rule(lambda value: value > 0, "a number above 0")]
_RGB = Annotated[int, Rule(lambda value: value == 3, "3: pictures are red, green and blue")]
_NUMBERS = Annotated[tuple[float, ...], Length(1, LONGEST)] | None

#: Kinds that are narrower than the signatures say.
_VAE: Mapping[str, Any] = {
    "in_channels": _RGB,
    "out_channels": _RGB,
    "scaling_factor": _ABOVE_ZERO,
    "latents_mean": _NUMBERS,
    "latents_std": Annotated[tuple[_ABOVE_ZERO, ...], Length(1, LONGEST)] | None,
}
_TEXT: Mapping[str, Any] = {
    "hidden_act": Annotated[str, Rule(lambda name: name in ACT2FN, "an activation that transformers know")],
    "layer_norm_eps": _ABOVE_ZERO,
    "model_type": Annotated[str, Rule(lambda name: name == "clip_text_model", '"clip_text_model"')],
    # diffusers' pipelines then hide the padding from the text encoder.
    "use_attention_mask": Annotated[
        bool | None, Rule(lambda on: not on, "false: text encoders see the padding here, as in Stable Diffusion")
    ],
}
_ANY: Mapping[str, Any] = {
    "quantization_config": Annotated[
        Any, Rule(lambda value: value is None, "none: weights have to be floats, quantising comes later")
    ],
}


def check_configs(folder: Path, listed: Mapping[str, tuple[str, str]]) -> None:
    """Check every component's ``config.json``, alone and with the others.

    Args:
        folder: a pipeline folder.
        listed: component → (library, class), as its index has them.

    Raises:
        ModelError: naming file, key, value and what was expected.
    """
    configs = {
        name: _read(folder / name / "config.json") for name in listed if (folder / name / "config.json").is_file()
    }
    unet, vae = configs["unet"], configs["vae"]
    with _named(folder / "unet" / "config.json"):
        _check_kinds(unet, {**_signature(UNet2DConditionModel), **_ANY, "_class_name": _one_name(listed["unet"][1])})
        if listed["unet"][1] == "MTUUNet2DConditionModel":
            MTUConfig.from_json(unet)
    check_unet(unet, folder / "unet" / "config.json", inspect.signature(UNet2DConditionModel.__init__).parameters)
    with _named(folder / "vae" / "config.json"):
        _check_kinds(vae, {**_signature(AutoencoderKL), **_ANY, **_VAE, "_class_name": _one_name("AutoencoderKL")})
        _check_latents(unet, vae)
    family = family_of(listed)
    for branch in family.texts:
        with _named(folder / branch.encoder / "config.json"):
            _check_kinds(configs[branch.encoder], {**_fields(CLIPTextConfig), **_ANY, **_TEXT})
        positions, vocabulary = (
            _value(configs[branch.encoder], key) for key in ("max_position_embeddings", "vocab_size")
        )
        check_tokenizer(folder / branch.tokenizer, positions, vocabulary)
    check_lengths([folder / branch.tokenizer for branch in family.texts])
    with _named(folder / "unet" / "config.json"):
        _check_text(unet, family, [configs[branch.encoder] for branch in family.texts])


class _named:
    """What is wrong with a config is wrong with this file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, Mismatch):
            raise error.at(self.path, hint="fetch or build the model again, or mend the file") from error


def _read(path: Path) -> Config:
    with _named(path):
        config: Config = conform(Mapping[str, Any], read_json(path))
        return config


def _check_kinds(config: Config, kinds: Mapping[str, Any]) -> None:
    for key, kind in kinds.items():
        if key in config:
            conform(kind, config[key], key)


def _check_latents(unet: Config, vae: Config) -> None:
    """The autoencoder's latent has the UNet's channels, and one mean and deviation for each."""
    channels = vae.get("latent_channels", 4)
    if channels != (wanted := unet.get("out_channels", 4)):
        raise Mismatch("latent_channels", show(channels), f"{wanted}, the UNet's out_channels")
    for key, other in (("latents_mean", "latents_std"), ("latents_std", "latents_mean")):
        if vae.get(key) is None:
            continue
        if len(vae[key]) != channels:
            raise Mismatch(key, show(vae[key]), f"{channels} numbers, one for each of latent_channels")
        if vae.get(other) is None:
            raise Mismatch(other, show(None), f"{channels} numbers beside {key}")
    if vae.get("shift_factor") and vae.get("latents_mean") is not None:
        raise Mismatch("shift_factor", show(vae["shift_factor"]), "null beside latents_mean")
    for blocks in ("down_block_types", "up_block_types"):
        default = inspect.signature(AutoencoderKL.__init__).parameters
        here, sizes = (vae.get(key, default[key].default) for key in (blocks, "block_out_channels"))
        if len(here) != len(sizes):
            raise Mismatch(blocks, show(here), f"{len(sizes)} entries, as block_out_channels has")


def _check_text(unet: Config, family: Family, encoders: Sequence[Config]) -> None:
    """The UNet takes what the text encoders of its family give."""
    if (addition := unet.get("addition_embed_type")) != family.addition:
        wanted = f"{show(family.addition)}, as the text encoders are those of {family.label}"
        raise Mismatch("addition_embed_type", show(addition), wanted)
    _check_width(unet, sum(_value(encoder, "hidden_size") for encoder in encoders), len(encoders))
    if not family.conditions:
        return
    pooled = next(
        _value(encoder, "projection_dim")
        for branch, encoder in zip(family.texts, encoders, strict=True)
        if branch.pooled
    )
    key, each = "projection_class_embeddings_input_dim", unet.get("addition_time_embed_dim")
    if each is None:
        raise Mismatch("addition_time_embed_dim", None, "a number: the width of each of six sizes")
    if (width := unet.get(key)) != (wanted := pooled + 6 * each):
        raise Mismatch(
            key, show(width), f"{wanted}, the pooled text's projection_dim {pooled} and six sizes of {each} each"
        )


def _check_width(unet: Config, wanted: int, encoders: int) -> None:
    """Cross-attention reads what the text encoders give, unless the UNet projects it first."""
    if unet.get("encoder_hid_dim") is not None or unet.get("encoder_hid_dim_type") is not None:
        return
    width = unet.get("cross_attention_dim", 1280)
    whose = "the text encoder's hidden_size" if encoders == 1 else "the sum of the text encoders' hidden_size"
    for one in width if isinstance(width, (list, tuple)) else (width,):
        if one != wanted:
            raise Mismatch("cross_attention_dim", show(width), f"{wanted}, {whose}")


def _value(config: Config, key: str) -> int:
    return int(config.get(key, getattr(CLIPTextConfig, key)))


def _one_name(name: str) -> Any:
    return Annotated[str, Rule(lambda found: found == name, f'"{name}", as in model_index.json')]


@lru_cache(maxsize=8)
def _signature(cls: Callable[..., Any]) -> dict[str, Any]:
    """Kind of every argument of a diffusers model, out of its annotations."""
    hints = get_type_hints(cls.__init__)  # type: ignore[misc]
    parameters = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    return {
        key: _kind(key, hints[key], parameters[key].default)
        for key in parameters
        if key in hints and key not in MTU_KEYS
    }


def _fields(cls: Any) -> dict[str, Any]:
    """The same for a config of transformers, whose own keys are annotated in its class."""
    return {key: _kind(key, hint, getattr(cls, key, None)) for key, hint in cls.__annotations__.items()}


def _kind(key: str, annotation: Any, default: Any) -> Any:
    """``annotation`` as a schema: numbers get a range, and what diffusers annotate as ``tuple[int]`` is a list."""
    leaves, is_list, optional = _leaves(annotation)
    narrowed = [_narrow(key, leaf) for leaf in leaves if leaf is not int or float not in leaves]
    if not narrowed:
        return Any
    entry: Any = Union[tuple(narrowed)]  # noqa: UP007
    kinds = [entry] if not is_list or _has_plain(annotation) else []
    if is_list:
        if key in _NESTED:
            entry = Union[entry, Annotated[tuple[entry, ...], Length(1, LONGEST)]]  # noqa: UP007
        kinds.append(Annotated[tuple[entry, ...], Length(1, LONGEST)])
    # Published files write null for what is off.
    if optional or default is None or default is False:
        kinds.append(NoneType)
    return Union[tuple(kinds)]  # noqa: UP007


def _leaves(annotation: Any) -> tuple[list[type], bool, bool]:
    """Plain types in an annotation, whether it has a list, and whether it may be null."""
    if annotation in (int, float, str, bool):
        return [annotation], False, False
    if annotation is NoneType:
        return [], False, True
    origin = get_origin(annotation)
    if annotation in (tuple, list):
        return [], True, False
    if origin in (Union, UnionType, tuple, list):
        parts = [_leaves(one) for one in get_args(annotation) if one is not Ellipsis]
        leaves = list(dict.fromkeys(leaf for part, _, _ in parts for leaf in part))
        is_list = origin in (tuple, list) or any(part for _, part, _ in parts)
        return leaves, is_list, any(part for _, _, part in parts)
    return [], False, True


def _has_plain(annotation: Any) -> bool:
    if get_origin(annotation) in (Union, UnionType):
        return any(_has_plain(one) for one in get_args(annotation))
    return annotation in (int, float, str, bool)


def _narrow(key: str, leaf: type) -> Any:
    if leaf is int:
        return Annotated[int, Range(0 if key in _FROM_ZERO else 1, LONGEST if key in _LAYERS else WIDEST)]
    return leaf
