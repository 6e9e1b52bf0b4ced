"""An upcycled UNet starts as the pretrained one, and its tasks can then part ways."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from mtu_compile.cli.upcycle import command
from mtu_compile.core.errors import ConfigError, ModelError
from mtu_compile.core.tasks import PAPER_TASKS, Task
from mtu_compile.model.unet import MTUUNet2DConditionModel
from mtu_compile.model.upcycle import upcycle_folder, upcycle_unet

SMALL = {"d_task": 16, "router_width": 16}


def unet_inputs(kind: str, dtype: torch.dtype, batch: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    inputs: dict[str, Any] = {
        "sample": torch.randn(batch, 4, 8, 8, generator=generator, dtype=dtype),
        "timestep": torch.tensor([501.0], dtype=dtype),
        "encoder_hidden_states": torch.randn(batch, 7, 32, generator=generator, dtype=dtype),
    }
    if kind == "sdxl":
        pooled = torch.randn(batch, 32, generator=generator, dtype=dtype)
        sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]], dtype=dtype).expand(batch, -1)
        inputs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes}
    return inputs


@pytest.mark.parametrize("kind", ["sd15", "sd2", "sdxl"])
@pytest.mark.parametrize(
    "options",
    [{"num_experts": n} for n in (1, 2, 4, 8)]
    + [{"num_experts": 4, "norm_per_expert": True}, {"num_experts": 4, "top_k": [4, 2, 1, 2]}],
    ids=lambda options: "-".join(f"{key}={value}" for key, value in options.items()),
)
@torch.no_grad()
def test_every_task_starts_as_the_pretrained_unet(tiny_unet: Any, kind: str, options: dict[str, Any]) -> None:
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        base = torch.nn.Module.to(tiny_unet(kind), dtype)
        upcycled = upcycle_unet(base, PAPER_TASKS, **options, **SMALL).eval()
        inputs = unet_inputs(kind, dtype)
        expected = base(**inputs).sample
        for task in range(len(PAPER_TASKS)):
            # The condition's channels do not matter yet, whatever they hold.
            noisy = torch.cat([inputs["sample"], torch.randn(2, 5, 8, 8, dtype=dtype)], dim=1)
            actual = upcycled(**{**inputs, "sample": noisy}, task_ids=torch.full((2,), task)).sample
            assert (actual - expected).norm() / expected.norm() <= tolerance


def test_sd15_has_the_papers_parameter_count() -> None:
    with torch.device("meta"):
        unet = MTUUNet2DConditionModel(
            tasks=[task.to_json() for task in PAPER_TASKS], num_experts=4, cross_attention_dim=768
        )
    assert sum(p.numel() for p in unet.parameters()) == pytest.approx(869e6, abs=1e6)
    experts = [name for name, _ in unet.named_modules() if name.endswith("ff.experts")]
    assert len(experts) == 16


@torch.no_grad()
def test_tasks_differ_and_a_mixed_batch_equals_batches_of_one_task(tiny_mtu: Any) -> None:
    for options in ({}, {"norm_per_expert": True}, {"top_k": [1, 2, 3, 4]}):
        unet = tiny_mtu("sd15", **options)
        inputs = unet_inputs("sd15", torch.float32, batch=4)
        inputs["sample"] = torch.cat([inputs["sample"], torch.randn(4, 5, 8, 8)], dim=1)
        mixed = unet(**inputs, task_ids=torch.arange(4)).sample
        for task in range(4):
            alone = {key: value if key == "timestep" else value[task : task + 1] for key, value in inputs.items()}
            assert torch.allclose(unet(**alone, task_ids=torch.tensor([task])).sample[0], mixed[task], atol=1e-5)
        same = {key: value[:1].expand(4, *value.shape[1:]) for key, value in inputs.items() if key != "timestep"}
        outputs = unet(**same, timestep=inputs["timestep"], task_ids=torch.arange(4)).sample
        for a in range(4):
            for b in range(a):
                assert (outputs[a] - outputs[b]).norm() / outputs[a].norm() > 1e-2


@torch.no_grad()
def test_padding_channels_do_not_matter(tiny_mtu: Any) -> None:
    unet = tiny_mtu("sd15")
    inputs = unet_inputs("sd15", torch.float32)
    task_ids = torch.zeros(2, dtype=torch.int64)  # text-to-image has no condition
    narrow = unet(**inputs, task_ids=task_ids).sample
    inputs["sample"] = torch.cat([inputs["sample"], torch.randn(2, 5, 8, 8)], dim=1)
    assert torch.allclose(unet(**inputs, task_ids=task_ids).sample, narrow, atol=1e-6)


@torch.no_grad()
def test_a_saved_unet_comes_back_the_same(tiny_mtu: Any, tmp_path: Path) -> None:
    for options in ({"norm_per_expert": True}, {"top_k": [1, 2, 3, 4]}):
        unet = tiny_mtu("sd15", **options)
        unet.save_pretrained(tmp_path)
        again = MTUUNet2DConditionModel.from_pretrained(tmp_path, use_safetensors=True).eval()
        inputs = unet_inputs("sd15", torch.float32)
        inputs["task_ids"] = torch.tensor([1, 3])
        assert torch.equal(again(**inputs).sample, unet(**inputs).sample)
        assert again.tasks == PAPER_TASKS


def test_folder_is_written_whole_and_runs(base_pipeline_dir: Path, tmp_path: Path) -> None:
    arguments = [str(base_pipeline_dir), "-o", str(tmp_path / "mtu"), "--experts", "2", "--d-task", "8"]
    result = CliRunner().invoke(command, [*arguments, "--router-width", "8", "--task", "sr", "--task", "t2i"])
    assert result.exit_code == 0, result.output
    index = json.loads((tmp_path / "mtu" / "model_index.json").read_text())
    assert index["_class_name"] == "MTUPipeline"
    assert index["unet"] == ["mtu_compile.model.unet", "MTUUNet2DConditionModel"]
    config = json.loads((tmp_path / "mtu" / "unet" / "config.json").read_text())
    assert [task["name"] for task in config["tasks"]] == ["sr", "t2i"]
    assert [path.name for path in tmp_path.iterdir()] == ["mtu"]


def test_a_written_pipeline_names_no_folder_of_this_machine(mtu_pipeline_dir: Path, tmp_path: Path) -> None:
    from mtu_compile.model.pipeline import MTUPipeline

    MTUPipeline.from_pretrained(mtu_pipeline_dir).save_pretrained(tmp_path / "saved")
    text = "".join(path.read_text() for path in (tmp_path / "saved").rglob("*.json"))
    assert str(mtu_pipeline_dir) not in text and str(tmp_path) not in text
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in (tmp_path / "saved").rglob("*.safetensors"))


def test_sdxl_components_are_copied_unchanged(sdxl_pipeline_dir: Path, sdxl_mtu_dir: Path) -> None:
    for component in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"):
        for path in (sdxl_pipeline_dir / component).iterdir():
            assert (sdxl_mtu_dir / component / path.name).read_bytes() == path.read_bytes()
    index = json.loads((sdxl_mtu_dir / "model_index.json").read_text())
    assert "text_encoder_2" in index and index["force_zeros_for_empty_prompt"] is True


def test_an_existing_output_is_kept(base_pipeline_dir: Path, tmp_path: Path) -> None:
    precious = tmp_path / "out" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("years of work")
    for force in (False, True):
        with pytest.raises(ConfigError):
            upcycle_folder(base_pipeline_dir, precious.parent, PAPER_TASKS, force=force, **SMALL)
    assert precious.read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_replaces_a_model(base_pipeline_dir: Path, tmp_path: Path) -> None:
    for experts in (1, 2):
        upcycle_folder(base_pipeline_dir, tmp_path / "mtu", PAPER_TASKS, num_experts=experts, force=True, **SMALL)
    assert json.loads((tmp_path / "mtu" / "unet" / "config.json").read_text())["num_experts"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mtu"]


def _truncate(base: Path) -> None:
    path = base / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _remove_weights(base: Path) -> None:
    (base / "unet" / "diffusion_pytorch_model.safetensors").unlink()


def _drop_a_tensor(base: Path) -> None:
    from safetensors.torch import save_file

    path = base / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["conv_in.weight"]
    save_file(tensors, path, {"format": "pt"})


def _pickle(base: Path) -> None:
    path = base / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(path), base / "unet" / "diffusion_pytorch_model.bin")
    path.unlink()


def _break_index(base: Path) -> None:
    (base / "model_index.json").write_text('{"unet": ')


def _break_config(base: Path) -> None:
    (base / "unet" / "config.json").write_text("{")


def _link_out(base: Path) -> None:
    outside = base.parent / "outside.safetensors"
    path = base / "vae" / "diffusion_pytorch_model.safetensors"
    path.rename(outside)
    path.symlink_to(outside)


def _shard_out(base: Path) -> None:
    index = {"metadata": {}, "weight_map": {"conv_in.weight": "../../outside.safetensors"}}
    (base / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def _custom_code(base: Path) -> None:
    index = json.loads((base / "model_index.json").read_text())
    index["unet"] = ["evil", "EvilUNet"]
    (base / "model_index.json").write_text(json.dumps(index))
    (base / "unet" / "evil.py").write_text("raise SystemExit('executed')")


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (_truncate, "diffusion_pytorch_model.safetensors"),
        (_remove_weights, "unet"),
        (_drop_a_tensor, "conv_in.weight"),
        (_pickle, "pickle"),
        (_break_index, "model_index.json"),
        (_break_config, "config.json"),
        (_link_out, "points out of"),
        (_shard_out, "outside"),
        (_custom_code, "evil.EvilUNet"),
    ],
)
def test_a_bad_base_is_refused_and_named(base_pipeline_dir: Path, tmp_path: Path, harm: Any, named: str) -> None:
    base = tmp_path / "base"
    shutil.copytree(base_pipeline_dir, base)
    harm(base)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ModelError, match=named) as error:
        upcycle_folder(base, tmp_path / "mtu", PAPER_TASKS, **SMALL)
    assert error.value.exit_code == 5 and error.value.hint
    assert sorted(tmp_path.iterdir()) == before


def test_a_link_into_the_hugging_face_cache_is_followed(base_pipeline_dir: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--x" / "snapshots" / "0"
    shutil.copytree(base_pipeline_dir, snapshot)
    blob = tmp_path / "models--x" / "blobs" / "0123"
    blob.parent.mkdir()
    weights = snapshot / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(blob)
    weights.symlink_to("../../../blobs/0123")
    upcycle_folder(snapshot, tmp_path / "mtu", PAPER_TASKS, **SMALL)
    assert not (tmp_path / "mtu" / "unet" / "diffusion_pytorch_model.safetensors").is_symlink()


def test_a_folder_that_is_multi_task_is_refused(mtu_pipeline_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="multi-task already"):
        upcycle_folder(mtu_pipeline_dir, tmp_path / "again", PAPER_TASKS)


def test_experts_that_do_not_divide_the_width_are_refused(tiny_unet: Any) -> None:
    with pytest.raises(ModelError, match="3 experts do not divide"):
        upcycle_unet(tiny_unet("sd15"), PAPER_TASKS, num_experts=3, **SMALL)


def test_unets_without_transformers_and_with_conditions_are_refused(tiny_unet: Any) -> None:
    from diffusers import UNet2DConditionModel

    plain = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": 32}
    convolutional = UNet2DConditionModel(
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, mid_block_type=None, **plain
    )
    with pytest.raises(ModelError, match="no transformer blocks"):
        upcycle_unet(convolutional, PAPER_TASKS, **SMALL)
    edit = UNet2DConditionModel(
        in_channels=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **plain,
    )
    with pytest.raises(ModelError, match="takes 8 channels"):
        upcycle_unet(edit, PAPER_TASKS, **SMALL)


def test_tasks_come_from_a_file(base_pipeline_dir: Path, tmp_path: Path) -> None:
    tasks = [Task("t2i", (), "text", 7.5), Task("depth", ("image",), "text", 5.0)]
    (tmp_path / "tasks.json").write_text(json.dumps([task.to_json() for task in tasks]))
    arguments = [str(base_pipeline_dir), "-o", str(tmp_path / "mtu"), "--tasks", str(tmp_path / "tasks.json")]
    result = CliRunner().invoke(command, [*arguments, "--d-task", "8", "--router-width", "8", "--top-k", "2,3"])
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "mtu" / "unet" / "config.json").read_text())
    assert [Task.from_json(task) for task in config["tasks"]] == tasks and config["top_k"] == [2, 3]


@pytest.mark.parametrize(
    "arguments",
    [["--task", "dance"], ["--top-k", "one"], ["--top-k", "1,2"], ["--tasks", "missing.json"]],
)
def test_bad_options_are_usage_errors(base_pipeline_dir: Path, tmp_path: Path, arguments: list[str]) -> None:
    result = CliRunner().invoke(command, [str(base_pipeline_dir), "-o", str(tmp_path / "mtu"), *arguments])
    assert isinstance(result.exception, ConfigError) and result.exception.exit_code == 2
    assert not list(tmp_path.iterdir())
