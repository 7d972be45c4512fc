"""What model families ask of whole runs beyond the llama of the other tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from integration_tests import runs


def written(folder: Path, **changes: object) -> Path:
    """The tiny config with dotted keys changed, as a file."""
    config = runs.changed(runs.shipped("tiny.yaml"), changes)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_a_windowed_model_trains_where_a_rank_runs_out_of_rows(tmp_path: Path) -> None:
    # Five validation rows on two ranks: the last micro-batch of the second has one token of padding.
    config = written(
        tmp_path,
        **{
            "model.config.model_type": "mistral",
            "model.config.sliding_window": 64,
            "validation_dataset.split": "train[:5]",
            "packed_sequence": None,
            "step_scheduler.max_steps": 2,
            "step_scheduler.val_every_steps": 1,
            "step_scheduler.ckpt_every_steps": 2,
            "lr_scheduler": None,
        },
    )
    one, two = (runs.metrics(runs.train(tmp_path, f"run-{size}", config, None, size)) for size in (1, 2))
    assert len(one) == 5
    for mine, theirs in zip(two, one, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


def test_the_heads_of_a_mixture_are_as_wide_as_the_config_says(tmp_path: Path) -> None:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 40}
    config = written(
        tmp_path,
        **{f"model.config.{key}": value for key, value in ({"model_type": "qwen3_moe"} | sizes).items()},
        **{"step_scheduler.max_steps": 1, "validation_dataset": None, "lr_scheduler": None},
        **{"step_scheduler.val_every_steps": None, "step_scheduler.ckpt_every_steps": 1},
    )
    run_dir = runs.train(tmp_path, "run", config)
    weights = runs.tensors(run_dir / "checkpoints" / "latest" / "model")
    assert weights["model/model.layers.0.self_attn.q_proj.weight"].shape == (4 * 40, 64)
