"""Graph passes over ONNX: from the exported multi-task UNet to the static graph of one task."""

from passes.base import Alignment, Pass, PassContext, PassResult, Skipped
from passes.pipeline import run_passes, run_pipeline, specialise
from passes.registry import SHARED_PIPELINE, STATIC_PIPELINE, TASK_PIPELINE, Registry, builtin
from passes.simulate_half import write_simulation
from passes.user import UserPass, load_passes, mtu_pass, run_user_pass

__all__ = [
    "SHARED_PIPELINE",
    "STATIC_PIPELINE",
    "TASK_PIPELINE",
    "Alignment",
    "Pass",
    "PassContext",
    "PassResult",
    "Registry",
    "Skipped",
    "UserPass",
    "builtin",
    "load_passes",
    "mtu_pass",
    "run_passes",
    "run_pipeline",
    "run_user_pass",
    "specialise",
    "write_simulation",
]
