"""What a bundle will need on its device, and what to say when that is too much."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mtu_compile.core.amounts import readable
from mtu_compile.core.errors import BuildError, ConfigError
from mtu_compile.planner.host import HostPlan
from targets.base import Precision
from targets.costs.estimate import Footprint

#: Said wherever the figures are shown.
METHOD = (
    "estimated from the shapes of the graphs: fused attention, elementwise operations in place; engines add padding, "
    "scratch space and code"
)


@dataclass(frozen=True)
class NetworkPlan:
    """One engine of the bundle.

    Attributes:
        name: the task, or the part of the pipeline.
        is_task: whether it is a task's UNet.
        precision: what it will be built in.
        memory: what it takes.
    """

    name: str
    is_task: bool
    precision: Precision
    memory: Footprint

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": "task" if self.is_task else "part",
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
        networks: every engine, tasks first.
        workspace_bytes: scratch space the target's builder and engines may take, once for all of them: one runs at a
            time.
        reserved_bytes: what the system and the driver keep of the device's memory.
        device_bytes: memory of the device, or ``None`` if that is unknown until it is at hand.
        one_engine_bytes: what parts and workspace would need beside a single engine that holds all tasks, or ``None``
            if no dynamic graph was given. Nothing builds that engine; it says what sharing weights would be worth.
        suggestions: what would make it fit, or if nothing does, what comes closest; empty where it fits.
        least_bytes: what the device has at least, where it shares the memory of a machine that is not known.
        host: what the build itself needs of the machine it runs on; ``None`` if nobody asked.
    """

    target: str
    precision: Precision
    networks: tuple[NetworkPlan, ...]
    workspace_bytes: int
    reserved_bytes: int
    device_bytes: int | None
    one_engine_bytes: int | None = None
    suggestions: tuple[Suggestion, ...] = ()
    least_bytes: int | None = None
    host: HostPlan | None = None

    @property
    def available_bytes(self) -> int | None:
        """The device's memory without what is reserved; ``None`` if unknown."""
        return None if self.device_bytes is None else max(0, self.device_bytes - self.reserved_bytes)

    @property
    def together_bytes(self) -> int:
        """All tasks and parts resident, and the workspace."""
        return sum(one.memory.total_bytes for one in self.networks) + self.workspace_bytes

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks."""
        return tuple(one.name for one in self.networks if one.is_task)

    def alone_bytes(self, task: str) -> int:
        """``task`` resident with the parts, and the workspace."""
        others = sum(one.memory.total_bytes for one in self.networks if one.is_task and one.name != task)
        return self.together_bytes - others

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
        if self.alone_bytes(task) > available or len(self.tasks) == 1:
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
        if self.one_engine_bytes is not None and len(self.tasks) > 1:
            text += f". One engine for all tasks would take {readable(self.one_engine_bytes)}; build makes one for each"
        return text

    def rows(self) -> tuple[tuple[str, ...], ...]:
        """The plan as a table, see ``COLUMNS``."""
        lines = [
            (
                one.name,
                one.precision,
                readable(one.memory.weights_bytes),
                readable(one.memory.activation_bytes),
                readable(self.alone_bytes(one.name) if one.is_task else one.memory.total_bytes),
                self._verdict(self.alone_bytes(one.name)) if one.is_task else "",
            )
            for one in self.networks
        ]
        weights = sum(one.memory.weights_bytes for one in self.networks)
        activations = sum(one.memory.activation_bytes for one in self.networks)
        verdict = self._verdict(self.together_bytes)
        lines.append(
            (
                "together",
                self.precision,
                readable(weights),
                readable(activations),
                readable(self.together_bytes),
                verdict,
            )
        )
        if self.one_engine_bytes is not None and len(self.tasks) > 1:
            lines.append(("(one engine for all)", self.precision, "", "", readable(self.one_engine_bytes), "not built"))
        return tuple(lines)

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
            "one_engine_bytes": self.one_engine_bytes,
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
        chosen = [one.memory for one in self.networks if task in (None, one.name) or not one.is_task]
        weights, activations = sum(m.weights_bytes for m in chosen), sum(m.activation_bytes for m in chosen)
        parts = [f"weights {readable(weights)}", f"activations {readable(activations)}"]
        return ", ".join([*parts, *([f"workspace {readable(self.workspace_bytes)}"] if self.workspace_bytes else [])])


#: Columns of ``BuildPlan.rows``; a task's total is with the parts and the workspace.
COLUMNS = ("network", "precision", "weights", "activations", "needs", "device")
