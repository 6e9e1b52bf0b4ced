"""What engines compute in: the names of ``build``'s options."""

from __future__ import annotations

from typing import Literal

#: ``int8`` and ``fp8``: weights and activations; ``int8-weights`` and ``int4-weights``: weights only; else floats.
Precision = Literal["int8", "fp8", "int8-weights", "int4-weights", "fp16", "bf16", "fp32"]

#: Precisions of weights and activations, which are calibrated.
QUANTISED: tuple[Precision, ...] = ("int8", "fp8")

#: Precisions that only the weights are in: what is computed, and with it what passes between layers, stays float.
WEIGHTS_ONLY: tuple[Precision, ...] = ("int8-weights", "int4-weights")
