"""What a manifest tells people and reports: how it was made and measured, by which tools, and what it would need.

Each table says which entries there are and of what type; entries it does not know may hold anything and are nobody's.
Whoever writes a new entry into a manifest adds it here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from mtu_compile.bundle.kinds import (
    Bytes,
    Cosine,
    Count,
    Decibels,
    Magnitude,
    Milliseconds,
    Name,
    Positive,
    Ratio,
    Seconds,
    Seed,
    Sha256,
    Share,
    Steps,
    Text,
    Timestep,
    Version,
)
from mtu_compile.core.precision import Precision
from mtu_compile.core.schema import Entries

Object = Mapping[str, Any]

_SPAN = tuple[Ratio, Ratio]

#: The toolchain's own figures about the device.
Estimate = Annotated[
    Object,
    Entries(
        needed={"source": Text},
        known={
            "latency_ms": Milliseconds,
            "compiler": Text | None,
            "dpu_mhz": Ratio | None,
            "compatibility": Text | None,
            "int8_share_of_operations": Share,
            "busy_ms": Mapping[str, Milliseconds],
            "ms_by_type": Mapping[str, Mapping[str, Milliseconds]],
        },
    ),
]

_CALIBRATION = Annotated[
    Object,
    Entries(
        known={
            "sha256": Sha256,
            "strategy": Name,
            "pictures": Positive,
            "calls": Positive,
            "steps": Steps,
            "seed": Seed,
            "timesteps": tuple[Timestep, ...],
            "source": Text,
        }
    ),
]

_SETTINGS = Annotated[
    Object,
    Entries(
        known={
            "subset_size": Positive | None,
            "smooth_quant_alpha": Share | None,
            "range_estimator": Name,
            "weight_bits_fix": bool,
            "fast_bias_correction": bool,
            "ignored_scopes": tuple[Text, ...],
        }
    ),
]
_REACHED = Annotated[
    Object,
    Entries(known={"worst_sqnr_db": Decibels, "mean_sqnr_db": Decibels, "guidance_ratio": _SPAN | None}),
]
_LAYER = Annotated[
    Object,
    Entries(
        needed={
            "name": Text,
            "members": tuple[Text, ...],
            "op": Name,
            "sqnr_db": Decibels,
            "worst_sqnr_db": Decibels,
            "guidance_db": Decibels | None,
            "float_ms": Milliseconds | None,
            "int8_ms": Milliseconds | None,
            "kept": Name | None,
        }
    ),
]
_MIXED = Annotated[
    Object,
    Entries(
        needed={
            "criteria": Annotated[
                Object, Entries(known={"sqnr_db": Decibels, "guidance_ratio": Share, "slowdown": Share})
            ],
            "met": bool,
            "calls": Positive,
            "check_calls": Positive,
            "layers": tuple[_LAYER, ...],
            "costs": Annotated[Object, Entries(needed={"source": Text, "measured": bool})] | None,
            "all_int8": _REACHED,
            "chosen": _REACHED,
        }
    ),
]
_QUANTISATION = Annotated[
    Object,
    Entries(
        known={
            "settings": _SETTINGS,
            "samples": Positive,
            "activations": Count,
            "weights": Count,
            "layers": Mapping[str, tuple[Count, Count]],
            "float_layers": tuple[Text, ...],
            "bytes_before": Bytes,
            "bytes_after": Bytes,
            "tool": Text,
            "ranges": Mapping[str, Magnitude],
            "mixed": _MIXED | None,
            "config": Text | None,
        }
    ),
]
_COMPRESSION = Annotated[
    Object,
    Entries(
        needed={
            "layers": Mapping[str, Mapping[str, Count]],
            "bytes_before": Bytes,
            "bytes_after": Bytes,
            "tool": Text,
        },
        known={
            "settings": Annotated[
                Object,
                Entries(
                    known={"mode": Name, "ignored_scopes": tuple[Text, ...], "ratio": Share, "group_size": Count | None}
                ),
            ],
            "parameters": Mapping[str, Bytes],
            "rounded_again": Count,
        },
    ),
]
_PARITY = Annotated[
    Object,
    Entries(
        needed={
            "calls": Positive,
            "rows": tuple[
                Annotated[
                    Object,
                    Entries(
                        needed={
                            "backend": Text,
                            "version": Text,
                            "worst_sqnr_db": Decibels,
                            "mean_sqnr_db": Decibels,
                            "worst_cosine": Cosine,
                            "worst_guidance_ratio": Ratio | None,
                            "agreement_db": Decibels | None,
                        },
                        known={"judged": bool},
                    ),
                ],
                ...,
            ],
            "not_run": Mapping[str, Text],
            "required_db": Decibels,
            "failures": tuple[Text, ...],
        },
        known={"task": Text, "graph": Text, "reference": Text},
    ),
]
_NOTICE = Annotated[
    Object,
    Entries(
        needed={"use": Name, "row": Text, "kind": Name, "message": Text, "hint": Text},
        known={
            "prompt": Text,
            "tokens": Count,
            "limit": Count,
            "dropped": Text,
            "pixels": Count,
            "of": Count,
        },
    ),
]

#: ``TaskEntry.extra``.
#: How far the numbers of a network go that is computed in float16.
_HALF_RANGE = Annotated[
    Object,
    Entries(
        needed={"peak": Magnitude, "node": Text},
        known={
            "precision": Precision,
            "overflow": Text | None,
            "overflow_type": Text | None,
            "overflow_at": Count | None,
        },
    ),
]

TaskExtra = Annotated[
    Object,
    Entries(
        known={
            "notices": tuple[_NOTICE, ...],
            "calibration": _CALIBRATION,
            "quantisation": _QUANTISATION,
            "compression": _COMPRESSION,
            "build_seconds": Seconds,
            "parity": _PARITY,
            "float16_range": _HALF_RANGE,
        }
    ),
]

#: What the build needs of the machine it runs on, estimated.
_HOST = Annotated[
    Object,
    Entries(
        needed={"picture": Text, "method": Text, "memory_bytes": Bytes, "available_bytes": Bytes | None},
        known={
            "libraries_bytes": Bytes,
            "weights_bytes": Bytes,
            "scores_bytes": Bytes,
            "features_bytes": Bytes,
            "smaller": Text | None,
            "seconds": Seconds | None,
            "fits": bool | None,
        },
    ),
]

_PLAN = Annotated[
    Object,
    Entries(
        needed={
            "method": Text,
            "networks": tuple[
                Annotated[
                    Object,
                    Entries(
                        needed={
                            "name": Text,
                            "precision": Precision,
                            "weights_bytes": Bytes,
                            "activation_bytes": Bytes,
                        },
                        known={
                            "kind": Literal["task", "part"],
                            "attention_scores_bytes": Bytes,
                            "unknown_shapes": Count,
                        },
                    ),
                ],
                ...,
            ],
            "tasks": Mapping[str, Bytes],
            "together_bytes": Bytes,
            "available_bytes": Bytes | None,
            "fits": bool | None,
        },
        known={
            "target": Name,
            "precision": Precision,
            "workspace_bytes": Bytes,
            "reserved_bytes": Bytes,
            "device_bytes": Bytes | None,
            "one_engine_bytes": Bytes | None,
            "least_bytes": Bytes | None,
            "build": _HOST | None,
            "suggestions": tuple[
                Annotated[Object, Entries(known={"options": Text, "needs_bytes": Bytes, "fits": bool})], ...
            ],
        },
    ),
]
_JETPACK = Annotated[
    Object,
    Entries(
        needed={"version": tuple[Version, Version], "tensorrt": Version},
        known={
            "cuda": Version,
            "python": Version,
            "glibc": Version,
            "machine": Name,
            "packages": tuple[Text, ...],
            "source": Text,
        },
    ),
]
_BOARD = Annotated[
    Object,
    Entries(
        needed={"tensorrt": tuple[Version, Version]},
        known={
            "device": Text,
            "compute_capability": Version,
            "python": tuple[Version, ...],
            "jetpack": tuple[_JETPACK, ...],
            "wheels": Annotated[
                Object, Entries(known={"own": Text, "dependencies": tuple[Text, ...] | None, "install": Text})
            ],
        },
    ),
]

#: ``Manifest.extra``.
Extra = Annotated[
    Object, Entries(known={"plan": _PLAN, "board": _BOARD, "as_task": Name, "float16_range": Mapping[str, _HALF_RANGE]})
]
