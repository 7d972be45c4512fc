"""The checkpoint of a run, merged from its shards, is the run's export."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch

import am_ckpt
from am_recipes import configs, sft


def trained(run_dir: Path, *overrides: tuple[str, str]) -> Path:
    """The folder of a run of two steps."""
    steps = [("step_scheduler.max_steps", "2"), ("step_scheduler.val_every_steps", "2")]
    assert sft.main(configs.parse("recipes/configs/tiny.yaml", [("run_dir", str(run_dir)), *steps, *overrides])) == 0
    return run_dir


def require_merged_is_export(run_dir: Path, merged: Path, name: str) -> None:
    am_ckpt.merge(run_dir / "checkpoints" / "latest", merged)
    ours = safetensors.torch.load_file(merged / name)
    exported = safetensors.torch.load_file(run_dir / "export" / name)
    assert ours.keys() == exported.keys()
    assert all(torch.equal(ours[key], exported[key]) for key in ours)
    assert am_ckpt.verify(merged, full=True).problems == []


def test_merged_checkpoint_is_the_export(tmp_path: Path) -> None:
    model = trained(tmp_path / "model")
    require_merged_is_export(model, tmp_path / "merged", "model.safetensors")
    base = [("model.config", "null"), ("model.name_or_path", str(model / "export"))]
    adapter = trained(tmp_path / "adapter", *base, ("peft.r", "4"), ("peft.target_modules", "all-linear"))
    require_merged_is_export(adapter, tmp_path / "merged_adapter", "adapter_model.safetensors")
