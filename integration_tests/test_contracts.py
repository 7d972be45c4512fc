"""What a user adds by `_target_` without editing the tree: dataset, stream, collate, loss, family, sink."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from integration_tests import runs

MINE = "integration_tests.user_code"
BASE: dict[str, Any] = {
    "recipe": "sft",
    "model": {
        "dtype": "float32",
        "config": {
            "model_type": "llama",
            "vocab_size": 2048,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    },
    "tokenizer": {"name_or_path": "recipes/data/tiny/tokenizer"},
    "dataset": {"_target_": f"{MINE}.WeightedRows"},
    "step_scheduler": {"global_batch_size": 4, "local_batch_size": 2, "max_steps": 3},
    "optimizer": {"lr": 1e-3},
}


def run(tmp_path: Path, name: str = "run", **changes: Any) -> tuple[tuple[int, str], Path]:
    """The outcome of the command for `BASE` with values at dotted paths, dots written `__`; its run directory."""
    config = runs.changed(BASE, {path.replace("__", "."): value for path, value in changes.items()})
    file = tmp_path / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    return runs.command(str(file), "--run_dir", str(tmp_path / name)), tmp_path / name


def finished(tmp_path: Path, name: str = "run", **changes: Any) -> Path:
    outcome, run_dir = run(tmp_path, name, **changes)
    assert outcome[0] == 0, outcome[1]
    return run_dir


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in runs.metrics(run_dir) if "loss" in row]


def test_a_weight_per_token_of_a_users_dataset_reaches_a_users_loss(tmp_path: Path) -> None:
    target = {"_target_": f"{MINE}.weighted_cross_entropy"}
    # Without training the loss is linear in the weights; weights of 1 give cross-entropy.
    still = {"optimizer__lr": 0.0, "loss_fn": target}
    once, thrice = (
        losses(finished(tmp_path, f"weight-{weight}", dataset__weight=weight, **still)) for weight in (1.0, 3.0)
    )
    plain_dataset = {"dataloader__collate": {"_target_": f"{MINE}.without_weights"}}
    plain = losses(finished(tmp_path, "plain", optimizer__lr=0.0, **plain_dataset))
    assert thrice == pytest.approx([3 * loss for loss in once], rel=1e-6)
    assert once == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("pack_size", [0, 64])
def test_a_users_dataset_trains_packed_and_padded(tmp_path: Path, pack_size: int) -> None:
    loss = {"loss_fn": {"_target_": f"{MINE}.weighted_cross_entropy"}}
    run_dir = finished(tmp_path, packed_sequence={"packed_sequence_size": pack_size}, **loss)
    assert len(losses(run_dir)) == 3
    assert losses(run_dir)[-1] < losses(run_dir)[0]


def test_a_stream_trains_and_continues_where_it_was(tmp_path: Path) -> None:
    stream = {"dataset": {"_target_": f"{MINE}.Counting"}, "dataloader": {"shuffle": False, "prefetch": 2}}
    constant = {"step_scheduler__ckpt_every_steps": 2}
    whole = finished(tmp_path, "whole", **stream, **constant, step_scheduler__max_steps=5)
    finished(tmp_path, "parts", **stream, **constant, step_scheduler__max_steps=3)
    parts = finished(tmp_path, "parts", **stream, **constant, step_scheduler__max_steps=5)
    runs.assert_same_run(parts, whole)


def test_a_stream_that_ends_says_so_and_loses_nothing(tmp_path: Path) -> None:
    stream = {"dataset": {"_target_": f"{MINE}.Few"}, "dataloader": {"shuffle": False}}
    steps = {"global_batch_size": 2, "local_batch_size": 1, "max_steps": 9, "num_epochs": 1, "ckpt_every_steps": 2}
    (status, text), run_dir = run(tmp_path, **stream, step_scheduler=steps)
    assert status == 1
    assert "the data ended after step 3 of 9, which is committed; lower step_scheduler.max_steps" in text
    assert (run_dir / "error.txt").read_text().startswith("Traceback")
    assert (run_dir / "checkpoints" / "latest").readlink() == Path("step_000003")
    run_dir = finished(tmp_path, **stream, step_scheduler=steps | {"num_epochs": 3})
    assert [row["step"] for row in runs.metrics(run_dir)] == list(range(1, 10))


def test_a_collate_that_gives_what_the_contract_asks_for_and_no_more(tmp_path: Path) -> None:
    run_dir = finished(tmp_path, dataloader__collate={"_target_": f"{MINE}.bare"})
    assert [row["tokens"] for row in runs.metrics(run_dir)] == [32, 32, 32]
    assert [row["target_tokens"] for row in runs.metrics(run_dir)] == [28, 28, 28]


def test_a_users_collate_and_family_are_used(tmp_path: Path) -> None:
    family = {"model__family": {"_target_": f"{MINE}.careful_llama"}}
    collate = {"dataloader__collate": {"_target_": f"{MINE}.to_sixteen"}}
    loss = {"loss_fn": {"_target_": f"{MINE}.weighted_cross_entropy"}}
    run_dir = finished(tmp_path, **family, **collate, **loss)
    reference = finished(tmp_path, "reference", **loss)
    notes = " ".join(" ".join(json.loads((run_dir / "run.json").read_text())["notes"]).split())
    assert "stock: norm (no norm of llama" in notes
    assert re.search(r"on our kernels: [a-z, ]*rope", notes)
    assert losses(run_dir) == pytest.approx(losses(reference), rel=1e-5)


def test_a_users_sink_sees_every_step(tmp_path: Path) -> None:
    file = tmp_path / "losses.json"
    loss = {"loss_fn": {"_target_": f"{MINE}.weighted_cross_entropy"}}
    run_dir = finished(tmp_path, sinks=[{"_target_": f"{MINE}.LossesOnly", "file": str(file)}], **loss)
    assert json.loads(file.read_text()) == {"status": "finished", "losses": losses(run_dir)}


@pytest.mark.parametrize(
    ("changes", "patterns"),
    [
        (
            {
                "dataset": {"_target_": f"{MINE}.Counting"},
                "dataloader": {"shuffle": False},
                "step_scheduler": {"global_batch_size": 4, "local_batch_size": 2, "num_epochs": 1},
            },
            [r"run.yaml:\d+: step_scheduler: max_steps=None, max_tokens=None: the dataset is a stream"],
        ),
        (
            {
                "dataset": {"_target_": f"{MINE}.Counting"},
                "dataloader": {"shuffle": False},
                "step_scheduler__max_tokens": 99,
            },
            [r"step_scheduler: max_steps=3, max_tokens=99: the dataset is a stream, .*; give max_steps, and it alone"],
        ),
        ({"dataset": {"_target_": f"{MINE}.Counting"}}, [r"stream", r"shuffle=False"]),
        ({"dataset": {"_target_": f"{MINE}.WithoutLengths"}}, [r"lengths", r"am_data.Dataset"]),
        (
            {"dataloader__collate": {"_target_": f"{MINE}.to_sixteen_but_the_labels"}},
            [r"shift_labels \[1, 15\] against input_ids \[1, 16\]"],
        ),
        ({"loss_fn": {"_target_": f"{MINE}.mean_cross_entropy"}}, [r"loss_fn gave .* a loss is the SUM"]),
        (
            {"model__family": {"_target_": f"{MINE}.misspelt_llama"}},
            [r"LlamaRMSNrom", r"LlamaRMSNorm"],
        ),
    ],
    ids=[
        "stream without max_steps",
        "stream with max_tokens",
        "shuffled stream",
        "lengths",
        "collate",
        "mean",
        "family",
    ],
)
def test_what_breaks_a_contract_is_refused_before_the_first_step(
    tmp_path: Path, changes: Mapping[str, Any], patterns: list[str]
) -> None:
    outcome, run_dir = run(tmp_path, **changes)
    # A class that lacks members is a TypeError, which also shows the way to it.
    status, text = outcome
    assert status in (1, 2), text
    assert all(re.search(pattern, text) for pattern in patterns), text
    assert not (run_dir / "metrics.jsonl").exists() or losses(run_dir) == []
