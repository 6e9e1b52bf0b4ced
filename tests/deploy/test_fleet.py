"""Boards together: the canary, labels, limits, what is refused before anything travels, and the ways SSH goes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mtu_compile import bundle
from mtu_compile.core.errors import AccuracyError, ConfigError, DeployError
from mtu_compile.deploy import fleet, inventory
from mtu_compile.deploy.deployment import Outcome
from mtu_compile.deploy.inventory import Inventory, Place
from tests.deploy import hosts as networks
from tests.deploy.conftest import Bench


def outcomes(failing: set[str], **options: object) -> tuple[fleet.FleetResult, list[str], int]:
    """A fleet of six of which some fail; the result, who was tried in which order, and how many at a time."""
    tried: list[str] = []
    running = most = 0

    async def one(name: str, place: Place) -> Outcome:
        nonlocal running, most
        tried.append(name)
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        return Outcome(name, error=AccuracyError("too low") if name in failing else None)

    names = "abcdef"
    boards = Inventory({name: Place(name) for name in names}, canary="d", parallel=2)
    result = asyncio.run(fleet.run(boards, one, **options))  # type: ignore[arg-type]
    return result, tried, most


def test_the_canary_goes_first_and_the_others_a_few_at_a_time() -> None:
    result, tried, most = outcomes(set())
    assert tried[0] == "d" and sorted(tried) == list("abcdef") and most == 2
    assert list(result.outcomes) == list("abcdef") and result.exit_code == 0


def test_a_canary_that_fails_stops_all() -> None:
    for options in ({}, {"keep_going": True}):
        result, tried, _ = outcomes({"d"}, **options)
        assert tried == ["d"] and result.first_failure == "d" and result.exit_code == 3
        assert [name for name, one in result.outcomes.items() if one is None] == list("abcef")


def test_no_further_board_is_begun_after_a_failure() -> None:
    result, tried, _ = outcomes({"b"})
    assert tried[:3] == ["d", "a", "b"] and len(tried) <= 4 and result.first_failure == "b"
    result, tried, _ = outcomes({"b"}, keep_going=True)
    assert len(tried) == 6 and result.exit_code == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = ", "not TOML"),
        ("[boards]\n", "lists no boards"),
        ("[boards.a]\nuser = 'x'\n", "host"),
        ("[boards.a]\nhost = 'x'\nprot = 22\n", "'prot'"),
        ("[boards.a]\nhost = 'x'\nport = 99999\n", "port"),
        ("[boards.a]\nhost = '-oProxyCommand=x'\n", "is no host"),
        ("[boards.'../a']\nhost = 'x'\n", "no name of a board"),
        ("canary = 'b'\n[boards.a]\nhost = 'x'\n", "none of the boards"),
        ("[boards.a]\nhost = 'x'\nlimits = {step = 5}\n", "limits.step"),
        ("[boards.a]\nhost = 'x'\nlimits = {image_s = -1}\n", "limits.image_s"),
        ("parallel = 0\n[boards.a]\nhost = 'x'\n", "parallel"),
    ],
)
def test_an_inventory_that_is_wrong_is_refused_by_the_name_of_the_entry(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "boards.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        inventory.read(path)


def test_boards_are_picked_by_name_and_label(tmp_path: Path) -> None:
    path = tmp_path / "boards.toml"
    path.write_text(
        "canary = 'a'\n[defaults]\nuser = 'mtu'\nlabels = {site = 'x'}\n"
        "[boards.a]\nhost = '10.0.0.1'\n[boards.b]\nhost = 'b.lan'\nport = 2222\nlabels = {site = 'y'}\n"
    )
    whole = inventory.read(path)
    assert whole.boards["a"].user == "mtu" and whole.boards["b"].port == 2222 and whole.canary == "a"
    assert list(inventory.select(whole, labels={"site": "y"}).boards) == ["b"]
    assert inventory.select(whole, only=["b"]).canary is None
    with pytest.raises(ConfigError, match="no board 'c'"):
        inventory.select(whole, only=["c"])
    with pytest.raises(ConfigError, match="site=z"):
        inventory.select(whole, labels={"site": "z"})


def test_limits_of_the_command_line_come_before_the_inventorys(tmp_path: Path) -> None:
    path = tmp_path / "boards.toml"
    path.write_text("[defaults]\nlimits = {step_ms = 90, memory_mb = 800}\n[boards.a]\nhost = 'a'\n")
    limits = inventory.limited(inventory.read(path), ["step_ms=50", "image_s=2.5"]).boards["a"].limits
    assert (limits.step_ms, limits.image_s, limits.memory_mb) == (50, 2.5, 800)
    for wrong in ("step_ms", "step_ms=fast", "steps=3", "step_ms=0"):
        with pytest.raises(ConfigError, match="limit"):
            inventory.limited(inventory.read(path), [wrong])


@pytest.mark.parametrize(
    ("text", "user", "host", "port"),
    [
        ("board", None, "board", None),
        ("me@10.0.0.7", "me", "10.0.0.7", None),
        ("me@board:2222", "me", "board", 2222),
        ("[fe80::1%eth0]:22", None, "fe80::1%eth0", 22),
        ("me@fe80::1", "me", "fe80::1", None),
    ],
)
def test_a_destination_is_read_as_ssh_reads_it(text: str, user: str | None, host: str, port: int | None) -> None:
    _, place = inventory.parse(text)
    assert (place.user, place.host, place.port) == (user, host, port)


@pytest.mark.parametrize("text", ["", "@board", "board:0", "board:99999", "-oProxyCommand=x", "me@-x"])
def test_what_is_no_destination_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        inventory.parse(text)


# -- over SSH


@pytest.mark.heavy
def test_a_host_key_that_was_never_seen_is_refused_with_what_to_do(
    bench: Bench, command: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    host = bench.hosts[0]
    networks.write_home(tmp_path / "stranger", bench.folder / "id", [])
    monkeypatch.setenv("HOME", str(tmp_path / "stranger"))
    config = tmp_path / "stranger" / ".ssh" / "config"
    config.write_text(f"StrictHostKeyChecking no\n{config.read_text()}")
    said = command(f"boards status {host.address}", exit=1)
    assert "host key" in said and "ssh-keygen -lf" in said and not (host.root / "agent").exists()


@pytest.mark.heavy
def test_a_board_behind_another_is_reached_through_it(
    bench: Bench, command: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By ProxyJump of ssh_config; the second board's own address there is none of ours."""
    near, far = bench.hosts[0], bench.hosts[1]
    networks.run(
        *(networks.IP, "-n", near.name, "link", "add", "inner", "type", "veth"),
        *("peer", "name", "inner", "netns", far.name),
    )
    for host, address in ((near, "192.168.77.1"), (far, "192.168.77.2")):
        networks.run(networks.IP, "-n", host.name, "address", "add", f"{address}/30", "dev", "inner")
        networks.run(networks.IP, "-n", host.name, "link", "set", "inner", "up")
    far.listen_on("192.168.77.2")
    home = tmp_path / "home"
    networks.write_home(home, bench.folder / "id", bench.hosts)
    with (home / ".ssh" / "known_hosts").open("a") as file:
        file.write(f"192.168.77.2 {(far.folder / 'host_key.pub').read_text().strip()}\n")
    config = home / ".ssh" / "config"
    jump = f"Host far\n  HostName 192.168.77.2\n  ProxyJump near\nHost near\n  HostName {near.address}\n"
    config.write_text(jump + config.read_text())
    monkeypatch.setenv("HOME", str(home))
    said = json.loads(command(f"boards status root@far --root {far.root} --json"))
    assert said["boards"]["far"]["result"]["root"] == str(far.root)


@pytest.mark.heavy
def test_a_dry_run_says_what_would_travel_and_leaves_no_version(bench: Bench, command: Callable[..., str]) -> None:
    host = bench.hosts[0]
    path = bench.bundle("dry", payload=1 << 20)
    said = json.loads(command(f"deploy {path} root@{host.address} --root {host.root} --dry-run --unsigned --json"))
    plan = said["boards"][host.address]["plan"]
    assert plan["files"] > 0 and "note.bin" in plan["names"] and plan["bytes"] > 1 << 20
    assert bench.store(host).ids() == () and not list((host.root / "objects").iterdir())


@pytest.mark.heavy
def test_two_deployments_to_one_board_come_one_after_the_other(bench: Bench) -> None:
    from mtu_compile.deploy import deployment
    from mtu_compile.deploy.deployment import Options, Package

    host = bench.hosts[2]
    options = Options(activate=True, unsigned=True, silence=60, retries=1)
    packages = [Package.read(bench.bundle(name)) for name in ("one", "other")]

    async def both() -> list[Outcome]:
        return list(
            await asyncio.gather(*(deployment.deploy("b", bench.place(host), one, options) for one in packages))
        )

    began = time.monotonic()
    found = asyncio.run(both())
    assert [one.error for one in found] == [None, None], (found, time.monotonic() - began)
    store = bench.store(host)
    assert store.current in {one.version for one in found} and store.previous in {one.version for one in found}
    assert bundle.read(store.bundle(str(store.current)))


@pytest.mark.heavy
def test_a_bundle_for_another_target_is_refused_before_anything_travels(bench: Bench) -> None:
    from dataclasses import replace

    from mtu_compile.deploy import deployment
    from mtu_compile.deploy.deployment import Options, Package

    place = replace(bench.place(bench.hosts[0]), target="jetson-orin")
    package = Package.read(bench.bundle("wrong"))
    outcome = asyncio.run(deployment.deploy("b", place, package, Options(unsigned=True)))
    assert isinstance(outcome.error, DeployError) and "jetson-orin" in outcome.error.message and not outcome.reached
