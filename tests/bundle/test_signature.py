"""Signed bundles: what was signed verifies, and nothing else does, in any bit."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mtu_compile import bundle
from mtu_compile.bundle import keys, signature
from mtu_compile.bundle.release import Highest, check_one_way
from mtu_compile.bundle.signature import Signed
from mtu_compile.core.errors import EXIT_INPUT, BundleError, ConfigError, InputError


def refused(path: Path, trusted: Any, *words: str) -> None:
    for call in (lambda: signature.verify(path, trusted), lambda: bundle.read(path, trusted=trusted)):
        with pytest.raises(BundleError) as caught:
            call()
        assert caught.value.exit_code == EXIT_INPUT
        for word in words:
            assert word in caught.value.message


def test_a_signed_bundle_verifies(signed: Path, ours: Any) -> None:
    found = signature.verify(signed, ours)
    assert (found.release, found.key_id) == (7, ours[0].key_id)
    assert bundle.read(signed, trusted=ours) == bundle.read(signed)
    another = keys.PublicKey.of(keys.new_private())
    assert signature.verify(signed, (another, *ours)) == found


def test_an_unsigned_bundle_is_refused_where_a_key_is_demanded(small: Path, ours: Any) -> None:
    refused(small, ours, "is not signed")
    assert bundle.read(small).tasks


def test_a_key_that_is_not_trusted_is_refused(signed: Path, ours: Any) -> None:
    refused(signed, (keys.PublicKey.of(keys.new_private()),), ours[0].key_id, "not among the 1 trusted")
    refused(signed, (), "not among the 0 trusted")


def test_any_changed_bit_of_manifest_or_signature_is_refused(signed: Path, ours: Any) -> None:
    for name in ("manifest.json", "signature.json"):
        content = (signed / name).read_bytes()
        for position in range(0, len(content), 1 if name == "signature.json" else 37):
            changed = bytearray(content)
            changed[position] ^= 1 << position % 8
            (signed / name).write_bytes(changed)
            with pytest.raises(BundleError):
                signature.verify(signed, ours)
        (signed / name).write_bytes(content)
    assert signature.verify(signed, ours).release == 7


def test_a_signature_has_one_form_only(signed: Path, ours: Any) -> None:
    content = (signed / "signature.json").read_bytes()
    record = json.loads(content)
    twice = content.replace(b'"release": 7', b'"release": 9,\n  "release": 7')
    for other in (content + b"\n", content.rstrip(), json.dumps(record).encode(), twice, b"\xef\xbb\xbf" + content):
        (signed / "signature.json").write_bytes(other)
        refused(signed, ours, "signature.json")
        with pytest.raises(BundleError, match=r"signature\.json"):  # without keys, too
            bundle.read(signed)


@pytest.mark.parametrize(
    "change",
    [
        {"release": 8},
        {"release": 0},
        {"release": 7.0},
        {"release": True},
        {"release": 10**400},
        {"format": "mtu-signature-2"},
        {"signature": ""},
        {"signature": "0" * 128},
        {"signature": 7},
        {"manifest_sha256": "0" * 64},
        {"key_id": "SHA256:" + "A" * 43},
        {"more": 1},
    ],
)
def test_changed_entries_are_refused(signed: Path, ours: Any, change: dict[str, Any]) -> None:
    record = {**json.loads((signed / "signature.json").read_text()), **change}
    (signed / "signature.json").write_bytes(signature._dump(record))
    refused(signed, ours)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"\xff", b"[" * 4000, b"{" + b" " * 5000, b'"\\ud800"'])
def test_what_is_no_signature_is_refused(signed: Path, ours: Any, content: bytes) -> None:
    (signed / "signature.json").write_bytes(content)
    refused(signed, ours, "signature.json")


def test_links_are_not_followed(signed: Path, ours: Any, tmp_path: Path) -> None:
    shutil.move(signed / "signature.json", tmp_path / "elsewhere")
    (signed / "signature.json").symlink_to(tmp_path / "elsewhere")
    refused(signed, ours, "signature.json is a symbolic link")


def test_nothing_is_parsed_before_the_signature_holds(signed: Path, ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (signed / "manifest.json").write_bytes((signed / "manifest.json").read_bytes() + b" ")

    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("parsed")

    monkeypatch.setattr(bundle.files, "parse", never)
    refused(signed, ours, "another manifest.json")


def test_files_are_read_only_once_the_signature_holds_and_then_all(signed: Path, ours: Any) -> None:
    (signed / "unet/openvino_model.xml").write_bytes(b"<evil/>")
    assert signature.verify(signed, ours).release == 7  # of the manifest
    with pytest.raises(BundleError, match=r"unet/openvino_model\.xml is not the file"):
        bundle.read(signed, trusted=ours)
    (signed / "unet/openvino_model.xml").write_bytes(b"<net/>")
    (signed / "unet/plugins.xml").write_bytes(b"")
    with pytest.raises(BundleError, match=r"unet/plugins\.xml does not belong"):
        bundle.read(signed, trusted=ours)


def test_a_bundle_that_is_written_again_is_not_signed(signed: Path, ours: Any) -> None:
    bundle.write(signed, bundle.read(signed))
    assert not (signed / "signature.json").exists()
    bundle.read(signed)


@pytest.mark.parametrize("release", [0, -1, 2**53, True, 1.0, "7"])
def test_impossible_releases_are_not_signed(small: Path, key: Any, release: Any) -> None:
    with pytest.raises(ConfigError):
        signature.sign(small, key, release=release)
    assert not (small / "signature.json").exists()


@pytest.mark.parametrize("name", [".", "unet", "unet/openvino_model.xml", "manifest.json"])
def test_what_everybody_may_change_is_not_vouched_for(signed: Path, ours: Any, name: str) -> None:
    """Engines are opened after hashes were read: whoever may write between the two decides what is run."""
    mode = (signed / name).stat().st_mode
    (signed / name).chmod(mode | 0o002)
    with pytest.raises(BundleError, match="can be changed by everybody") as caught:
        bundle.read(signed, trusted=ours)
    assert "chmod -R o-w" in str(caught.value.hint)
    bundle.read(signed)
    (signed / name).chmod(mode)
    bundle.read(signed, trusted=ours)


# Keys


def test_keys_are_files_that_openssh_reads(tmp_path: Path) -> None:
    key = keys.new_private()
    public = keys.write_pair(tmp_path / "release", key, comment="me@here")
    assert stat.S_IMODE((tmp_path / "release").stat().st_mode) == 0o600
    assert keys.read_trusted([tmp_path / "release.pub"]) == (public,)
    assert keys.PublicKey.of(keys.read_private(tmp_path / "release")).raw == public.raw
    if shutil.which("ssh-keygen"):
        said = subprocess.run(["ssh-keygen", "-l", "-f", tmp_path / "release.pub"], capture_output=True, text=True)
        assert public.key_id in said.stdout and "me@here" in said.stdout
    with pytest.raises(ConfigError, match="already exists"):
        keys.write_pair(tmp_path / "release", key)


def test_a_key_behind_a_passphrase_wants_it(tmp_path: Path) -> None:
    key = keys.new_private()
    keys.write_pair(tmp_path / "release", key, passphrase="correct horse")
    assert keys.read_private(tmp_path / "release", "correct horse").private_bytes_raw() == key.private_bytes_raw()
    with pytest.raises(keys.NeedsPassphrase):
        keys.read_private(tmp_path / "release")
    with pytest.raises(InputError, match="another passphrase"):
        keys.read_private(tmp_path / "release", "wrong")


def test_keys_of_openssh_and_openssl_are_read(tmp_path: Path) -> None:
    if not shutil.which("ssh-keygen") or not shutil.which("openssl"):
        pytest.skip("needs ssh-keygen and openssl (apt-get install openssh-client openssl)")
    run = {"check": True, "capture_output": True}
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "a b", "-f", tmp_path / "ssh"], **run)  # type: ignore[call-overload]
    (key,) = keys.read_trusted([tmp_path / "ssh.pub"])
    assert keys.PublicKey.of(keys.read_private(tmp_path / "ssh")).raw == key.raw and key.comment == "a b"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", tmp_path / "pem"], **run)  # type: ignore[call-overload]
    subprocess.run(["openssl", "pkey", "-in", tmp_path / "pem", "-pubout", "-out", tmp_path / "pem.pub"], **run)  # type: ignore[call-overload]
    (tmp_path / "pem").chmod(0o600)
    (public,) = keys.read_trusted([tmp_path / "pem.pub"])
    assert keys.PublicKey.of(keys.read_private(tmp_path / "pem")).raw == public.raw
    assert len(keys.read_trusted([tmp_path / "ssh.pub", tmp_path / "pem.pub", tmp_path / "ssh.pub"])) == 2


def test_a_private_key_that_others_can_read_is_not_used(tmp_path: Path) -> None:
    keys.write_pair(tmp_path / "key", keys.new_private())
    (tmp_path / "key").chmod(0o640)
    with pytest.raises(ConfigError, match="can be read by others") as caught:
        keys.read_private(tmp_path / "key")
    assert "chmod 600" in str(caught.value.hint)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"# only a comment\n",
        b"ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAAAgQ== me\n",
        b"ssh-ed25519 AAAA me\n",
        b"ssh-ed25519 !!!! me\n",
        b"\xff\xfe",
        b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
        b"ssh-ed25519\n",
    ],
)
def test_what_is_no_file_of_keys_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "keys").write_bytes(content)
    with pytest.raises(InputError):
        keys.read_trusted([tmp_path / "keys"])


def test_a_private_key_is_nothing_to_trust_with(tmp_path: Path) -> None:
    keys.write_pair(tmp_path / "key", keys.new_private())
    with pytest.raises(InputError, match="is a private key"):
        keys.read_trusted([tmp_path / "key"])


# The one-way rule


def test_a_board_goes_forward_and_back_only_when_told() -> None:
    one, two, three = (Signed(number, "SHA256:x", str(number) * 64) for number in (1, 2, 3))
    highest = check_one_way(one, None)
    assert highest == Highest(1, "1" * 64)
    highest = check_one_way(three, highest)
    assert check_one_way(three, highest) == highest  # the same again
    for older in (one, two):
        with pytest.raises(BundleError, match="older than 3") as caught:
            check_one_way(older, highest)
        assert caught.value.exit_code == EXIT_INPUT
        assert check_one_way(older, highest, rollback=True) == highest  # which stays what it was:
    with pytest.raises(BundleError, match="older than 3"):
        check_one_way(two, check_one_way(one, highest, rollback=True))


@pytest.mark.parametrize("rollback", [False, True])
def test_one_number_is_one_bundle(rollback: bool) -> None:
    highest = Highest(3, "3" * 64)
    with pytest.raises(BundleError, match="other content"):
        check_one_way(Signed(3, "SHA256:x", "4" * 64), highest, rollback=rollback)
    assert check_one_way(Signed(3, "SHA256:x", "4" * 64), Highest(3)).manifest_sha256 == "4" * 64
