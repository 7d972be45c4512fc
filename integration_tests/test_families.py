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
