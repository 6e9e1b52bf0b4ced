"""``key``, ``sign``, ``verify``, ``pack`` and ``unpack``, and commands that demand a signature, as users type them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mtu_compile import bundle
from mtu_compile.core.errors import EXIT_INPUT, EXIT_USAGE
from tests.bundle.small import write_small
from tests.commands import Outcome

Mtu = Callable[..., Outcome]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_small(tmp_path / "small")


def test_from_a_key_to_a_board(mtu: Mtu, small: Path, tmp_path: Path) -> None:
    key, trusted = tmp_path / "release", tmp_path / "release.pub"
    made = mtu("key", "new", key, "--comment", "me", "--json")
    key_id = json.loads(made.out)["key_id"]
    assert mtu("key", "show", trusted).out == f"{key_id} me\n"
    assert mtu("key", "new", key).code == EXIT_USAGE

    unsigned = mtu("verify", small, "--trust", trusted)
    assert unsigned.code == EXIT_INPUT and "is not signed" in unsigned.err and "hint: sign it" in unsigned.err
    assert json.loads(mtu("verify", small, "--json").out)["signed"] is None

    signed = mtu("sign", small, "--key", key, "--release", "3", "--json")
    assert json.loads(signed.out)["key_id"] == key_id and json.loads(signed.out)["release"] == 3
    assert json.loads(mtu("verify", small, "--trust", trusted, "--json").out)["signed"]["release"] == 3

    file = tmp_path / "bundle.tar"
    assert mtu("pack", small, file).code == 0
    assert mtu("pack", small, file).code == EXIT_USAGE
    assert mtu("verify", file, "--trust", trusted).code == 0
    unpacked = mtu("unpack", file, tmp_path / "out", "--trust", trusted, "--json")
    assert json.loads(unpacked.out)["signed"] == {"release": 3, "key_id": key_id}
    assert bundle.read(tmp_path / "out") == bundle.read(small)

    mtu("key", "new", tmp_path / "other")
    stranger = mtu("unpack", file, tmp_path / "never", "--trust", tmp_path / "other.pub")
    assert stranger.code == EXIT_INPUT and key_id in stranger.err and not (tmp_path / "never").exists()
    assert (
        mtu("unpack", file, tmp_path / "out", "--trust", tmp_path / "other.pub", "--trust", trusted).code == EXIT_USAGE
    )
    assert mtu("unpack", file, tmp_path / "out", "--trust", trusted, "--force").code == 0


def test_a_bundle_that_was_changed_is_not_signed(mtu: Mtu, small: Path, tmp_path: Path) -> None:
    mtu("key", "new", tmp_path / "key")
    sign = ("sign", small, "--key", tmp_path / "key", "--release")
    assert mtu(*sign, "1").code == 0
    (small / "unet/openvino_model.xml").write_bytes(b"<evil/>")
    refused = mtu(*sign, "2")
    assert refused.code == EXIT_INPUT and "unet/openvino_model.xml" in refused.err
    assert json.loads((small / "signature.json").read_text())["release"] == 1
    (small / "unet/openvino_model.xml").write_bytes(b"<net/>")
    assert mtu(*sign, "0").code == EXIT_USAGE


def test_a_signature_of_what_was_before_is_replaced(mtu: Mtu, small: Path, tmp_path: Path) -> None:
    mtu("key", "new", tmp_path / "key")
    other = write_small(tmp_path / "other")
    (other / "model_index.json").write_bytes(b"{ }")
    bundle.write(other, bundle.read(other, verify=False))
    mtu("sign", other, "--key", tmp_path / "key", "--release", "1")
    shutil.copy(other / "signature.json", small)
    assert mtu("verify", small).code == EXIT_INPUT
    assert mtu("sign", small, "--key", tmp_path / "key", "--release", "2").code == 0
    assert mtu("verify", small, "--trust", tmp_path / "key.pub").code == 0


def test_a_key_behind_a_passphrase(mtu: Mtu, small: Path, tmp_path: Path) -> None:
    (tmp_path / "words").write_text("correct horse\n")
    given = ("--passphrase-file", tmp_path / "words")
    assert mtu("key", "new", tmp_path / "key", *given).code == 0
    sign = ("sign", small, "--key", tmp_path / "key", "--release", "1")
    without = mtu(*sign)
    assert without.code == EXIT_INPUT and "--passphrase-file" in without.err
    assert mtu(*sign, *given).code == 0


@pytest.mark.parametrize(
    "command",
    [("board", "build"), ("board", "check"), ("run", "--task", "t2i", "-o", "out.png")],
    ids=lambda one: one[-1],
)
def test_nothing_is_done_with_what_nobody_trusted_signed(
    mtu: Mtu, small: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    mtu("key", "new", tmp_path / "key")
    (small / "manifest.json").write_bytes(b"not even JSON")  # which is not looked at before the signature is
    words = [*command, small, "--trust", tmp_path / "key.pub"]
    refused = mtu(*words, cwd=tmp_path)
    assert refused.code == EXIT_INPUT and "is not signed" in refused.err
    assert sorted(path.name for path in small.iterdir() if path.name.startswith(("built", "out"))) == []


def test_no_keys_to_trust_are_a_mistake(mtu: Mtu, small: Path, tmp_path: Path) -> None:
    assert mtu("verify", small, "--trust", tmp_path / "nowhere").code == EXIT_USAGE
    (tmp_path / "empty").write_text("# nobody\n")
    assert mtu("verify", small, "--trust", tmp_path / "empty").code == EXIT_INPUT


def test_messages_show_no_letters_that_a_terminal_obeys(mtu: Mtu, tmp_path: Path) -> None:
    refused = mtu("verify", tmp_path / "\x1b[2Jred")
    assert refused.code == EXIT_INPUT and "\x1b" not in refused.err
