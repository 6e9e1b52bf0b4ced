"""A seed that is none is refused as an option and as an argument, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mtu_compile.calibrate import CalibrateOptions, calibrate
from mtu_compile.cli import COMMANDS, cli
from mtu_compile.compile import BuildOptions, build
from mtu_compile.core.errors import EXIT_USAGE, ConfigError
from mtu_compile.core.seeds import MAX_SEED, check_seed
from mtu_compile.model.train_config import TrainConfig

SEEDED = {
    "build": ["none", "-o", "out"],
    "calibrate": ["none", "-o", "out"],
    "run": ["none", "--task", "t2i", "-o", "out.png"],
    "train": ["none", "--data", "none", "-o", "out"],
}


def test_these_are_the_commands_with_a_seed() -> None:
    context: Any = None
    commands = {name: cli.get_command(context, name) for name in COMMANDS}
    assert {n for n, c in commands.items() if c and any(p.name == "seed" for p in c.params)} == set(SEEDED)


@pytest.mark.parametrize("command", SEEDED)
@pytest.mark.parametrize("seed", ["-1", str(MAX_SEED + 1), "1.5", "x"])
def test_an_impossible_seed_is_refused_as_an_option(command: str, seed: str, tmp_path: Path) -> None:
    with CliRunner().isolated_filesystem(tmp_path) as folder:
        done = CliRunner().invoke(cli, [command, *SEEDED[command], "--seed", seed])
        assert done.exit_code == EXIT_USAGE and "--seed" in done.output
        assert not list(Path(folder).iterdir())


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1, 1.5, "7", None])
def test_functions_refuse_it_before_they_read_anything(seed: Any, tmp_path: Path) -> None:
    nowhere, out = tmp_path / "nowhere", tmp_path / "out"
    for call in (
        lambda: build(BuildOptions(nowhere, out, seed=seed)),
        lambda: calibrate(CalibrateOptions(nowhere, out, seed=seed)),
        lambda: TrainConfig(nowhere, nowhere, out, seed=seed),
    ):
        with pytest.raises(ConfigError, match="is not a seed"):
            call()
    assert not list(tmp_path.iterdir())


def test_every_other_seed_is_one() -> None:
    assert [check_seed(seed) for seed in (0, MAX_SEED, np.int64(3))] == [0, MAX_SEED, 3]
