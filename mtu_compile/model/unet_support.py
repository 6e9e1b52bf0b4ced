"""Which configurations of a pretrained UNet go in, key by key: read before its weights are.

Every parameter of diffusers' ``UNet2DConditionModel`` is either carried through upcycling, export and passes whatever
its value (tests compare with diffusers), or has a rule here. A key that this table does not know is refused unless it
has its default: it may change the network, and nobody has looked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import Parameter
from pathlib import Path
from typing import Any

from mtu_compile.core.errors import ModelError
from mtu_compile.core.schema import Mismatch, show
from mtu_compile.core.tasks import Task

HINT = "docs/guide.md lists the published families that go in"

#: Keys whose every value diffusers itself accepts is carried. Those that belong to a block, an embedding or an
#: attention of another kind say nothing by themselves; that kind has its rule.
CARRIED = frozenset(
    {
        *("sample_size", "in_channels", "out_channels", "flip_sin_to_cos", "freq_shift", "block_out_channels"),
        *("layers_per_block", "downsample_padding", "mid_block_scale_factor", "dropout", "act_fn", "norm_eps"),
        *("transformer_layers_per_block", "reverse_transformer_layers_per_block", "attention_head_dim"),
        *("encoder_hid_dim", "use_linear_projection", "addition_time_embed_dim", "num_class_embeds"),
        *("upcast_attention", "resnet_skip_time_act", "resnet_out_scale_factor", "time_embedding_type"),
        *("time_embedding_dim", "time_embedding_act_fn", "timestep_post_act", "conv_in_kernel", "conv_out_kernel"),
        *("projection_class_embeddings_input_dim", "mid_block_only_cross_attention", "cross_attention_norm"),
        "addition_embed_type_num_heads",
    }
)

#: What the blocks of a level may be. Others take or give something else than diffusers' UNet hands them, hold
#: feed-forwards that do not upcycle (``K…``), or sample in a way that torch does not export at free sizes
#: (``SimpleCrossAttn…`` and ``Resnet…``, of pixel models).
DOWN = ("CrossAttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D")
UP = ("CrossAttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D")
MIDDLE = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", "UNetMidBlock2DSimpleCrossAttn", None)

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Carried:
    """The values of a key that are carried, given the whole config, and what they are called."""

    holds: Callable[[Any, Config], bool]
    expected: str


def _one_of(*values: Any, because: str = "") -> Carried:
    names = " or ".join(map(show, values))
    return Carried(
        lambda value, config: any(value == known and type(value) is type(known) for known in values),
        f"{names}: {because}" if because else names,
    )


def _all_of(values: Sequence[str]) -> Carried:
    return Carried(
        lambda value, config: isinstance(value, list | tuple) and all(one in values for one in value),
        f"only {', '.join(values)}",
    )


def _attend_to_themselves(value: Any, config: Config) -> bool:
    blocks = config.get("down_block_types", DOWN[:1])
    each = value if isinstance(value, list | tuple) else [value] * len(blocks)
    return not any(one and block == "CrossAttnDownBlock2D" for one, block in zip(each, blocks, strict=False))


def _is_one_width(value: Any, config: Config) -> bool:
    widths = list(value) if isinstance(value, list | tuple) else [value]
    return bool(widths) and all(type(width) is int and width == widths[0] for width in widths)


def _is_wide(value: Any, config: Config) -> bool:
    return value is None or (type(value) is int and value >= 4)


_PICTURES = "embeddings of a picture are no input of the tasks"

RULES: Mapping[str, Carried] = {
    "center_input_sample": _one_of(False, because="samples go into the first convolution as they are"),
    "down_block_types": _all_of(DOWN),
    "mid_block_type": _one_of(*MIDDLE),
    "up_block_types": _all_of(UP),
    "only_cross_attention": Carried(_attend_to_themselves, "false: blocks without self-attention do not upcycle"),
    "norm_num_groups": Carried(lambda value, config: type(value) is int, "a number of groups"),
    "cross_attention_dim": Carried(_is_one_width, "one width for all blocks, as there is one text"),
    "encoder_hid_dim_type": _one_of(None, "text_proj", because=_PICTURES),
    "num_attention_heads": _one_of(None, because="diffusers takes attention_head_dim for it"),
    "dual_cross_attention": _one_of(False, None, because="blocks with two texts do not upcycle"),
    "class_embed_type": _one_of(None, "timestep", because="a task's label is one number, no vector"),
    "addition_embed_type": _one_of(None, "text_time"),
    "resnet_time_scale_shift": _one_of("default", "scale_shift"),
    "time_cond_proj_dim": Carried(_is_wide, "null, or 4 or more numbers for the guidance scale"),
    "attention_type": _one_of("default", because="gated attention (GLIGEN) does not upcycle"),
    "class_embeddings_concat": _one_of(False, None, because="labels are added to the timestep"),
}


def check_unet(config: Config, path: Path | None = None, parameters: Mapping[str, Parameter] | None = None) -> None:
    """Refuse a configuration that would become another function, or no graph at all.

    Args:
        config: of a ``UNet2DConditionModel``, as in its ``config.json``; keys that are left out have their defaults.
        path: the file, for messages.
        parameters: those of the installed diffusers' UNet, to catch keys that are newer than this table; keys that
            diffusers does not have it ignores, and so do we.

    Raises:
        ModelError: naming key and value.
    """
    for key, rule in RULES.items():
        if key in config and not rule.holds(config[key], config):
            raise Mismatch(key, show(config[key]), rule.expected).at(path or "the UNet", hint=HINT)
    for key, parameter in (parameters or {}).items():
        if key not in CARRIED and key not in RULES and key in config and config[key] != parameter.default:
            expected = f"{show(parameter.default)}: this mtu-compile does not know the key"
            raise Mismatch(key, show(config[key]), expected).at(path or "the UNet", hint=HINT)


def takes_labels(config: Config) -> bool:
    """Whether the UNet wants a class label."""
    return config.get("class_embed_type") is not None or config.get("num_class_embeds") is not None


def takes_scale(config: Config) -> bool:
    """Whether the UNet takes the guidance scale as an input, as latent consistency models do."""
    return config.get("time_cond_proj_dim") is not None


def fit_task(task: Task, config: Config) -> Task:
    """``task`` as a UNet with ``config`` is guided: one that takes the guidance scale wants no second sample."""
    if takes_scale(config) and task.guidance != "none":
        return replace(task, guidance="embedded", image_guidance_scale=1.0)
    return task


def check_task(task: Task, config: Config) -> None:
    """``ModelError`` unless a UNet with ``config`` can be asked for ``task``: by its guidance, with its label."""
    if task.guidance != "none" and (task.guidance == "embedded") != takes_scale(config):
        raise ModelError(
            f"task {task.name!r} has guidance {task.guidance!r}, and the UNet's time_cond_proj_dim is "
            f"{show(config.get('time_cond_proj_dim'))}",
            hint="'embedded' is for UNets that take the guidance scale as an input, and for those only",
        )
    if not takes_labels(config):
        if task.class_label is not None:
            raise ModelError(
                f"task {task.name!r} has class_label {task.class_label}, and the UNet takes none",
                hint="leave class_label away",
            )
        return
    classes = config.get("num_class_embeds") if config.get("class_embed_type") is None else None
    if task.class_label is None or (classes is not None and task.class_label >= classes):
        known = "a number" if classes is None else f"a number from 0 to {classes - 1}"
        raise ModelError(
            f"task {task.name!r} has class_label {show(task.class_label)}, and the UNet takes class labels",
            hint=f'describe the tasks with --tasks FILE, each with a "class_label", {known}',
        )
