"""One bundle's way to one board: probe, plan, transfer, unpack, install, build, check, activate."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mtu_compile import bundle as bundles
from mtu_compile.bundle import MANIFEST, Manifest
from mtu_compile.core.amounts import readable
from mtu_compile.core.errors import DeployError
from mtu_compile.deploy import packages, transfer
from mtu_compile.deploy.connection import LinkLost, connect
from mtu_compile.deploy.inventory import Place
from mtu_compile.deploy.link import Link, agent, probe, root_of
from mtu_compile.deploy.packages import System

if TYPE_CHECKING:
    pass

#: The steps, in their order.
STEPS = ("probe", "plan", "transfer", "unpack", "install", "build", "check", "activate")


class Watch(Protocol):
    """Told of what happens on boards."""

    def begins(self, board: str, step: str, what: str = "") -> None: ...

    def ends(self, board: str, step: str, seconds: float) -> None: ...

    def tells(self, board: str, message: str) -> None: ...


class Unwatched:
    """Nobody."""

    def begins(self, board: str, step: str, what: str = "") -> None:
        """A step, or a stage of one, begins."""

    def ends(self, board: str, step: str, seconds: float) -> None:
        """A step has ended well."""

    def tells(self, board: str, message: str) -> None:
        """Something worth knowing."""


@dataclass(frozen=True)
class Options:
    """How to deploy.

    Attributes:
        activate: switch to the version, once it is proven.
        dry_run: say what would travel and be built, and change nothing.
        unsigned: take boards that were given no key.
        again: check what was checked there already.
        silence: seconds without an answer after which a link counts as cut.
        retries: how often a deployment that was cut is begun anew; it goes on where it stopped.
        kept: folder of wheels that this machine has fetched for boards.
    """

    activate: bool = False
    dry_run: bool = False
    unsigned: bool = False
    again: bool = False
    silence: float = 60.0
    retries: int = 1
    kept: Path = field(default_factory=packages.kept_in)


@dataclass(frozen=True)
class Package:
    """What is deployed: a verified bundle.

    Attributes:
        path: its folder.
        manifest: its manifest.
        text, signature: the files ``manifest.json`` and, if there is one, ``signature.json``.
    """

    path: Path
    manifest: Manifest
    text: str
    signature: str | None

    @classmethod
    def read(cls, path: Path) -> Package:
        """Verify the bundle at ``path``, every byte; ``BundleError`` if one is wrong."""
        root = path.resolve()
        manifest = bundles.read(root)
        signature = root / bundles.SIGNATURE
        return cls(
            root,
            manifest,
            (root / MANIFEST).read_text(encoding="utf-8"),
            signature.read_text(encoding="utf-8") if signature.is_file() else None,
        )


@dataclass(frozen=True)
class Outcome:
    """What became of one board.

    Attributes:
        board: its name.
        reached: the last step that ended well; empty if none did.
        version: SHA-256 of the manifest.
        active: the version that runs there now, as far as it is known.
        plan: what was to travel: ``files`` and ``bytes``, ``of_files`` and ``of_bytes`` there are; and the environment.
        sent_bytes: what travelled.
        figures: what was measured there.
        facts: what the board is.
        seconds: by step.
        error: why it ended early; the board goes on with what it had.
    """

    board: str
    reached: str = ""
    version: str | None = None
    active: str | None = None
    plan: Mapping[str, Any] | None = None
    sent_bytes: int = 0
    figures: Mapping[str, Any] | None = None
    facts: Mapping[str, Any] | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    error: BaseException | None = None


async def deploy(name: str, place: Place, package: Package, options: Options, watch: Watch | None = None) -> Outcome:
    """Take a bundle to one board. Never raises what goes wrong there: that is in the outcome."""
    watch = watch or Unwatched()
    if place.target is not None and place.target != package.manifest.target:
        return Outcome(
            name,
            error=DeployError(
                f"{name} is for {place.target}, and the bundle is for {package.manifest.target}",
                hint=f"compile with --target {place.target}, or pick other boards (--board, --label)",
            ),
        )
    for attempt in range(options.retries + 1):
        one = _Deployment(name, place, package, options, watch)
        try:
            await one.run()
            return one.outcome
        except LinkLost as error:
            if attempt == options.retries:
                return replace(one.outcome, error=error)
            watch.tells(name, f"{error.message}; again")
            await asyncio.sleep(1)
        except (Exception, asyncio.CancelledError) as error:
            return replace(one.outcome, error=error)
    raise AssertionError("the loop returns")


class _Deployment:
    """One attempt."""

    def __init__(self, name: str, place: Place, package: Package, options: Options, watch: Watch) -> None:
        self._name, self._place, self._package, self._options, self._watch = name, place, package, options, watch
        self.outcome = Outcome(name)

    async def run(self) -> None:
        async with AsyncExitStack() as stack:
            with self._step("probe"):
                connection = await stack.enter_async_context(connect(self._place, silence=self._options.silence))
                found = await probe(connection, self._place)
                system = System.of(found)
                own = await asyncio.to_thread(packages.own_wheel, self._options.kept)
                root = root_of(self._place, found["home"])
                link = await stack.enter_async_context(
                    agent(connection, self._place, root, own, silence=self._options.silence)
                )
                status = await link.request("status")
                self._note(active=status["active"], facts=status["board"])
            with self._step("plan"):
                offered, sources = await self._plan(link, system)
            if self._options.dry_run:
                return
            version, wheels = offered["version"], offered["wheels"]
            with self._step("transfer", readable(self._bytes_to_send(offered, sources))):
                sent = await transfer.send(
                    connection, link, self._place, sources, offered["missing"], offered["incoming"], lambda units: None
                )
                self._note(sent_bytes=self.outcome.sent_bytes + sent)
            await self._ask(link, "unpack", version=version)
            await self._ask(link, "install", version=version, wheels=wheels)
            await self._ask(link, "build", version=version)
            limits = {name: most for name, most in asdict(self._place.limits).items() if most is not None}
            checked = await self._ask(link, "check", version=version, again=self._options.again, limits=limits)
            self._note(figures=checked["figures"])
            if checked["reused"]:
                self._watch.tells(self._name, "was checked there already, with these packages and drivers")
            if self._options.activate:
                switched = await self._ask(link, "activate", version=version)
                self._note(active=switched["active"])

    async def _plan(self, link: Link, system: System) -> tuple[dict[str, Any], dict[str, Path]]:
        """What the agent says of the bundle, and every file that may have to travel, by SHA-256."""
        package = self._package
        files = await asyncio.to_thread(packages.carried, package.path, package.manifest, system)
        if files is None:
            files = await asyncio.to_thread(packages.fetched, package.manifest, system, self._options.kept)
        wheels = await asyncio.to_thread(packages.hashes, files)
        sources = {sha256: package.path / name for name, sha256 in package.manifest.files.items()}
        sources |= {sha256: files[name] for name, sha256 in wheels.items()}
        sizes = {sha256: path.stat().st_size for sha256, path in sources.items()}
        offered: dict[str, Any] = await link.request(
            "offer",
            manifest=package.text,
            signature=package.signature,
            sizes=sizes,
            wheels=wheels,
            unsigned=self._options.unsigned,
            dry_run=self._options.dry_run,
            wait=self._options.silence * 1.5 if self._options.retries else 0,
        )
        missing = offered["missing"]
        plan = {
            "files": len(missing),
            "of_files": len(sizes),
            "bytes": self._bytes_to_send(offered, sources),
            "of_bytes": sum(sizes.values()),
            "names": sorted({sources[one].name for one in missing}),
            "environment": "there" if offered["environment_there"] else f"{len(wheels)} packages to unpack",
            "build": sorted({ref.path for _, ref in package.manifest.engines() if ref.kind in _built_there()}),
            "system": str(system),
        }
        self._note(version=offered["version"], plan=plan)
        return {**offered, "wheels": wheels}, sources

    @staticmethod
    def _bytes_to_send(offered: Mapping[str, Any], sources: Mapping[str, Path]) -> int:
        return sum(max(0, sources[one].stat().st_size - got) for one, got in offered["missing"].items())

    async def _ask(self, link: Link, step: str, **arguments: Any) -> Any:
        with self._step(step):
            return await link.request(step, lambda title: self._watch.begins(self._name, step, title), **arguments)

    @contextmanager
    def _step(self, step: str, what: str = "") -> Iterator[None]:
        self._watch.begins(self._name, step, what)
        began = time.monotonic()
        yield
        seconds = time.monotonic() - began
        self._note(reached=step, seconds={**self.outcome.seconds, step: round(seconds, 3)})
        self._watch.ends(self._name, step, seconds)

    def _note(self, **changes: Any) -> None:
        self.outcome = replace(self.outcome, **changes)


def _built_there() -> frozenset[str]:
    from mtu_compile.core import vendors

    return frozenset(vendors.builders())


__all__ = ["STEPS", "Options", "Outcome", "Package", "Unwatched", "Watch", "deploy"]
