"""Many boards: the canary alone first, then the others a few at a time, and no further one after a failure."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from mtu_compile.core.errors import EXIT_OK, EXIT_OTHER, MtuError
from mtu_compile.deploy.deployment import Outcome
from mtu_compile.deploy.inventory import Inventory, Place

#: Takes a board's name and place to what became of it.
One = Callable[[str, Place], Awaitable[Outcome]]


@dataclass(frozen=True)
class FleetResult:
    """What became of every board.

    Attributes:
        outcomes: by name, in the inventory's order; ``None`` where a failure elsewhere came first.
        first_failure: name of the board that failed first.
    """

    outcomes: Mapping[str, Outcome | None]
    first_failure: str | None = None

    @property
    def exit_code(self) -> int:
        """That of the first failure."""
        if self.first_failure is None:
            return EXIT_OK
        outcome = self.outcomes[self.first_failure]
        error = None if outcome is None else outcome.error
        return error.exit_code if isinstance(error, MtuError) else EXIT_OTHER


async def run(inventory: Inventory, one: One, *, keep_going: bool = False) -> FleetResult:
    """Deploy to every board of an inventory.

    Boards that are being deployed to when another fails are not interrupted: each ends as it would have.

    Args:
        inventory: with its canary and limit.
        one: deploys to a board; never raises.
        keep_going: do not stop at a failure, except the canary's.
    """
    outcomes: dict[str, Outcome | None] = dict.fromkeys(inventory.boards)
    failures: list[str] = []

    async def of(name: str) -> None:
        outcomes[name] = outcome = await one(name, inventory.boards[name])
        if outcome.error is not None:
            failures.append(name)

    if inventory.canary is not None:
        await of(inventory.canary)
        if failures:
            return FleetResult(outcomes, failures[0])
    turn = asyncio.Semaphore(inventory.parallel)

    async def in_turn(name: str) -> None:
        async with turn:
            if keep_going or not failures:
                await of(name)

    await asyncio.gather(*(in_turn(name) for name in inventory.boards if name != inventory.canary))
    return FleetResult(outcomes, failures[0] if failures else None)
