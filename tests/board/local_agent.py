"""An agent on this machine, spoken to over its pipes: what a host does over SSH, without the SSH."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtu_compile.bundle import MANIFEST, SIGNATURE, read
from mtu_compile.core.hashing import file_sha256
from mtu_compile.stages import wheels

REPOSITORY = Path(__file__).parents[2]


class Died(Exception):
    """The agent ended without an answer."""


class Refused(Exception):
    """The agent answered with an error: its kind and message."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        super().__init__(f"{body['kind']}: {body['message']}")
        self.kind = body["kind"]


class LocalAgent:
    """``with LocalAgent(root) as agent: agent.ask("status")``."""

    def __init__(self, root: Path, *, silence: float = 60, environment: Mapping[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "mtu_compile.board.agent", "--root", str(root), "--silence", str(silence)]
        path = os.pathsep.join([*(environment or {}).get("PYTHONPATH", "").split(os.pathsep), str(REPOSITORY)])
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {}), "PYTHONPATH": path.strip(os.pathsep)},
        )
        self.stages: list[str] = []

    def __enter__(self) -> LocalAgent:
        self.hello = self._answer()
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.wait(20)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
        except OSError as error:
            raise Died(do) from error
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            said = json.loads(line)
            if "stage" in said:
                self.stages.append(said["stage"])
            elif "error" in said:
                raise Refused(said["error"])
            else:
                answer: dict[str, Any] = said["ok"]
                return answer
        raise Died("no answer")


class Delivery:
    """A bundle and the packages it runs with here: our own wheel, as this Python has all others."""

    def __init__(self, bundle: Path, own: Path) -> None:
        self.bundle, manifest = bundle, read(bundle)
        wheel = wheels.write_wheel(own)
        self.wheels = {wheel.name: file_sha256(wheel)}
        self.sources = {sha256: bundle / name for name, sha256 in manifest.files.items()}
        self.sources[self.wheels[wheel.name]] = wheel

    def offer(self, agent: LocalAgent, *, unsigned: bool = True, **more: Any) -> dict[str, Any]:
        signature = self.bundle / SIGNATURE
        return agent.ask(
            "offer",
            manifest=(self.bundle / MANIFEST).read_text(),
            signature=signature.read_text() if signature.is_file() else None,
            sizes={sha256: path.stat().st_size for sha256, path in self.sources.items()},
            wheels=self.wheels,
            unsigned=unsigned,
            **more,
        )

    def send(self, agent: LocalAgent, offered: Mapping[str, Any]) -> None:
        for sha256, arrived in offered["missing"].items():
            content = self.sources[sha256].read_bytes()
            path = Path(offered["incoming"]) / sha256
            with path.open("r+b" if arrived else "wb") as file:
                file.seek(arrived)
                file.write(content[arrived:])
            agent.ask("accept", sha256=sha256)

    def deploy(self, agent: LocalAgent, *, until: str = "activate", unsigned: bool = True, **more: Any) -> str:
        """Every step up to ``until``; the version."""
        offered = self.offer(agent, unsigned=unsigned)
        version = str(offered["version"])
        self.send(agent, offered)
        for step in ("unpack", "install", "build", "check", "activate"):
            agent.ask(step, version=version, **({"wheels": self.wheels} if step == "install" else {}))
            if step == until:
                break
        return version
