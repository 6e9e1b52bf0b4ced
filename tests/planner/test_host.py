"""What a build needs of the machine it runs on, from the configs alone, and what is refused because of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import pytest

import targets
from mtu_compile.cli.options import Memory
from mtu_compile.compile import BuildOptions, PlanOptions, build, plan
from mtu_compile.core.errors import EXIT_USAGE, ConfigError
from mtu_compile.core.host_memory import host_memory
from mtu_compile.core.progress import Progress
from mtu_compile.core.tasks import PAPER_TASKS
from mtu_compile.planner.host import HostPlan, machine_flops, plan_host, rough_seconds

SD15_UNET = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "attention_head_dim": 8,
}
SD15_VAE = {"block_out_channels": (128, 256, 512, 512), "mid_block_add_attention": True}
SD15_WEIGHTS = 860_000_000

EXAMPLE = Path(__file__).parents[2] / "examples" / "emoji" / "model"


def sd15(height: int, width: int, memory: float | None = 24e9, tasks: Any = PAPER_TASKS[:1]) -> HostPlan:
    given = None if memory is None else int(memory)
    return plan_host(SD15_UNET, SD15_VAE, tasks, (height, width), SD15_WEIGHTS, memory=given)


def test_peaks_that_were_measured_are_bounded() -> None:
    """docs/benchmarks.md: 6.6 GB for four tasks of Stable Diffusion 1.5's size at 256x256, 1.41 GB for the example."""
    assert 6.6e9 < sd15(256, 256, tasks=PAPER_TASKS).memory_bytes < 1.4 * 6.6e9
    configs = [json.loads((EXAMPLE / part / "config.json").read_text()) for part in ("unet", "vae")]
    example = plan_host(*configs, PAPER_TASKS, (64, 64), 8_900_000, memory=10**10)
    assert 1.41e9 < example.memory_bytes < 1.4 * 1.41e9
    larger = plan_host(*configs, PAPER_TASKS[:1], (256, 256), 8_900_000, memory=10**10)
    assert 2.43e9 < larger.memory_bytes < 1.4 * 2.43e9


def test_text_encoders_count_where_they_are_large() -> None:
    """SDXL's, and one of five billion numbers beside a small UNet, which is exported with all the rest in memory."""

    def needs(unet: int, others: int) -> int:
        tasks = PAPER_TASKS[:1]
        return plan_host(SD15_UNET, SD15_VAE, tasks, (512, 512), unet, others, memory=10**12).memory_bytes

    assert needs(2_570_000_000, 900_000_000) == needs(2_570_000_000, 0)  # the UNet's own worst moment is worse
    assert needs(860_000_000, 5_000_000_000) - needs(860_000_000, 0) == pytest.approx(4 * (10e9 - 1.6 * 0.86e9))


def sdxl(memory: float, stand_in: float = 0.0) -> HostPlan:
    unet = {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "attention_head_dim": (5, 10, 20),
    }
    weights, others = 2_610_000_000, 900_000_000
    return plan_host(unet, SD15_VAE, PAPER_TASKS, (256, 256), weights, others, memory=int(memory), stand_in=stand_in)


def test_sdxl_fits_where_it_is_built() -> None:
    """All four tasks at 256x256 within the 20 GB that it is to take; not on half of that."""
    assert sdxl(20e9).fits is True and sdxl(10e9).fits is False


def test_a_machine_that_stands_in_for_a_device_needs_the_memory_of_both() -> None:
    """docs/benchmarks.md: 11.6 GB of its own for INT8 of Stable Diffusion 1.5's size, on a CPU instead of an NPU."""
    cpu, npu = (targets.get(name).stand_in("int8") for name in ("cpu", "intel-npu"))
    assert cpu == 0 and targets.get("intel-npu").stand_in("fp16") == 0
    assert sdxl(24e9, cpu).fits is True and sdxl(24e9, npu).fits is False and sdxl(40e9, npu).fits is True
    needed = plan_host(SD15_UNET, SD15_VAE, PAPER_TASKS, (256, 256), SD15_WEIGHTS, memory=24 * 10**9, stand_in=npu)
    assert 11.6e9 < needed.memory_bytes < 1.4 * 11.6e9


def test_attention_grows_with_the_fourth_power_of_the_side() -> None:
    small, large = sd15(512, 512), sd15(1024, 1024)
    assert large.scores_bytes == 16 * small.scores_bytes and large.features_bytes == 4 * small.features_bytes
    assert small.scores_bytes == 2.5 * 4 * 2 * 8 * 4096**2  # float32, batch 2, 8 heads, 64x64 tokens
    assert sd15(512, 512, tasks=PAPER_TASKS).scores_bytes == 1.5 * small.scores_bytes  # editing has a batch of 3


def test_what_cannot_be_built_here_is_refused_with_a_size_that_can() -> None:
    assert sd15(512, 512).fits and sd15(512, 512).require() is None
    for height, width in ((4096, 4096), (99968, 99968), (2048, 4096)):
        plan = sd15(height, width)
        with pytest.raises(ConfigError, match=f"building {width}x{height} pictures needs about") as caught:
            plan.require()
        assert caught.value.exit_code == EXIT_USAGE and "--build-memory" in str(caught.value.hint)
        assert plan.smaller is not None and f"--size {plan.smaller} fits" in str(caught.value.hint)
        fitting_width, fitting_height = map(int, plan.smaller.split("x"))
        assert sd15(fitting_height, fitting_width).fits
        assert (fitting_height < fitting_width) is (height < width)


def test_where_no_size_fits_none_is_named() -> None:
    plan = sd15(512, 512, 6e9)
    assert plan.fits is False and plan.smaller is None
    with pytest.raises(ConfigError, match=r"which has 6\.00 GB") as caught:
        plan.require()
    assert "--size" not in str(caught.value.hint)


def test_only_what_cannot_even_be_exported_ends_a_plan() -> None:
    assert sd15(2048, 2048, 16e9).fits is False
    sd15(2048, 2048, 16e9).require_export()
    with pytest.raises(ConfigError):
        sd15(99968, 99968, 16e9).require_export()


def test_this_machine_is_asked_unless_told() -> None:
    assert sd15(512, 512, None).available_bytes == host_memory()
    assert (host_memory() or 0) > 1e9


def test_time_grows_with_the_work_and_the_machine_is_measured() -> None:
    work = {"t2i": 10**12}
    once = rough_seconds(work, {"t2i": 1000.0}, 10**9, flops=1e11)
    more = rough_seconds(work, {"t2i": 2000.0}, 10**9, flops=1e11)
    assert more - once == pytest.approx(2e15 / 4e10)
    assert rough_seconds(work, {"t2i": 1000.0}, 10**9, flops=1e12) < once
    assert machine_flops(64) > 1e6
    assert "hours" in str(HostPlan("8x8", 1, 1, 1, 1, None, seconds=once))


def test_json_says_it_is_an_estimate() -> None:
    data = json.loads(json.dumps(sd15(512, 512).to_json()))
    assert "estimated" in data["method"] and data["fits"] is True
    assert data["memory_bytes"] == sd15(512, 512).memory_bytes


@pytest.mark.parametrize(("run", "size"), [(build, 4096), (build, 99968), (plan, 99968)])
def test_it_is_refused_before_anything_is_exported(mtu_pipeline_dir: Path, tmp_path: Path, run: Any, size: int) -> None:
    begun = []

    class Stages(Progress):
        @contextmanager
        def stage(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
            begun.append(name)
            yield lambda done: None

    limits: Any = {"precision": "fp32", "size": (size, size), "build_memory": 24 * 10**9}
    options: Any = PlanOptions(mtu_pipeline_dir, **limits)
    if run is build:
        options = BuildOptions(mtu_pipeline_dir, tmp_path / "bundle", **limits)
    with pytest.raises(ConfigError, match=f"building {size}x{size} pictures"):
        run(options, Stages())
    assert begun == ["load"] and not (tmp_path / "bundle").exists()


AMOUNTS = [("16GB", 16 * 10**9), ("16GiB", 16 * 2**30), ("1.5 tb", 1.5e12), ("800MB", 8 * 10**8), ("8g", 8e9)]


@pytest.mark.parametrize(("text", "amount"), AMOUNTS)
def test_amounts_of_memory(text: str, amount: float) -> None:
    assert Memory().convert(text, None, None) == amount


@pytest.mark.parametrize("text", ["16", "GB", "-1GB", "0GB", "1e9GB", "lots"])
def test_what_is_no_amount_of_memory_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        Memory().convert(text, None, None)
