"""Training: what changes and what does not, resuming to the digit, and bad data and checkpoints."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import load_file

from mtu_compile.cli.train import command
from mtu_compile.cli.upcycle import command as upcycle
from mtu_compile.core.errors import ConfigError, InputError, ModelError
from mtu_compile.core.progress import Progress
from mtu_compile.core.tasks import PAPER_TASKS, Task
from mtu_compile.model import data as training_data
from mtu_compile.model import train as module
from mtu_compile.model.pipeline import MTUPipeline
from mtu_compile.model.recipe import DROPOUT, drop_conditions, learning_rate, loss_weights
from mtu_compile.model.text import Encoded
from mtu_compile.model.train import export, train
from mtu_compile.model.train_config import StepReport, TrainConfig
from mtu_compile.model.upcycle import upcycle_folder

WEIGHTS = Path("unet/diffusion_pytorch_model.safetensors")


@pytest.fixture
def config(mtu_pipeline_dir: Path, data_dir: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        model=mtu_pipeline_dir, data=data_dir, output=tmp_path / "out", steps=6, batch_size=2, learning_rate=1e-3,
        save_every=3, mask_variants=2, ema=0.9, cpu=True,
    )  # fmt: skip


def run(config: TrainConfig) -> list[StepReport]:
    reports: list[StepReport] = []
    train(config, on_step=reports.append)
    return reports


def losses(reports: list[StepReport]) -> list[Any]:
    return [(report.step, report.loss, report.losses) for report in reports]


def test_experts_change_and_the_backbone_does_not(config: TrainConfig, mtu_pipeline_dir: Path) -> None:
    run(config)
    before, after = load_file(mtu_pipeline_dir / WEIGHTS), load_file(config.output / WEIGHTS)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    trained = (".ff.experts.", ".ff.norm.", ".ff.router.", "task_conv_in.", "task_embedding.")
    assert all(any(part in name for part in trained) for name in changed)
    for part in trained:
        assert any(part in name for name in changed), part
    for part in ("vae", "text_encoder"):
        weights = next((mtu_pipeline_dir / part).glob("*.safetensors")).name
        old, new = load_file(mtu_pipeline_dir / part / weights), load_file(config.output / part / weights)
        assert all(torch.equal(old[name], new[name]) for name in old)


def test_the_output_is_a_pipeline_with_the_story_of_its_training(config: TrainConfig) -> None:
    reports = run(config)
    made = MTUPipeline.from_pretrained(config.output)(task="t2i", seed=0, num_inference_steps=2).images[0]
    assert made.size == (32, 32)
    story = json.loads((config.output / "training.json").read_text())
    assert story["steps"] == 6 and story["finished"] and story["config"]["seed"] == 0
    assert [row["loss"] for row in story["losses"]] == [report.loss for report in reports]
    assert story["hardware"]["cpus"] and len(story["model_sha256"]) == 64 and story["hours"] >= 0
    assert list((config.work_folder / "log").glob("events*"))
    assert not list(config.output.parent.glob(".*"))


@pytest.mark.parametrize("options", [{}, {"streaming": True, "accumulate": 2}], ids=["cached", "streaming"])
def test_resuming_continues_the_losses_to_the_digit(config: TrainConfig, tmp_path: Path, options: Any) -> None:
    whole = replace(config, output=tmp_path / "whole", **options)
    parts = replace(config, output=tmp_path / "parts", **options)
    expected = run(whole)
    first = run(replace(parts, stop_at=3))
    second = run(replace(parts, resume=True))
    assert losses(first) + losses(second) == losses(expected)
    weights, again = load_file(whole.output / WEIGHTS), load_file(parts.output / WEIGHTS)
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_cached_and_direct_data_are_the_same_data(config: TrainConfig, tmp_path: Path) -> None:
    """Text-to-image, editing and super-resolution; inpainting draws its masks elsewhere."""
    config = replace(config, tasks=("t2i", "edit", "sr"), steps=2)
    cached = run(replace(config, output=tmp_path / "cached"))
    direct = run(replace(config, output=tmp_path / "direct", cache_gb=0.0))
    for a, b in zip(cached, direct, strict=True):
        assert a.losses == pytest.approx(b.losses, rel=1e-4)


def test_the_cache_is_used_and_follows_the_data(
    config: TrainConfig, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(data_dir, tmp_path / "data")
    config = replace(config, data=tmp_path / "data", tasks=("sr",), steps=1, force=True)
    encoded: list[int] = []
    original = training_data.encode_set
    monkeypatch.setattr(training_data, "encode_set", lambda *args: encoded.append(1) or original(*args))
    run(config)
    run(config)
    assert len(encoded) == 1
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "data" / "sr" / "0.png")
    run(config)
    assert len(encoded) == 2


def test_ema_is_the_average_of_the_weights(config: TrainConfig) -> None:
    """With the decay (1 + n) / (10 + n), capped, as in diffusers."""
    run(replace(config, save_every=1, keep=10))
    checkpoints = sorted((config.work_folder / "checkpoints").iterdir())
    assert len(checkpoints) == 6
    name = "task_embedding.weight"
    expected = load_file(config.model / WEIGHTS)[name]
    for i, folder in enumerate(checkpoints):
        decay = min(0.9, (1 + i) / (10 + i)) if i else 0.0
        expected = decay * expected + (1 - decay) * load_file(folder / "weights.safetensors")[name]
        assert torch.allclose(load_file(folder / "ema.safetensors")[name], expected, atol=1e-6)
    assert torch.allclose(load_file(config.output / WEIGHTS)[name], expected, atol=1e-6)


def test_only_the_last_checkpoints_are_kept_and_none_is_a_pickle(config: TrainConfig) -> None:
    run(replace(config, save_every=1))
    checkpoints = sorted((config.work_folder / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["checkpoint-0000005", "checkpoint-0000006"]
    names = ["ema.safetensors", "optimizer.safetensors", "state.json", "weights.safetensors"]
    assert sorted(path.name for path in checkpoints[0].iterdir()) == names


def test_export_writes_the_output_of_the_last_checkpoint(config: TrainConfig, tmp_path: Path) -> None:
    run(config)
    export(replace(config, output=tmp_path / "peek", work=config.work_folder, save_dtype="float16"))
    whole, peek = load_file(config.output / WEIGHTS), load_file(tmp_path / "peek" / WEIGHTS)
    assert all(torch.equal(whole[name].half(), peek[name]) for name in whole)


@pytest.mark.parametrize("name", ["weights.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_named(config: TrainConfig, checkpoint: Path, name: str, harm: str) -> None:
    shutil.copytree(checkpoint, config.work_folder / "checkpoints" / checkpoint.name)
    file = config.work_folder / "checkpoints" / checkpoint.name / name
    content = bytearray(file.read_bytes())
    if harm == "remove":
        file.unlink()
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content[: len(content) // 2] if harm == "truncate" else content)
    with pytest.raises(ModelError, match=str(file)) as error:
        train(replace(config, resume=True))
    assert error.value.exit_code == 5 and error.value.hint
    assert not config.output.exists()


@pytest.fixture(scope="module")
def checkpoint(mtu_pipeline_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    config = TrainConfig(mtu_pipeline_dir, data_dir, folder / "out", tasks=("t2i",), steps=1, batch_size=2, cpu=True)
    train(config)
    return next((config.work_folder / "checkpoints").iterdir())


def test_an_earlier_run_is_neither_mixed_up_nor_thrown_away(config: TrainConfig) -> None:
    run(replace(config, steps=3))
    shutil.rmtree(config.output)
    with pytest.raises(ConfigError, match="earlier run") as error:
        train(config)
    assert error.value.hint and "--resume" in error.value.hint
    with pytest.raises(ConfigError, match="learning_rate"):
        train(replace(config, resume=True, learning_rate=1.0))
    assert [report.step for report in run(replace(config, resume=True))] == [4, 5, 6]
    assert [report.step for report in run(replace(config, force=True, steps=1))] == [1]


def test_an_existing_output_is_refused_before_the_work(config: TrainConfig) -> None:
    config.output.mkdir()
    (config.output / "thesis.txt").write_text("years of work")
    for options in ({}, {"force": True}, {"resume": True}):
        with pytest.raises(ConfigError, match="exists"):
            train(replace(config, **options))
    assert not config.work_folder.exists()


def test_a_run_out_of_time_leaves_a_pipeline_and_goes_on(config: TrainConfig) -> None:
    result = train(replace(config, max_hours=0.0))
    assert result.step == 1 and not result.finished and (config.output / WEIGHTS).is_file()
    assert [report.step for report in run(replace(config, resume=True))] == [2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ('{"file_name": "gone.png"}', "gone.png"),
        ('{"file_name": "../t2i/0.png"}', "outside"),
        ('{"file_name": "check.png"}', "not a picture"),
        ('{"file_name": 3}', "file_name is 3, expected text or null"),
        ('{"prompt": "a"}', "needs file_name"),
        ('{"file_name": "0.png"}', "needs image_file_name"),
        ("{", "not JSON"),
        ("[]", r"line 1 is \[\], expected an object"),
        ("", "no rows"),
    ],
)
def test_bad_data_is_named(config: TrainConfig, data_dir: Path, tmp_path: Path, row: str, named: str) -> None:
    shutil.copytree(data_dir, tmp_path / "data")
    (tmp_path / "data" / "edit" / "metadata.jsonl").write_text(row)
    if "check.png" in row:
        row = '{"file_name": "check.png", "image_file_name": "0.png"}'
        (tmp_path / "data" / "edit" / "metadata.jsonl").write_text(row)
    with pytest.raises(InputError, match=named) as error:
        train(replace(config, data=tmp_path / "data", tasks=("edit",)))
    assert error.value.exit_code == 5 and not config.output.exists()


def test_what_may_not_be_meant_in_the_rows_is_said_once(config: TrainConfig, data_dir: Path, tmp_path: Path) -> None:
    class Notes(Progress):
        def note(self, message: str) -> None:
            said.append(message)

    said: list[str] = []
    shutil.copytree(data_dir / "inpaint", tmp_path / "data/inpaint")
    for name, value in (("black.png", 0), ("ones.png", 1), ("dark.png", 100)):
        Image.new("L", (32, 32), value).save(tmp_path / "data/inpaint" / name)
    rows = [
        {"file_name": "0.png", "prompt": "fits", "mask_file_name": "black.png"},
        {"file_name": "1.png", "prompt": "words that are too many", "mask_file_name": "ones.png"},
        {"file_name": "2.png", "prompt": "and even more words than those", "mask_file_name": "dark.png"},
    ]
    (tmp_path / "data/inpaint/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(replace(config, data=tmp_path / "data", tasks=("inpaint",), steps=1, batch_size=1), progress=Notes())
    prompts, empty, ones, full = said
    assert "inpaint: 2 of 3 prompts" in prompts and "line 2: the prompt has 19 tokens" in prompts
    assert "2 of 3 masks" in empty and "line 1: the mask selects nothing" in empty
    assert "1 of 3 masks" in ones and "1 is taken for white" in ones and "line 2: the mask selects all" in full


def test_missing_task_folder_names_the_task(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(InputError, match="'t2i'"):
        train(replace(config, data=tmp_path / "data"))


def test_a_fifth_task_trains_by_data_alone(config: TrainConfig, base_pipeline_dir: Path, tmp_path: Path) -> None:
    tasks = (*PAPER_TASKS, Task("colour", ("image",), "text", 2.0))
    upcycle_folder(base_pipeline_dir, tmp_path / "mtu", tasks, num_experts=2, d_task=8, router_width=8)
    shutil.copytree(config.data, tmp_path / "data")
    shutil.copytree(tmp_path / "data" / "edit", tmp_path / "data" / "colour")
    reports = run(replace(config, model=tmp_path / "mtu", data=tmp_path / "data", steps=2))
    assert list(reports[0].losses) == ["t2i", "edit", "sr", "inpaint", "colour"]


def test_a_single_task_network_sees_what_the_multi_task_network_sees_of_its_task(
    config: TrainConfig, base_pipeline_dir: Path, tmp_path: Path
) -> None:
    """Untrained, all networks are the pretrained one: equal losses mean equal data, noise, timesteps and masks."""
    config = replace(config, steps=4, learning_rate=1e-30)
    together = run(config)
    for task in ("sr", "inpaint"):
        arguments = [str(base_pipeline_dir), "-o", str(tmp_path / task), "--experts", "1", "--task", task]
        made = CliRunner().invoke(upcycle, [*arguments, "--d-task", "8", "--router-width", "8"])
        assert made.exit_code == 0, made.output
        alone = run(replace(config, model=tmp_path / task, output=tmp_path / f"{task}-out"))
        wanted = [report.losses[task] for report in together]
        assert [report.losses[task] for report in alone] == pytest.approx(wanted, rel=1e-4)
        assert len({round(loss, 6) for loss in wanted}) == len(wanted)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_of_a_perfect_network_is_zero(
    config: TrainConfig, mtu_pipeline_dir: Path, tmp_path: Path, prediction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network's target is the scheduler's: noise, or velocity sqrt(abar) ε - sqrt(1 - abar) x."""
    shutil.copytree(mtu_pipeline_dir, tmp_path / "mtu")
    scheduler_file = tmp_path / "mtu" / "scheduler" / "scheduler_config.json"
    scheduler_file.write_text(json.dumps({**json.loads(scheduler_file.read_text()), "prediction_type": prediction}))
    seen: list[Any] = []

    def oracle(run: Any, batch: Any) -> Any:
        abar = run.noise.alphas_cumprod[batch.timesteps][:, None, None, None]
        noisy = abar.sqrt() * batch.latents + (1 - abar).sqrt() * batch.noise
        velocity = abar.sqrt() * batch.noise - (1 - abar).sqrt() * batch.latents
        target = batch.noise if prediction == "epsilon" else velocity

        def model(sample: Any, *args: Any, **kwargs: Any) -> Any:
            assert torch.allclose(sample[:, :4], noisy, atol=1e-5)
            return (target,)

        monkeypatch.setattr(run, "model", model)
        seen.append(original(run, batch))
        raise StopIteration

    original = module._losses
    monkeypatch.setattr(module, "_losses", oracle)
    with pytest.raises(StopIteration):
        train(replace(config, model=tmp_path / "mtu"))
    assert seen[0].shape == (4,) and seen[0].max() < 1e-9


def test_conditions_are_dropped_as_often_as_guidance_needs() -> None:
    n = 20_000
    batch = training_data.Batch(torch.zeros(n, 4, 1, 1), torch.ones(n, 5, 1, 1), torch.ones(n, 2, 3), torch.ones(n, 2))
    empty = Encoded(torch.zeros(1, 2, 3), torch.zeros(1, 2))
    for guidance, expected in DROPOUT.items():
        task = Task("x", ("image",), guidance)  # type: ignore[arg-type]
        left = drop_conditions(task, batch, empty, np.random.default_rng(0))
        no_text, no_condition = left.text[:, 0, 0] == 0, left.condition[:, 0, 0, 0] == 0
        assert torch.equal(left.pooled[:, 0] == 0, no_text)
        shares = [(no_text & ~no_condition), (~no_text & no_condition), (no_text & no_condition)]
        assert [float(share.float().mean()) for share in shares] == pytest.approx(expected, abs=0.006)


def test_every_example_is_met_once_an_epoch() -> None:
    order = training_data.Shuffled(10, seed=3)
    first, second = [int(i) for i in order(0, 10)], [int(i) for i in order(10, 10)]
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert [int(i) for i in order(7, 6)] == (first + second)[7:13]


def test_min_snr_weights() -> None:
    """min(SNR, γ) / SNR for ε, min(SNR, γ) / (SNR + 1) for v, never below the floor."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    for prediction in ("epsilon", "v_prediction"):
        noise = DDPMScheduler(**betas, prediction_type=prediction, rescale_betas_zero_snr=prediction != "epsilon")
        snr = (noise.alphas_cumprod / (1 - noise.alphas_cumprod)).double()
        weights = loss_weights(noise, 5.0).double()
        expected = snr.clamp(max=5) / (snr if prediction == "epsilon" else snr + 1)
        inside = expected > 0.1
        assert torch.allclose(weights[inside], expected[inside], rtol=1e-4) and weights.min() >= 0.0999
        assert torch.equal(loss_weights(noise, None), torch.ones(1000))
    with pytest.raises(ModelError, match="sample"):
        loss_weights(DDPMScheduler(prediction_type="sample"), None)


def test_learning_rate_rises_and_falls(config: TrainConfig) -> None:
    config = replace(config, steps=100, warmup=0.1, learning_rate=1.0)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0 and rates[55] == pytest.approx(0.5) and rates[99] < 1e-3
    assert learning_rate(replace(config, schedule="constant"), 99) == 1.0
    with pytest.raises(ConfigError):
        replace(config, ema=1.0)


def test_the_command_trains_in_bf16(config: TrainConfig) -> None:
    arguments = [str(config.model), "--data", str(config.data), "-o", str(config.output), "--steps", "2"]
    arguments += ["--batch-size", "2", "--mixed-precision", "bf16", "--log-every", "1", "--task", "t2i", "--task", "sr"]
    result = CliRunner().invoke(command, [*arguments, "--cpu", "--gradient-checkpointing", "--min-snr", "5"])
    assert result.exit_code == 0, result.output
    assert "step 1/2" in result.stderr and "step 2 of 2" in result.stdout
    quiet = CliRunner().invoke(command, [*arguments, "--cpu", "--quiet", "--force"])
    assert quiet.exit_code == 0 and quiet.output == ""
