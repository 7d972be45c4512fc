"""A model in half precision trains as it would in float32 with products in bfloat16, and is exported as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import am_ckpt
from integration_tests import runs

TINY = runs.shipped("tiny.yaml")
SHORT = {
    # Small next to weights of standard deviation 0.02, as in fine-tuning.
    "optimizer.lr": 1e-5,
    "optimizer.weight_decay": 0.0,
    "lr_scheduler": None,
    "tokenizer": None,
    "packed_sequence.packed_sequence_size": 256,
    "dataset.max_length": 256,
    "dataset.split": "train[:24]",
    "validation_dataset.max_length": 256,
    "validation_dataset.split": "train[:4]",
    "step_scheduler.max_steps": 4,
    "step_scheduler.ckpt_every_steps": 2,
    "step_scheduler.val_every_steps": None,
}


def base(folder: Path, dtype: torch.dtype, **config: Any) -> Path:
    """A model in half precision, as a Hugging Face folder."""
    torch.manual_seed(0)
    made = AutoConfig.for_model(**TINY["model"]["config"] | config)
    AutoModelForCausalLM.from_config(made, dtype=dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY["tokenizer"]["name_or_path"]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bfloat16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base(tmp_path_factory.mktemp("base") / "bfloat16", torch.bfloat16)


def config(folder: Path, model: Path, **changes: Any) -> Path:
    """The tiny config over `model`; `__` in a keyword stands for a dot."""
    fields = {name.replace("__", "."): value for name, value in changes.items()}
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(runs.changed(TINY | {"model": {"name_or_path": str(model)}}, SHORT | fields)))
    return file


def train(folder: Path, model: Path, world_size: int = 1, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    return runs.train(folder, "run", config(folder, model, **changes), world_size=world_size)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name.split("/", 1)[1]: value for name, value in runs.tensors(folder).items()}


def masters(run_dir: Path) -> dict[str, torch.Tensor]:
    """What the last checkpoint holds, from the shards of all ranks."""
    merged = run_dir.parent / "masters"
    if not merged.exists():
        am_ckpt.merge(run_dir / "checkpoints" / "latest", merged)
    return weights(merged)


def moved(run_dir: Path, model: Path) -> float:
    """The share of values that training has changed."""
    before, after = weights(model), masters(run_dir)
    changed = sum(int((after[name].float() != value.float()).sum()) for name, value in before.items())
    return changed / sum(value.numel() for value in before.values())


def notes(run_dir: Path) -> str:
    return "\n".join(json.loads((run_dir / "run.json").read_text())["notes"])


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, bfloat16: Path) -> Path:
    """The run of one process whose config says nothing of dtypes."""
    return train(tmp_path_factory.mktemp("kept"), bfloat16)


def test_it_trains_as_in_float32_with_products_in_bfloat16(kept: Path, bfloat16: Path, tmp_path: Path) -> None:
    assert moved(kept, bfloat16) > 0.99
    options = {"model__dtype": "float32", "distributed__param_dtype": "bfloat16"}
    reference = train(tmp_path, bfloat16, **options)
    runs.assert_same_run(kept, reference)
    exported = safetensors.torch.load_file(kept / "export" / "model.safetensors")
    for name, value in masters(reference).items():
        assert torch.equal(exported[name], value.bfloat16())


def test_the_config_may_keep_bfloat16_and_is_told_the_price(kept: Path, bfloat16: Path, tmp_path: Path) -> None:
    run_dir = train(tmp_path, bfloat16, model__dtype="bfloat16")
    assert {value.dtype for value in masters(run_dir).values()} == {torch.bfloat16}
    assert moved(run_dir, bfloat16) < 0.16
    # The share is what is observed: of normal values 84.5 %.
    assert (
        "WARNING model.dtype rounds updates away: a step of 1e-05 (optimizer.lr) is too\nsmall to change 84."
        in notes(run_dir)
    )
    assert "WARNING" not in notes(kept)


@pytest.mark.parametrize(("strategy", "world_size"), [("fsdp2", 2), ("ddp", 2)])
def test_ranks_agree_with_one_process(
    strategy: str, world_size: int, kept: Path, bfloat16: Path, tmp_path: Path
) -> None:
    run_dir = train(tmp_path, bfloat16, world_size, distributed__strategy=strategy)
    for mine, theirs in zip(runs.metrics(run_dir), runs.metrics(kept), strict=True):
        # Products in bfloat16 round the gradients of other micro-batches.
        assert mine == pytest.approx(theirs, rel=2e-3)
    assert moved(run_dir, bfloat16) > 0.99


def test_a_resumed_run_has_lost_no_bit_of_its_weights(kept: Path, bfloat16: Path, tmp_path: Path) -> None:
    file = config(tmp_path, bfloat16)
    processes = runs.start(file, tmp_path / "run", {})
    runs.kill_when(processes, tmp_path / "run" / "checkpoints" / "step_000002")
    assert runs.finish(runs.start(file, tmp_path / "run", {})) == 0
    runs.assert_same_run(tmp_path / "run", kept)


def test_a_merged_checkpoint_rounds_to_the_export(kept: Path, tmp_path: Path) -> None:
    am_ckpt.merge(kept / "checkpoints" / "latest", tmp_path / "merged", dtype="bfloat16")
    ours, exported = weights(tmp_path / "merged"), weights(kept / "export")
    assert all(torch.equal(ours[name], value) for name, value in exported.items())


def test_float16_computes_in_bfloat16(tmp_path: Path) -> None:
    model = base(tmp_path / "base", torch.float16)
    run_dir = train(tmp_path / "full", model)
    assert "precision: trains in float32, computes in bfloat16, exports float16" in notes(run_dir)
    assert {value.dtype for value in weights(run_dir / "export").values()} == {torch.float16}
    adapter = train(tmp_path / "adapter", model, peft={"r": 2, "target_modules": "all-linear"})
    assert "precision: trains in float32, computes in bfloat16" in notes(adapter)
    adapter = train(
        tmp_path / "bfloat16", base(tmp_path / "other", torch.bfloat16), peft={"r": 2, "target_modules": "all-linear"}
    )
    assert "precision: trains in float32, computes in bfloat16" in notes(adapter)


@pytest.mark.parametrize("world_size", [1, 2])
def test_modules_saved_whole_train_in_float32(world_size: int, tmp_path: Path) -> None:
    model = base(tmp_path / "base", torch.bfloat16, tie_word_embeddings=False)
    peft = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    merged = train(tmp_path / "merged", model, world_size, peft=peft, export={"merge_adapter": True})
    assert {value.dtype for value in masters(merged).values()} == {torch.float32}
    exported = weights(merged / "export")
    assert {value.dtype for value in exported.values()} == {torch.bfloat16}
    head = masters(merged)["base_model.model.lm_head.weight"]
    assert torch.equal(exported["lm_head.weight"], head.bfloat16())
    assert (head != weights(model)["lm_head.weight"]).float().mean() > 0.9
