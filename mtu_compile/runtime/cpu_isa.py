"""Which instruction sets this machine's CPU has, in the words of oneDNN, which computes for OpenVINO.

What an INT8 network gives on x86 depends on them: AMX and VNNI add products of bytes in 32 bits, older CPUs in 16. A
CPU can stand in for a lesser one: oneDNN obeys the environment variable ``ONEDNN_MAX_CPU_ISA``, read once when a
process first computes, so every level is tried in a process of its own.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path

#: The variable by which a CPU is told to be a lesser one.
LIMIT = "ONEDNN_MAX_CPU_ISA"

_AVX512 = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})

#: Levels that differ in how they compute INT8 or bfloat16, lowest first, and what the CPU has to have for them, as
#: Linux and archspec call it.
LEVELS: Mapping[str, frozenset[str]] = {
    "AVX2": frozenset({"avx2", "fma"}),
    "AVX2_VNNI": frozenset({"avx2", "fma", "avx_vnni"}),
    "AVX512_CORE": _AVX512,
    "AVX512_CORE_VNNI": _AVX512 | {"avx512_vnni"},
    "AVX512_CORE_BF16": _AVX512 | {"avx512_vnni", "avx512_bf16"},
    "AVX512_CORE_AMX": _AVX512 | {"avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"},
}

#: What oneDNN has between or above these levels, and the level it computes INT8 and bfloat16 like.
_LIKE: Mapping[str, str] = {
    "AVX2_VNNI_2": "AVX2_VNNI",
    "AVX512_CORE_FP16": "AVX512_CORE_BF16",
    "AVX512_CORE_AMX_FP16": "AVX512_CORE_AMX",
}

#: Below AVX2 OpenVINO runs networks slowly or not at all, and nothing is promised.
BELOW = "below AVX2"

#: Levels that compute bfloat16 natively; others emulate it at a tenth of the speed, or refuse.
BF16: tuple[str, ...] = ("AVX512_CORE_BF16", "AVX512_CORE_AMX")


def level() -> str:
    """The level this process computes at: the CPU's, or what ``ONEDNN_MAX_CPU_ISA`` leaves of it.

    On other CPUs than x86 the architecture's name (``"aarch64"``), and ``"unknown"`` where it cannot be told.
    """
    return _limited(_level(_features(), _machine()), _features(), os.environ.get(LIMIT))


def imitable() -> tuple[str, ...]:
    """The levels this CPU has, lowest first; each can be tried with ``ONEDNN_MAX_CPU_ISA``. None where it is no x86."""
    return tuple(name for name, needed in LEVELS.items() if needed <= _features())


def up_to(most: str) -> tuple[str, ...]:
    """The levels this CPU can stand in for, ``most`` last; ``most`` alone where it is none of ``LEVELS``."""
    known = imitable()
    return known[: known.index(most) + 1] if most in known else (most,)


def native_bf16() -> bool:
    """Whether this process computes bfloat16 in bfloat16; ``True`` on CPUs that are not x86, whose runtime decides."""
    here = level()
    return here in BF16 or here not in (*LEVELS, BELOW)


def name() -> str:
    """The CPU in its vendor's words, where the system tells; else the architecture."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() == "model name":
                    return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _level(features: Collection[str], machine: str) -> str:
    if machine not in ("x86_64", "amd64"):
        return machine
    if not features:
        return "unknown"
    return next((found for found, needed in reversed(list(LEVELS.items())) if needed <= set(features)), BELOW)


def _limited(own: str, features: Collection[str], limit: str | None) -> str:
    """``own``, or what oneDNN makes of it when it is told to stay at ``limit``."""
    if own not in LEVELS or not limit or limit.upper() in ("DEFAULT", "ALL"):
        return own
    most = _LIKE.get(limit.upper(), limit.upper())
    if most not in LEVELS:
        return BELOW if limit.upper() in ("SSE41", "AVX") else own
    # A CPU may lack a level below its own: AVX-512 CPUs of 2017 to 2020 have no VNNI for 256 bits.
    names = list(LEVELS)
    upto = names[: names.index(most) + 1]
    return next((name for name in reversed(upto) if LEVELS[name] <= set(features)), BELOW)


def _machine() -> str:
    return platform.machine().lower()


@cache
def _features() -> frozenset[str]:
    """What the CPU can do, as Linux calls it; empty where nothing tells."""
    try:
        from archspec.cpu import detect
    except ImportError:
        return frozenset()
    try:
        return frozenset(detect.detected_info().features)
    except Exception:  # archspec raises whatever the system's own query does
        return frozenset()
