"""Making one result, in whatever process: all that an executor is given, and what it has to call."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from mtu_compile.core.progress import Progress
from mtu_compile.steps.entry import Entry, write_entry
from mtu_compile.steps.step import Step, Work
from mtu_compile.steps.store import Store
from mtu_compile.steps.value import to_json


@dataclass(frozen=True)
class Job:
    """A result that is to be made.

    Attributes:
        store: folder of the store.
        name: of the entry.
        title: for people.
        place: module and name of the step.
        given: its arguments.
        made_of: what ``name`` has the hash of.
        build: ``Store.build`` of whoever asks for it.
    """

    store: Path
    name: str
    title: str
    place: tuple[str, str]
    given: Mapping[str, Any]
    made_of: Mapping[str, Any]
    build: str


def step_of(job: Job) -> Step[Any, Any]:
    """What ``job`` is a call of."""
    module, name = job.place
    found: Step[Any, Any] = getattr(import_module(module), name)
    return found


def perform(job: Job, progress: Progress) -> bool:
    """Make the result of ``job``, unless somebody else has made it meanwhile; whether it was made here."""
    with Store(job.store) as store:
        return perform_in(store, job, progress)


def perform_in(store: Store, job: Job, progress: Progress) -> bool:
    """``perform`` in a store that is open."""

    def waiting() -> None:
        progress.tell(f"{job.title}: another build is making this; waiting for it")

    with store.making(job.name, waiting) as place:
        if isinstance(place, Entry):
            return False
        function = step_of(job).function
        began = time.monotonic()
        value = function(Work(place, progress), **job.given)
        seconds = time.monotonic() - began
        write_entry(
            place,
            title=job.title,
            made_of=job.made_of,
            value=to_json(value, place),
            seconds=seconds,
            build=job.build,
        )
        return True
