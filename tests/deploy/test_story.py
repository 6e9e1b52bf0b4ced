"""Every command of ``docs/deploy.md``, in its order, against three SSH servers."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mtu_compile import bundle
from tests.cli.conftest import mtu as mtu
from tests.cli.conftest import tiny_model as tiny_model
from tests.commands import Outcome
from tests.deploy.conftest import Bench

pytestmark = pytest.mark.heavy

PAGE = Path(__file__).parents[2] / "docs" / "deploy.md"


def blocks(kind: str) -> Iterator[str]:
    for found in re.finditer(rf"^```{kind}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        yield found[1]


def commands() -> list[tuple[str, int]]:
    """Each command, and the exit code the page says it has."""
    found = []
    for line in "".join(blocks("sh")).splitlines():
        words, _, comment = line.partition("#")
        code = re.match(r" exit (\d+)", comment)
        found.append((words.strip().removeprefix("mtu-compile "), int(code[1]) if code else 0))
    return found


def write_inventory(bench: Bench) -> None:
    """The page's, at the addresses of the boards there are."""
    (text,) = blocks("toml")
    for number, host in enumerate(bench.hosts):
        line = f'host = "10.0.0.{11 + number}"'
        assert line in text
        text = text.replace(line, f'host = "{host.address}"\nroot = "{host.root}"')
    (bench.folder / "boards.toml").write_text(text.replace('user = "mtu"', 'user = "root"'))


def spoil(root: Path) -> None:
    """Make every convolution of the UNets too weak, and the bundle agree with itself again."""
    import onnx
    from onnx import numpy_helper

    for path in {entry.engine.path for entry in bundle.read(root, verify=False).tasks.values()}:
        model = onnx.load(root / path)
        for tensor in model.graph.initializer:
            if len(tensor.dims) == 4:
                weak = (numpy_helper.to_array(tensor) * 0.5).astype(np.float32)
                tensor.CopyFrom(numpy_helper.from_array(weak, tensor.name))
        (root / path).unlink()
        onnx.save(model, root / path)
    bundle.write(root, replace(bundle.read(root, verify=False), source=bundle.Source("bad", "0" * 64)))


def test_the_story(bench: Bench, tiny_model: Path, mtu: Callable[..., Outcome]) -> None:
    folder = bench.folder

    def command(line: str, exit: int) -> str:
        done = mtu(*shlex.split(line), cwd=folder)
        assert done.code == exit, f"{line}: {done.code}\n{done.out}\n{done.err}"
        return done.out + done.err

    shutil.copytree(tiny_model, folder / "model")
    write_inventory(bench)
    said: dict[str, str] = {}
    for line, code in commands():
        if line.startswith("sign bad"):
            shutil.copytree(folder / "bundle", folder / "bad")
            spoil(folder / "bad")
        if line.startswith("boards wheels good"):
            shutil.copytree(folder / "bundle", folder / "good")
            manifest = bundle.read(folder / "good", verify=False)
            bundle.write(folder / "good", replace(manifest, source=bundle.Source("good", "0" * 64)))
        said[line] = command(line, exit=code)
        stores = [bench.store(host) for host in bench.hosts]
        running = [None if (one := store.current) is None else store.record(one).source for store in stores]
        if line == "deploy bundle --inventory boards.toml --activate":
            assert running == ["tiny"] * 3 or (len(set(running)) == 1 and None not in running)
            first = running[0]
            measured = sorted(path.stem for path in (folder / "bundle" / "built" / "boards").iterdir())
            assert measured == ["attic", "hall", "kitchen"]
        elif line.startswith("deploy bad"):
            assert running == [first] * 3, "the canary kept what it ran, and nobody else was asked"
            assert "not tried" in said[line] and "kitchen: " in said[line]
            assert [len(store.ids()) for store in stores] == [2, 1, 1]
        elif line == "deploy good --inventory boards.toml --activate":
            assert running == ["good"] * 3
        elif line.startswith("boards rollback"):
            assert running == [first] * 3
    assert "wheels" not in said["deploy good --inventory boards.toml --activate"]
    page = json.loads(command("report bundle --json", exit=0))
    facts = json.dumps(page)
    for name in ("kitchen", "hall", "attic"):
        assert f"a UNet call on {name}" in facts and f"memory on {name}" in facts
    refused = command("deploy bad --inventory boards.toml --activate", exit=5)
    assert "older than 3" in refused
