"""``mtu-compile serve`` and ``python -m mtu_compile.serve`` as an operator starts and stops them."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from mtu_compile.bundle import keys, signature
from mtu_compile.cli.serve import command
from mtu_compile.serve.__main__ import parser
from mtu_compile.serve.settings import Settings, options
from tests.runtime.test_bare_import import FORBIDDEN, HOOK
from tests.serve.conftest import LIMIT

#: uvicorn has a command line of its own, in click, which it imports.
MISSING = [name for name in FORBIDDEN if name != "click"]
WITHOUT = HOOK.format(forbidden=MISSING) + (
    "from mtu_compile.serve.__main__ import main\n"
    "main()\n"
    "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))\n"
)


@contextmanager
def started(*command: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that serves, and the first line it printed."""
    words = [sys.executable, *map(str, command)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def failed(*arguments: object) -> tuple[int, str]:
    words = [sys.executable, "-m", "mtu_compile.serve", *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=LIMIT)
    return done.returncode, done.stderr


def test_on_a_board_it_starts_without_a_compiler_and_ends_well_on_sigterm(shared_root: Path) -> None:
    with started("-c", WITHOUT, shared_root, "--port", 0) as (process, line):
        address, _, token = line.partition("/#token=")
        assert address.startswith("http://127.0.0.1:") and len(token) >= 43, process.communicate(timeout=LIMIT)
        with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {token}"}, timeout=LIMIT) as client:
            wish = {"prompt": "a", "num_inference_steps": 2}
            assert client.post("/v1/images/generations", json=wish).status_code == 200
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err
    assert "Traceback" not in err and not set(json.loads(out)) & set(MISSING)


def test_the_command_keeps_its_token_and_does_not_print_it(shared_root: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    with started("-m", "mtu_compile", "serve", shared_root, "--port", 0, "--token-file", token) as (process, line):
        assert token.read_text().strip() not in line and line.startswith("http://127.0.0.1:")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err


def test_what_cannot_be_served_is_refused(shared_root: Path, tmp_path: Path) -> None:
    assert failed(tmp_path / "none")[0] == 5
    code, err = failed(shared_root, "--queue", 0)
    assert code == 2 and "--queue 0 is impossible" in err
    assert failed(shared_root, "--tls-cert", "x.pem")[0] == 2
    assert failed(shared_root, "--host", "no such host")[0] == 2


def test_a_bundle_that_none_of_the_trusted_keys_signed_is_not_opened(shared_root: Path, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    key = tmp_path / "key"
    public = keys.write_pair(key, keys.new_private())
    code, err = failed(shared_root, "--trust", keys.public_of(key))
    assert code == 5 and "not signed" in err and public.key_id
    other = tmp_path / "other"
    keys.write_pair(other, keys.new_private())
    signed = tmp_path / "signed"
    subprocess.run(["cp", "-r", str(shared_root), str(signed)], check=True)
    signature.sign(signed, keys.read_private(other), release=1)
    assert failed(signed, "--trust", keys.public_of(key))[0] == 5
    signature.sign(signed, keys.read_private(key), release=1)
    with started("-m", "mtu_compile.serve", signed, "--trust", keys.public_of(key), "--port", 0) as (_, line):
        assert line.startswith("http://")


def test_both_command_lines_have_every_setting(tmp_path: Path) -> None:
    shown = CliRunner().invoke(command, ["--help"]).output
    given = parser().parse_args([str(tmp_path), "--queue", "3", "--allow-host", "a", "--allow-host", "b"])
    assert (given.queue, given.allow_host, given.grace) == (3, ["a", "b"], Settings(tmp_path).grace)
    for one in options():
        assert one.flag in shown and one.flag in parser().format_help()


def test_the_documents_name_options_there_are() -> None:
    known = {one.flag for one in options()}
    docs = Path(__file__).resolve().parents[2] / "docs"
    table = (
        docs.joinpath("serve.md")
        .read_text()
        .partition("## What the operator decides")[2]
        .partition("## As a service")[0]
    )
    assert {*re.findall(r"--[a-z][a-z-]+", table)} - {"--help", "--routing"} <= known
    units = [
        re.search(r"^ExecStart=\S+ serve (.+)$", docs.joinpath(f"serve/{name}").read_text(), re.MULTILINE)
        for name in ("mtu-serve.service", "mtu-board.service")
    ]
    entry = re.search(r"^ENTRYPOINT (.+)$", docs.joinpath("serve/Containerfile").read_text(), re.MULTILINE)
    assert all(units) and entry
    for words in (*(unit[1].split() for unit in units if unit), json.loads(entry[1])[2:]):
        assert parser().parse_args(words).token_file
