"""Layouts as a user has them: checked by a dry run on a laptop, and changed between two launches of one run."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from integration_tests import runs
from integration_tests.test_resume import CONFIG, SHORT

TP, CP = "distributed.tp_size", "distributed.cp_size"
Q_PROJ = "model.layers.*.self_attn.q_proj"
# Recipe, what is set in the config, and what a dry run on one process says of it.
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("sft", {TP: 3}, r"distributed: tp=3 does not divide num_attention_heads=4; choose 1 or 2 or 4"),
    ("vlm", {TP: 4}, r"distributed: tp=4 does not divide num_key_value_heads=2; choose 1 or 2"),
    (
        "kd",
        {TP: 2, "teacher_model.config.num_key_value_heads": 1},
        r"teacher_distributed: tp=2 does not divide num_key_value_heads=1; choose 1",
    ),
    (
        "sft",
        {TP: 2, "distributed.tp_plan": {"model.layers.*.self_attn.q_prj": "colwise"}},
        rf"self_attn.q_prj of the plan matches no .*; the nearest are {re.escape(Q_PROJ)}",
    ),
    ("sft", {TP: 2, "distributed.tp_plan": {Q_PROJ: "colwse"}}, r"unknown style 'colwse'; did you mean colwise"),
    ("sft", {CP: 2, "kernels": "off"}, r"kernels: off: with distributed.cp_size=2 a rank holds a part of each"),
    ("sft", {CP: 2, "kernels": {"attention": "sdpa"}}, r"kernels.attention: sdpa: with distributed.cp_size=2"),
    (
        "sft",
        {CP: 2, "model.config.attention_dropout": 0.1},
        r"kernels: .*attention_dropout=0.1 needs transformers' own attention; no attention can be given",
    ),
    ("sft", {"distributed.dp_size": 3, "distributed.cp_size": 2}, r"local_batch_size=1 \* world_size=3 = 3; choose 3"),
]


@pytest.mark.parametrize(("recipe", "changes", "said"), WRONG, ids=[str(number) for number in range(len(WRONG))])
def test_a_dry_run_on_one_process_checks_a_layout_of_many(
    tmp_path: Path, recipe: str, changes: dict[str, Any], said: str
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(runs.changed(runs.shipped(runs.TINY[recipe]), changes)))
    status, text = runs.command(str(config), "--run_dir", str(tmp_path / "run"), "--dry-run")
    assert status in (1, 2)
    assert re.search(said, text), text


def stop(processes: list[Any], run_dir: Path, before: str | None) -> str:
    """Tell one rank alone to stop, once there is another checkpoint; the name of the latest then."""
    latest = run_dir / "checkpoints" / "latest"
    while not (latest.is_symlink() and os.readlink(latest) != before):
        assert all(process.is_alive() for process in processes)
        time.sleep(0.01)
    os.kill(processes[-1].pid, signal.SIGTERM)
    assert runs.finish(processes) == 75
    return os.readlink(latest)


def test_a_run_goes_on_under_another_layout_as_if_it_had_never_been_one(tmp_path: Path) -> None:
    """An adapter, merged at the end: its losses, norms, and the folder that stock transformers open."""
    lora = {
        "peft": "{r: 4, lora_alpha: 8, target_modules: all-linear}",
        "export.merge_adapter": "true",
        # Windows of documents that ranks have to share.
        "distributed.cp_layout": "contiguous",
    }
    reference = runs.train(tmp_path, "one", CONFIG, SHORT | lora)
    run_dir, latest = tmp_path / "run", None
    for layout in ({TP: "2", "distributed.sequence_parallel": "true"}, {CP: "2"}):
        latest = stop(runs.start(CONFIG, run_dir, SHORT | lora | layout, 2), run_dir, latest)
    runs.train(tmp_path, "run", CONFIG, SHORT | lora | {TP: "2", "distributed.strategy": "ddp"}, 2)
    rows, expected = runs.metrics(run_dir), runs.metrics(reference)
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-5)
    ours, theirs = runs.tensors(run_dir / "export"), runs.tensors(reference / "export")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        # AdamW divides by what is small in the first steps, so weights tell less than losses.
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-4 * value.abs().max().item())
    _, loaded = AutoModelForCausalLM.from_pretrained(run_dir / "export", output_loading_info=True)
    assert not any(loaded.values())
