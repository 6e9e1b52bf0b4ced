"""Executors by the name that ``--executor`` is given."""

from __future__ import annotations

from mtu_compile.core.errors import ConfigError
from mtu_compile.steps.executors.base import Executor
from mtu_compile.steps.executors.in_process import InThisProcess

AUTO, HERE, LOCAL = "auto", "here", "local"

#: Bytes of a model's weights above which its steps get processes of their own: then the seconds that starting one
#: costs are few beside what its step takes, and the memory it gives back is worth having.
LARGE = 1_000_000_000


def check_executor(name: str) -> None:
    """``ConfigError`` for a name that is none."""
    if name in (AUTO, HERE, LOCAL):
        return
    raise ConfigError(f"there is no executor {name!r}", hint=f"say {AUTO}, {HERE} or {LOCAL}")


def executor_for(name: str, weights: int) -> Executor:
    """The executor called ``name``, for a model of so many bytes of weights.

    Raises:
        ConfigError: there is none of that name.
    """
    check_executor(name)
    if name == HERE or (name == AUTO and weights < LARGE):
        return InThisProcess()
    from mtu_compile.steps.executors.in_processes import InProcesses

    return InProcesses()
