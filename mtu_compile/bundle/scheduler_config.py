"""What a ``scheduler_config.json`` may hold: every option of diffusers' schedulers, its type and range.

This is only sense: whether a sampler implements a value is for ``mtu_compile.runtime.schedulers`` to say. Any option
may be ``null``, which is as good as leaving it out. Options that are not listed are no scheduler's, and nobody's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from mtu_compile.bundle.kinds import Count, Name, Share
from mtu_compile.core.schema import Entries, Length, Range

#: Timesteps of the training schedule; 1000 everywhere so far.
_TrainSteps = Annotated[int, Range(1, 100_000)]
#: Variance of the noise a step adds; without any, or with nothing else, there is no diffusion.
_Beta = Annotated[float, Range(1e-9, 1 - 1e-6)]
_Order = Annotated[int, Range(1, 10)]
_Sigma = Annotated[float, Range(0, 1e6)]
_Number = Annotated[float, Range(-1e6, 1e6)]
#: JSON has no infinity; a manifest writes it in letters.
_Level = _Number | Literal["inf", "-inf"]

OPTIONS: Mapping[str, Any] = {
    "_diffusers_version": Name,
    "_use_default_values": tuple[Name, ...],
    # the training schedule
    "num_train_timesteps": _TrainSteps,
    "beta_start": _Beta,
    "beta_end": _Beta,
    "beta_schedule": Name,
    "trained_betas": Annotated[tuple[_Beta, ...], Length(1, 100_000)],
    "rescale_betas_zero_snr": bool,
    "prediction_type": Name,
    # where the steps lie
    "timestep_spacing": Name,
    "timestep_type": Name,
    "timestep_scaling": _Number,
    "steps_offset": Annotated[int, Range(0, 100_000)],
    "original_inference_steps": _TrainSteps,
    "interpolation_type": Name,
    "final_sigmas_type": Name,
    "sigma_schedule": Name,
    "sigma_min": _Sigma,
    "sigma_max": _Sigma,
    "sigma_data": _Sigma,
    "rho": _Sigma,
    "lambda_min_clipped": _Level,
    "use_karras_sigmas": bool,
    "use_exponential_sigmas": bool,
    "use_beta_sigmas": bool,
    "use_lu_lambdas": bool,
    "invert_sigmas": bool,
    # flow matching
    "use_flow_sigmas": bool,
    "use_dynamic_shifting": bool,
    "flow_shift": _Number,
    "shift": _Number,
    "shift_terminal": _Number | bool,
    "base_shift": _Number,
    "max_shift": _Number,
    "base_image_seq_len": Count,
    "max_image_seq_len": Count,
    "time_shift_type": Name,
    # the step itself
    "algorithm_type": Name,
    "solver_type": Name,
    "solver_order": _Order,
    "predictor_order": _Order,
    "corrector_order": _Order,
    "lower_order_final": bool,
    "euler_at_final": bool,
    "predict_x0": bool,
    "disable_corrector": tuple[Count, ...],
    "skip_prk_steps": bool,
    "set_alpha_to_one": bool,
    "stochastic_sampling": bool,
    "variance_type": Name,
    "clip_sample": bool,
    "clip_sample_range": _Sigma,
    "thresholding": bool,
    "dynamic_thresholding_ratio": Share,
    "sample_max_value": _Sigma,
}

SchedulerConfig = Annotated[
    Mapping[str, Any],
    Entries(needed={"_class_name": Name}, known={name: kind | None for name, kind in OPTIONS.items()}),
]
