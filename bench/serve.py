"""Load on ``mtu-compile serve``: many clients for minutes, thousands of bad requests; writes build/bench/serve.json.

    python -m bench.serve BUNDLE [--clients 50] [--minutes 10] [--bad 10000]

Clients ask for all tasks in turn, by OpenAI's endpoints and the tasks' own, and wait as ``Retry-After`` says where they
are refused. One of ten goes away before it has its answer. Fails (exit 1) if the server ends, if a request is neither
answered nor refused, if a bad one is answered well, or if resident memory grows by more than 2 %.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

import httpx
import psutil
from PIL import Image

from bench.bad_requests import Bad, BadRequests, send
from bench.timing import RESULTS

_UPLOAD_MB = 2.0
#: Share of growth that is none.
_FLAT = 0.02
#: Seconds of a tick of half a second, beyond which somebody has stopped the processes.
_LONGEST_TICK = 5.0
#: Answers that refuse a bad request. 404 and 405 are for paths that are not there, 421 for hosts.
_REFUSALS = frozenset((400, 401, 403, 404, 405, 408, 411, 413, 415, 421, 422, 431))


@dataclass
class Load:
    """What was seen.

    Attributes:
        seconds: of every request that was answered with a picture, as its client had it.
        ends: how requests ended, by status or "gone".
        memory: resident bytes by active seconds.
        active, stopped: seconds in which the processes ran, and in which the machine did not let them.
    """

    seconds: list[float] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)
    memory: list[tuple[float, int]] = field(default_factory=list)
    active: float = 0.0
    stopped: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--warm-up", type=float, default=1, help="minutes of the same load before anything is measured")
    parser.add_argument("--bad", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--queue", type=int, default=32)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        token = Path(folder) / "token"
        command = [sys.executable, "-m", "mtu_compile", "serve", str(given.bundle), "--port", "0"]
        command += ["--token-file", str(token), "--upload-mb", str(_UPLOAD_MB), "--queue", str(given.queue)]
        command += ["--timeout", "3600"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            address = server.stdout.readline().strip().rstrip("/")
            try:
                results = _measure(given, server, address, token.read_text().strip())
            finally:
                server.terminate()
                code = server.wait(60)
    results["exit_code"] = code
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "serve.json").write_text(json.dumps(results, indent=2))
    print(json.dumps({key: value for key, value in results.items() if key != "memory"}, indent=2))
    sys.exit(1 if results["problems"] or code else 0)


def _measure(given: Any, server: subprocess.Popen[str], address: str, token: str) -> dict[str, Any]:
    process = psutil.Process(server.pid)
    _wait_ready(address)
    problems: list[str] = []
    load = Load()
    _send_bad(address, token, min(given.bad, 1000), seed=1)
    asyncio.run(_load(address, token, given, given.warm_up * 60, Load(), process))
    asyncio.run(_load(address, token, given, given.minutes * 60, load, process))
    time.sleep(2)
    quiet = process.memory_info().rss
    bad_ends, bad_problems = _send_bad(address, token, given.bad)
    problems += bad_problems
    time.sleep(2)
    after_bad = process.memory_info().rss
    if server.poll() is not None:
        problems.append("the server ended")
    first, last = _thirds(load.memory)
    if last > first * (1 + _FLAT):
        problems.append(f"resident memory grew from {first / 1e6:.1f} to {last / 1e6:.1f} MB under load")
    if after_bad > quiet * (1 + _FLAT):
        problems.append(f"resident memory grew from {quiet / 1e6:.1f} to {after_bad / 1e6:.1f} MB by bad requests")
    odd = {end: count for end, count in load.ends.items() if end not in ("200", "429", "gone")}
    if odd:
        problems.append(f"clients were answered with {odd}")
    cuts = quantiles(load.seconds, n=20) if len(load.seconds) > 20 else [0.0] * 19
    return {
        "clients": given.clients,
        "minutes": given.minutes,
        "stopped_s": round(load.stopped, 1),
        "steps": given.steps,
        "pictures": len(load.seconds),
        "pictures_per_second": round(len(load.seconds) / (given.minutes * 60), 2),
        "median_s": round(median(load.seconds), 3),
        "p95_s": round(cuts[18], 3),
        "most_s": round(max(load.seconds), 3),
        "ends": dict(load.ends),
        "resident_mb_first_third": round(first / 1e6, 1),
        "resident_mb_last_third": round(last / 1e6, 1),
        "resident_growth": round(last / first - 1, 4),
        "resident_mb_quiet": round(quiet / 1e6, 1),
        "resident_mb_after_bad": round(after_bad / 1e6, 1),
        "resident_growth_by_bad": round(after_bad / quiet - 1, 4),
        "bad": given.bad,
        "bad_ends": bad_ends,
        "requests_together": _together(address, token),
        "problems": problems,
        "memory": load.memory[::10],
    }


def _wait_ready(address: str) -> None:
    end = time.monotonic() + 300
    while time.monotonic() < end:
        try:
            if httpx.get(f"{address}/healthz/ready").status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise TimeoutError("the server does not become ready")


def _thirds(memory: list[tuple[float, int]]) -> tuple[float, float]:
    """Mean resident bytes of the first and of the last third."""
    values = [size for _, size in memory]
    third = max(1, len(values) // 3)
    return mean(values[:third]), mean(values[-third:])


def _together(address: str, token: str) -> float:
    """Mean number of requests of one turn of the engine."""
    text = httpx.get(f"{address}/metrics", headers={"Authorization": f"Bearer {token}"}).text
    found = {
        line.split()[0]: float(line.split()[1])
        for line in text.splitlines()
        if line.startswith("mtu_requests_together_")
    }
    return round(found["mtu_requests_together_sum"] / found["mtu_requests_together_count"], 2)


async def _load(address: str, token: str, given: Any, seconds: float, load: Load, process: psutil.Process) -> None:
    limits = httpx.Limits(max_connections=given.clients + 5)
    headers = {"Authorization": f"Bearer {token}"}
    async with httpx.AsyncClient(base_url=address, headers=headers, timeout=None, limits=limits) as client:
        tasks = (await client.get("/v1/tasks")).json()["tasks"]
        clients = [_client(client, tasks, given.steps, number, seconds, load) for number in range(given.clients)]
        await asyncio.gather(_watch(process, seconds, load), *clients)


async def _watch(process: psutil.Process, seconds: float, load: Load) -> None:
    """Look at the server, and at the clock: time in which this machine did not let the processes run does not count."""
    while load.active < seconds:
        load.memory.append((round(load.active, 1), process.memory_info().rss))
        before = time.monotonic()
        await asyncio.sleep(0.5)
        passed = time.monotonic() - before
        load.active += min(passed, _LONGEST_TICK)
        load.stopped += max(0.0, passed - _LONGEST_TICK)


async def _client(
    client: httpx.AsyncClient, tasks: list[dict[str, Any]], steps: int, number: int, seconds: float, load: Load
) -> None:
    draw = random.Random(number)
    while load.active < seconds:
        path, options = _request(draw, tasks[draw.randrange(len(tasks))], steps)
        began = time.monotonic()
        patience = draw.uniform(0.01, 2) if draw.random() < 0.1 else None
        try:
            response = await asyncio.wait_for(client.post(path, **options), patience)
        except (asyncio.TimeoutError, TimeoutError):
            load.ends["gone"] += 1
            continue
        except httpx.HTTPError as error:
            load.ends[type(error).__name__] += 1
            continue
        load.ends[str(response.status_code)] += 1
        if response.status_code == 200:
            load.seconds.append(time.monotonic() - began)
        elif response.status_code == 429:
            await asyncio.sleep(float(response.headers["Retry-After"]) * draw.uniform(0.5, 1.5))


def _request(draw: random.Random, task: dict[str, Any], steps: int) -> tuple[str, dict[str, Any]]:
    """One request of a task, in one of the ways clients have."""
    needs, wish = task["needs"], {"num_inference_steps": steps, "rng_seed": draw.randrange(2**32)}
    if needs["prompt"]:
        wish["prompt"] = draw.choice(["a red apple", "make it dark skin tone", "a cat with heart eyes", "a blue car"])
    if not needs["image"]:
        stream = draw.random() < 0.3
        return "/v1/images/generations", {"json": {**wish, "stream": stream, "partial_images": 2 if stream else 0}}
    side = draw.choice([16, 64, 200, 512])
    files = {"image": ("a.png", _picture(draw, side))}
    if needs["mask"]:
        files["mask"] = ("m.png", _picture(draw, side, hole=True))
    ours = not needs["prompt"] or draw.random() < 0.3
    path = f"/v1/tasks/{task['name']}" if ours else "/v1/images/edits"
    return path, {"files": files, "data": {name: str(value) for name, value in wish.items()}}


def _picture(draw: random.Random, side: int, *, hole: bool = False) -> bytes:
    picture = Image.new("RGBA", (side, side), (draw.randrange(256), draw.randrange(256), 90, 255))
    if hole:
        picture.paste((0, 0, 0, 0), (side // 4, side // 4, side // 2 + 1, side // 2 + 1))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _send_bad(address: str, token: str, count: int, seed: int = 0) -> tuple[dict[str, dict[str, int]], list[str]]:
    """How the bad requests of each kind ended, and what should not have been."""
    host, port = address.removeprefix("http://").rsplit(":", 1)
    source = BadRequests(token, int(_UPLOAD_MB * 1e6), seed)
    all_bad = [source.draw() for _ in range(count)]
    ends: dict[str, Counter[str]] = {}
    problems: list[str] = []

    def one(bad: Bad) -> tuple[Bad, int | None, bytes]:
        return bad, *send(host, int(port), bad)

    with ThreadPoolExecutor(8) as pool:
        for bad, status, answer in pool.map(one, all_bad):
            ends.setdefault(bad.kind, Counter())[str(status or "hung up")] += 1
            if status is not None and status not in _REFUSALS:
                problems.append(f"{bad.kind}: {status} {answer[-200:]!r} to {bad.raw[:300]!r}")
            if status is None and not bad.cut:
                problems.append(f"{bad.kind}: no answer to {bad.raw[:300]!r}")
            if b'b64_json":' in answer or (not bad.right_token and token.encode() in answer):
                problems.append(f"{bad.kind}: served {answer[:200]!r}")
    return {kind: dict(counter) for kind, counter in sorted(ends.items())}, problems[:20]


if __name__ == "__main__":
    main()
