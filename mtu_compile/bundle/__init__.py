"""The bundle: a folder with engines, tokenizer, references and a manifest that vouches for every byte of it."""

from mtu_compile.bundle.atomic import staging
from mtu_compile.bundle.files import read, resolve, verify_files, write
from mtu_compile.bundle.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    EngineRef,
    Manifest,
    PassRecord,
    Source,
    TaskEntry,
    TextPart,
)

__all__ = [
    "MANIFEST",
    "SCHEMA_VERSION",
    "EngineRef",
    "Manifest",
    "PassRecord",
    "Source",
    "TaskEntry",
    "TextPart",
    "read",
    "resolve",
    "staging",
    "verify_files",
    "write",
]
