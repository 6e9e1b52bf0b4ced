"""Executors by the name that ``--executor`` is given."""

from __future__ import annotations

import re
from importlib.util import find_spec

from mtu_compile.core.errors import ConfigError
from mtu_compile.steps.executors.base import Executor
from mtu_compile.steps.executors.in_process import InThisProcess

AUTO, HERE, LOCAL = "auto", "here", "local"

#: Clusters by the scheme of their address, and what package each needs.
CLUSTERS = {"dask": "distributed", "ray": "ray"}

#: Bytes of a model's weights above which its steps get processes of their own: then the seconds that starting one
#: costs are few beside what its step takes, and the memory it gives back is worth having.
LARGE = 1_000_000_000


def check_executor(name: str) -> None:
    """``ConfigError`` for a name that is none, and for a cluster whose library is not installed."""
    if name in (AUTO, HERE, LOCAL):
        return
    scheme, separator, address = name.partition("://")
    if not separator or scheme not in CLUSTERS:
        clusters = " or ".join(f"{one}://HOST:PORT" for one in CLUSTERS)
        raise ConfigError(f"there is no executor {name!r}", hint=f"say {AUTO}, {HERE}, {LOCAL}, {clusters}")
    if not re.fullmatch(r"([\w.-]+|\[[0-9a-fA-F:.]+\]):\d{1,5}", address):
        raise ConfigError(f"{name!r} has no host and port", hint=f"say {scheme}://HOST:PORT")
    if find_spec(CLUSTERS[scheme]) is None:
        raise ConfigError(f"{CLUSTERS[scheme]!r} is not installed", hint="pip install 'mtu-compile[cluster]'")


def executor_for(name: str, weights: int) -> Executor:
    """The executor called ``name``, for a model of so many bytes of weights.

    Raises:
        ConfigError: there is none of that name.
    """
    check_executor(name)
    if name == HERE or (name == AUTO and weights < LARGE):
        return InThisProcess()
    if name in (AUTO, LOCAL):
        from mtu_compile.steps.executors.in_processes import InProcesses

        return InProcesses()
    scheme, _, address = name.partition("://")
    if scheme == "dask":
        from mtu_compile.steps.executors.on_dask import OnDask

        return OnDask(address)
    from mtu_compile.steps.executors.on_ray import OnRay

    return OnRay(address)
