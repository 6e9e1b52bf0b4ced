"""Manifests, and the signatures of them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from mtu_compile.bundle import files, signature
from mtu_compile.bundle.manifest import Manifest
from mtu_compile.core.errors import BundleError
from tests.fuzz import json_mutation
from tests.fuzz.harness import Harness, Wrong
from tests.fuzz.signed_bundle import signed_bundle

#: What ``files._sealed`` adds.
_SEAL = files.SELF_HASH


class Manifests(Harness):
    """``bundle.files.parse``: what is taken says the same again when it is written, and stays in its folder."""

    name = "manifest"

    def seeds(self) -> Sequence[bytes]:
        old = Path(__file__).parents[1] / "bundle" / "manifest_version_1.json"
        return signed_bundle().manifest, old.read_bytes()

    def mutate(self, data: bytes, rng: random.Random) -> bytes | None:
        mutated = json_mutation.mutate(data, rng)
        if mutated is None or rng.random() < 0.8:
            return mutated
        try:  # as one who computes its hash anew
            value = json.loads(mutated)
            return files._sealed(value) if isinstance(value, dict) else mutated
        except (ValueError, RecursionError):
            return mutated

    def read(self, data: bytes) -> None:
        hand_edited = files.parse(data, verify=False)
        self._check(hand_edited)
        sealed = files._sealed(hand_edited.to_json())
        if files.parse(sealed) != hand_edited:
            raise Wrong("it is another manifest once it is written")
        try:
            verified = files.parse(data)
        except BundleError:
            return  # it is not sealed
        if verified != hand_edited:
            raise Wrong("it is another manifest when its hash is looked at")
        body = json.loads(data)
        if body.pop(_SEAL) != json.loads(files._sealed(body))[_SEAL]:
            raise Wrong("its hash does not hold")

    def _check(self, manifest: Manifest) -> None:
        for name in (*manifest.files, *(path for _, path in manifest.references())):
            pure = PurePosixPath(name)
            if pure.is_absolute() or ".." in pure.parts or "\\" in name or pure.parts[0].lower() == "built":
                raise Wrong(f"it names {name!r}")
        if any(path not in manifest.files for _, path in manifest.references()):
            raise Wrong("it names a file that it does not vouch for")
        folded = [name.casefold() for name in manifest.files]
        if len(set(folded)) != len(folded):
            raise Wrong("two of its files are one")


class Signatures(Harness):
    """``bundle.signature``: of a given manifest and key there is one signature that verifies."""

    name = "signature"

    def seeds(self) -> Sequence[bytes]:
        return (signed_bundle().signature,)

    def mutate(self, data: bytes, rng: random.Random) -> bytes | None:
        return json_mutation.mutate(data, rng) if rng.random() < 0.7 else None

    def read(self, data: bytes) -> None:
        made = signed_bundle()
        signature.verify_bytes(made.manifest, data, made.trusted)
        if data != made.signature:
            raise Wrong("a signature that nobody made is taken")


class SignedManifests(Harness):
    """The manifest under a good signature of another one."""

    name = "signed-manifest"

    def seeds(self) -> Sequence[bytes]:
        return (signed_bundle().manifest,)

    def mutate(self, data: bytes, rng: random.Random) -> bytes | None:
        return Manifests().mutate(data, rng)

    def read(self, data: bytes) -> None:
        made = signed_bundle()
        signature.verify_bytes(data, made.signature, made.trusted)
        if data != made.manifest:
            raise Wrong("a manifest that nobody signed is taken")
