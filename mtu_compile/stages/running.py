"""Where the steps of a build are run, and where their results are kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from mtu_compile.core.atomic import scratch
from mtu_compile.core.progress import Progress
from mtu_compile.steps import Steps, Store
from mtu_compile.steps.limit import limit_of


@contextmanager
def running(cache: Path | None, beside: Path, progress: Progress) -> Iterator[Steps]:
    """Steps whose results are kept in ``cache``; without one, in a folder of ``beside`` that is removed afterwards.

    Args:
        beside: need not be there yet.
    """
    if cache is not None:
        with Store(cache) as store, closing(Steps(store, progress)) as steps:
            yield steps
        # at the end: what this build made is what the next one wants
        with Store(cache) as store:
            store.prune(limit_of(store.root))
        return
    while not beside.is_dir():
        beside = beside.parent
    with (
        scratch("mtu-steps", beside) as folder,
        Store(folder, temporary=True) as store,
        closing(Steps(store, progress)) as steps,
    ):
        yield steps
