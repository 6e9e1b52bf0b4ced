"""What a bundle will need on its device, and what to say when that is too much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from mtu_compile.core.amounts import readable
from mtu_compile.core.errors import BuildError, ConfigError
from mtu_compile.core.routing import Routing
from mtu_compile.planner.host import HostPlan
from mtu_compile.planner.routing import Recommendation
from targets.base import Precision
from targets.costs.estimate import Footprint

#: Said wherever the figures are shown.
METHOD = (
    "estimated from the shapes of the graphs: fused attention, elementwise operations in place; engines add padding, "
    "scratch space and code"
)

#: Name of the engine that serves every task.
ALL_TASKS = "all tasks"


@dataclass(frozen=True)
class NetworkPlan:
    """One engine of the bundle.

    Attributes:
        name: the task, the part of the pipeline, or ``ALL_TASKS``.
        kind: a task's own UNet, a part of the pipeline, or the UNet of all tasks.
        precision: what it will be built in.
        memory: what it takes.
    """

    name: str
    kind: Literal["task", "part", "shared"]
    precision: Precision
    memory: Footprint

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "precision": self.precision,
            "weights_bytes": self.memory.weights_bytes,
            "activation_bytes": self.memory.activation_bytes,
            "attention_scores_bytes": self.memory.scores_bytes,
            "unknown_shapes": self.memory.unknown_shapes,
        }


@dataclass(frozen=True)
class Suggestion:
    """Other options of ``mtu-compile build``, and the memory a bundle built with them needs.

    Attributes:
        options: as they are typed (``"--int8 --task t2i"``).
        needs_bytes: parts, tasks and workspace together.
        fits: whether the device has that much.
    """

    options: str
    needs_bytes: int
    fits: bool

    def __str__(self) -> str:
        return f"{self.options} ({readable(self.needs_bytes)})"


@dataclass(frozen=True)
class BuildPlan:
    """Memory a bundle needs on its device. Every figure but the device's is an estimate.

    Attributes:
        target: name of the target.
        precision: what the UNets will be built in.
        networks: the engines of a bundle with one for each task, tasks first.
        workspace_bytes: scratch space the target's builder and engines may take, once for all of them: one runs at a
            time.
        reserved_bytes: what the system and the driver keep of the device's memory.
        device_bytes: memory of the device, or ``None`` if that is unknown until it is at hand.
        shared: one engine for all tasks in the place of theirs; ``None`` where the UNet has no task input.
        routing: the form that is planned: what ``fits`` and ``require`` are about.
        recommendation: the form that suits the device, and why.
        suggestions: what would make it fit, or if nothing does, what comes closest; empty where it fits.
        least_bytes: what the device has at least, where it shares the memory of a machine that is not known.
        host: what the build itself needs of the machine it runs on; ``None`` if nobody asked.
        disk: by form of routing, bytes of the UNets' graphs, weights that several have in common counted once; what is
            built from them in advance (blobs, engines) comes on top, with weights of its own.
    """

    target: str
    precision: Precision
    networks: tuple[NetworkPlan, ...]
    workspace_bytes: int
    reserved_bytes: int
    device_bytes: int | None
    shared: NetworkPlan | None = None
    routing: Routing = "static"
    recommendation: Recommendation | None = None
    suggestions: tuple[Suggestion, ...] = ()
    least_bytes: int | None = None
    host: HostPlan | None = None
    disk: Mapping[Routing, int] = field(default_factory=dict)

    @property
    def available_bytes(self) -> int | None:
        """The device's memory without what is reserved; ``None`` if unknown."""
        return None if self.device_bytes is None else max(0, self.device_bytes - self.reserved_bytes)

    def engines(self, routing: Routing) -> tuple[NetworkPlan, ...]:
        """Every engine of a bundle in one form of routing, UNets first."""
        if routing == "static" or self.shared is None:
            return self.networks
        return (self.shared, *(one for one in self.networks if one.kind == "part"))

    @property
    def static_bytes(self) -> int:
        """An engine for each task, the parts and the workspace, all resident."""
        return self._resident("static")

    @property
    def shared_bytes(self) -> int | None:
        """One engine for all tasks, the parts and the workspace; ``None`` where there is no such engine."""
        return None if self.shared is None else self._resident("shared")

    @property
    def together_bytes(self) -> int:
        """What is planned, all of it resident."""
        return self._resident(self.routing)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks."""
        return tuple(one.name for one in self.networks if one.kind == "task")

    def alone_bytes(self, task: str) -> int:
        """The engine of ``task`` alone with the parts and the workspace, as it is planned."""
        if self.routing == "shared":
            return self.together_bytes
        others = sum(one.memory.total_bytes for one in self.networks if one.kind == "task" and one.name != task)
        return self.static_bytes - others

    def _resident(self, routing: Routing) -> int:
        return sum(one.memory.total_bytes for one in self.engines(routing)) + self.workspace_bytes

    @property
    def fits(self) -> bool | None:
        """Whether everything is resident at once within the memory available; ``None`` if that is unknown.

        What fits the smallest machines with the device fits the one nobody named.
        """
        if self.available_bytes is not None:
            return self.together_bytes <= self.available_bytes
        return True if self.least_bytes is not None and self.together_bytes <= self.least_bytes else None

    def require(self) -> None:
        """Raises unless it fits, as far as that is known.

        Raises:
            BuildError: it does not fit; says by how much, and what would.
            ConfigError: whether it fits depends on a machine that is not known.
        """
        available = self.available_bytes
        if available is None and self.least_bytes is not None and not self.fits:
            raise ConfigError(
                f"this needs {readable(self.together_bytes)}, and {self.target} shares its machine's memory, of which "
                f"the smallest give it {readable(self.least_bytes)}: how much has yours?",
                hint="say what the machine has, as --memory 32GB",
            )
        if available is None or self.fits:
            return
        task = max(self.tasks, key=self.alone_bytes)
        if self.routing == "shared":
            who = f"one engine for all tasks ({', '.join(self.tasks)}) in {self.precision} needs"
            needs, parted = self.together_bytes, self._parted(None)
        elif self.alone_bytes(task) > available or len(self.tasks) == 1:
            who, needs, parted = f"task {task!r} in {self.precision} needs", self.alone_bytes(task), self._parted(task)
        else:
            who = f"the {len(self.tasks)} tasks ({', '.join(self.tasks)}) in {self.precision} together need"
            needs, parted = self.together_bytes, self._parted(None)
        raise BuildError(
            f"{who} {readable(needs)}, {readable(needs - available)} more than the {readable(available)} there are on "
            f"{self.target} (estimate: {parted})",
            hint=self.hint(),
        )

    def hint(self) -> str:
        """What would make it fit, in one line; empty where it fits."""
        if not self.suggestions:
            return ""
        fitting = [str(one) for one in self.suggestions if one.fits]
        text = f"what fits: {', or '.join(fitting)}"
        if not fitting:
            closest = min(self.suggestions, key=lambda one: one.needs_bytes)
            text = f"no option of build makes it fit; the closest is {closest}"
        return text

    def rows(self) -> tuple[tuple[str, ...], ...]:
        """The plan as a table, see ``COLUMNS``: every engine, and all there is in memory in both forms of routing."""
        parts = [one for one in self.networks if one.kind == "part"]
        beside = sum(one.memory.total_bytes for one in parts) + self.workspace_bytes
        unets = [one for one in self.networks if one.kind == "task"]
        if self.shared is not None and len(unets) > 1:
            unets.append(self.shared)
        lines = [self._row(one.name, (one,), one.memory.total_bytes + beside) for one in unets]
        lines += [(*self._row(one.name, (one,), one.memory.total_bytes)[:-1], "") for one in parts]
        if len(self.tasks) == 1:
            return (*lines, self._row("together", self.engines(self.routing), self.together_bytes))
        lines.append(self._row(_STATIC, self.engines("static"), self.static_bytes))
        if self.shared_bytes is not None:
            lines.append(self._row(_SHARED, self.engines("shared"), self.shared_bytes))
        return tuple(lines)

    def _row(self, name: str, engines: tuple[NetworkPlan, ...], needs: int) -> tuple[str, ...]:
        return (
            name,
            engines[0].precision,
            readable(sum(one.memory.weights_bytes for one in engines)),
            readable(sum(one.memory.activation_bytes for one in engines)),
            readable(needs),
            self._verdict(needs),
        )

    def routing_in_words(self) -> str:
        """Which form is planned, which is recommended, and why; one line."""
        if self.recommendation is None:
            return f"--routing {self.routing}"
        if self.routing == self.recommendation.routing:
            return f"--routing {self.routing}: {self.recommendation.reason}"
        asked = f"--routing {self.routing}, as asked for"
        return f"{asked}; recommended is {self.recommendation.routing}: {self.recommendation.reason}"

    def disk_in_words(self) -> str:
        """What the UNets' graphs take on disk in both forms; empty where there is one task, or one form alone."""
        if len(self.tasks) < 2 or "shared" not in self.disk:
            return ""
        static, shared = readable(self.disk["static"]), readable(self.disk["shared"])
        return f"graphs on disk: {static} static, what tasks have in common stored once; {shared} shared"

    def to_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "precision": self.precision,
            "method": METHOD,
            "networks": [one.to_json() for one in self.networks],
            "workspace_bytes": self.workspace_bytes,
            "reserved_bytes": self.reserved_bytes,
            "device_bytes": self.device_bytes,
            "available_bytes": self.available_bytes,
            "least_bytes": self.least_bytes,
            "tasks": {task: self.alone_bytes(task) for task in self.tasks},
            "together_bytes": self.together_bytes,
            "shared": None if self.shared is None else self.shared.to_json(),
            "static_bytes": self.static_bytes,
            "shared_bytes": self.shared_bytes,
            "disk_bytes": dict(self.disk),
            "routing": self.routing,
            "recommendation": None if self.recommendation is None else asdict(self.recommendation),
            "fits": self.fits,
            "build": None if self.host is None else self.host.to_json(),
            "suggestions": [
                {"options": one.options, "needs_bytes": one.needs_bytes, "fits": one.fits} for one in self.suggestions
            ],
        }

    def _verdict(self, needs: int) -> str:
        if self.available_bytes is None:
            if self.least_bytes is None:
                return "unknown: say --memory"
            return "fits the smallest" if needs <= self.least_bytes else "depends: say --memory"
        left = self.available_bytes - needs
        return f"fits, {readable(left)} left" if left >= 0 else f"{readable(-left)} too much"

    def _parted(self, task: str | None) -> str:
        engines = self.engines(self.routing)
        chosen = [one.memory for one in engines if task in (None, one.name) or one.kind == "part"]
        weights, activations = sum(m.weights_bytes for m in chosen), sum(m.activation_bytes for m in chosen)
        parts = [f"weights {readable(weights)}", f"activations {readable(activations)}"]
        return ", ".join([*parts, *([f"workspace {readable(self.workspace_bytes)}"] if self.workspace_bytes else [])])


#: What the last rows of ``BuildPlan.rows`` are called.
_STATIC, _SHARED = "static: an engine a task", "shared: one engine for all"

#: Columns of ``BuildPlan.rows``; a UNet's need is with the parts and the workspace.
COLUMNS = ("network", "precision", "weights", "activations", "needs", "device")
