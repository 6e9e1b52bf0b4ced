"""The two forms in which an engine knows its task; a module of its own, as the planner, the manifest and the CLI name
them."""

from __future__ import annotations

from typing import Literal

#: ``static``: one engine a task, its routing folded into the weights. ``shared``: one engine for all tasks, which reads
#: the task of each sample.
Routing = Literal["static", "shared"]

#: What ``build --routing`` takes: ``auto`` is what the planner recommends.
RoutingChoice = Literal["auto", "static", "shared"]
