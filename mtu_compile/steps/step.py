"""What a step is: a function of a module that is given plain values, and writes the files of its result to a folder."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, get_type_hints

from mtu_compile.core.progress import Progress

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Work:
    """Where a step is run.

    Attributes:
        folder: empty; all that is left in it is kept, so what only the step itself needs has to be removed.
        progress: told how far it is.
    """

    folder: Path
    progress: Progress = field(default_factory=Progress)


class Step(Generic[P, R]):
    """A pure function of what it is given, whose result is kept.

    What it returns is built of dataclasses, mappings with names, tuples, numbers, texts, and paths of files in its
    folder, as its annotation says.

    Attributes:
        name: of the function; part of the names of what is kept.
        tools: distributions whose version the result depends on.
        cpu: whether the result depends on the CPU: sums in another order, times, instruction sets.
        one_core: whether it keeps no more than one core busy, and needs little memory of its own, so that several may
            run at the same time.
    """

    def __init__(
        self,
        function: Callable[Concatenate[Work, P], R],
        tools: tuple[str, ...] = (),
        cpu: bool = False,
        one_core: bool = False,
    ) -> None:
        self.function, self.tools, self.cpu, self.one_core = function, tools, cpu, one_core
        self.name = function.__name__
        self.signature = inspect.signature(function)

    def of(self, title: str, /, *args: P.args, **kwargs: P.kwargs) -> Call[R]:
        """This step with what it is given; ``title`` is for people ("calibrate t2i")."""
        bound = self.signature.bind(None, *args, **kwargs)
        bound.apply_defaults()
        return Call(title, self, dict(list(bound.arguments.items())[1:]))

    @property
    def place(self) -> tuple[str, str]:
        """Module and name, by which another process finds it."""
        return self.function.__module__, self.name

    @cached_property
    def returns(self) -> Any:
        """Type of the result."""
        return get_type_hints(self.function, include_extras=True)["return"]


def step(
    *, tools: tuple[str, ...] = (), cpu: bool = False, one_core: bool = False
) -> Callable[[Callable[Concatenate[Work, P], R]], Step[P, R]]:
    """Declare a function of a module to be a step; its first parameter is a ``Work``, the others are what it is of."""

    def declare(function: Callable[Concatenate[Work, P], R]) -> Step[P, R]:
        return Step(function, tools, cpu, one_core)

    return declare


@dataclass(frozen=True)
class Call(Generic[R]):
    """A step and what it is given.

    Attributes:
        title: for people.
        step: what to run.
        given: its arguments by name.
    """

    title: str
    step: Step[Any, R]
    given: Mapping[str, Any]
