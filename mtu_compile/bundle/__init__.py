"""The bundle: a folder with engines, tokenizer, references and a manifest that vouches for every byte of it."""

from functools import partial

from mtu_compile.bundle.encode import encode
from mtu_compile.bundle.engine import EngineRef, EngineState, Estimate
from mtu_compile.bundle.files import read, resolve, verify_files, write
from mtu_compile.bundle.manifest import (
    BUILT,
    MANIFEST,
    SCHEMA_VERSION,
    SIGNATURE,
    InstructionSetProof,
    Manifest,
    PassRecord,
    Source,
    TaskEntry,
    TextPart,
    UserPassRecord,
)
from mtu_compile.bundle.provenance import BuildProvenance, TaskProvenance
from mtu_compile.bundle.step_cache import StepCache, StepCacheRecord, TriedSchedule
from mtu_compile.core import atomic

#: ``core.atomic.staging`` that replaces nothing but a bundle (or an empty folder).
staging = partial(atomic.staging, marker=MANIFEST)
#: ``core.atomic.check_free`` of a place for a bundle.
check_free = partial(atomic.check_free, marker=MANIFEST)

__all__ = [
    "BUILT",
    "MANIFEST",
    "SCHEMA_VERSION",
    "SIGNATURE",
    "BuildProvenance",
    "EngineRef",
    "EngineState",
    "Estimate",
    "InstructionSetProof",
    "Manifest",
    "PassRecord",
    "Source",
    "StepCache",
    "StepCacheRecord",
    "TaskEntry",
    "TaskProvenance",
    "TextPart",
    "TriedSchedule",
    "UserPassRecord",
    "check_free",
    "encode",
    "read",
    "resolve",
    "staging",
    "verify_files",
    "write",
]
