"""What is done on boards beside deployments: ask, roll back, prune, hand over keys."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtu_compile.core.errors import EXIT_OK, EXIT_OTHER, MtuError
from mtu_compile.deploy import packages
from mtu_compile.deploy.connection import connect
from mtu_compile.deploy.inventory import Inventory, Place
from mtu_compile.deploy.link import agent, probe, root_of


@dataclass(frozen=True)
class Answer:
    """What a board said; either of the two is ``None``."""

    result: Mapping[str, Any] | None
    error: BaseException | None = None


def exit_code(answers: Mapping[str, Answer]) -> int:
    """That of the first board that failed."""
    errors = [answer.error for answer in answers.values() if answer.error is not None]
    if not errors:
        return EXIT_OK
    return errors[0].exit_code if isinstance(errors[0], MtuError) else EXIT_OTHER


async def ask(
    inventory: Inventory, step: str, *, silence: float, kept: Path | None = None, **arguments: Any
) -> dict[str, Answer]:
    """Have every board's agent do one step (``mtu_compile.board.steps.Steps``); never raises what goes wrong there."""
    turn = asyncio.Semaphore(inventory.parallel)
    own = packages.own_wheel(kept or packages.kept_in())

    async def of(place: Place) -> Answer:
        async with turn:
            try:
                async with connect(place, silence=silence) as connection:
                    found = await probe(connection, place)
                    root = root_of(place, found["home"])
                    async with agent(connection, place, root, own, silence=silence) as link:
                        return Answer(await link.request(step, **arguments))
            except Exception as error:
                return Answer(None, error)

    answers = await asyncio.gather(*(of(place) for place in inventory.boards.values()))
    return dict(zip(inventory.boards, answers, strict=True))


async def systems(inventory: Inventory, *, silence: float) -> dict[str, packages.System | BaseException]:
    """What decides which wheels fit each board."""

    async def of(place: Place) -> packages.System | BaseException:
        try:
            async with connect(place, silence=silence) as connection:
                return packages.System.of(await probe(connection, place))
        except Exception as error:
            return error

    found = await asyncio.gather(*(of(place) for place in inventory.boards.values()))
    return dict(zip(inventory.boards, found, strict=True))
