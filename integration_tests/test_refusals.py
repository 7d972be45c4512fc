"""What a run refuses, with file, line and key; and a dry run refuses the same with the same words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from integration_tests import runs

LORA = {"peft": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}, "export.merge_adapter": True}
TABLE = {"model_type": "gpt2", "vocab_size": 2048, "n_positions": 16, "n_embd": 32, "n_layer": 1, "n_head": 2}
STREAM = {
    "dataset": {"_target_": "integration_tests.user_code.Counting"},
    "dataloader": {"shuffle": False},
    "packed_sequence": None,
}
# Recipe, what is set in the config beside the wrong value, the key that is wrong, its value, and what is said.
WRONG: list[tuple[str, dict[str, Any], str, Any, str]] = [
    ("sft", LORA, "peft.r", 0, r"r=0 must be a positive integer"),
    ("sft", LORA, "peft.lora_dropout", 1.5, r"lora_dropout=1.5 must be in \[0, 1\)"),
    ("sft", LORA, "peft.lora_alpha", -3, "lora_alpha=-3 must be a positive number"),
    ("sft", LORA, "peft.target_modules", ["q_prj"], "entry 'q_prj' matches no module.*q_proj"),
    ("sft", {}, "dataset.max_length", -5, "max_length=-5 must be at least 1"),
    ("sft", {}, "dataset.path", "recipes/data/chat/trian.jsonl", "trian.jsonl"),
    ("sft", {}, "dataset.split", "tset", "tset"),
    ("sft", {}, "validation_dataset.path", "no/such/folder/x", "no/such/folder/x"),
    ("sft", {}, "model.config.hidden_size", 63, "63.* not a multiple of .*heads"),
    ("sft", {}, "model.config.model_type", "lama", "unknown 'lama'; did you mean 'llama'"),
    ("sft", {"model.config": None}, "model.name_or_path", "recipes/data/tiny/modle", "neither an existing folder"),
    ("sft", {"model.config": None}, "model.name_or_path", "./modle", "there is no folder './modle'"),
    ("sft", {"model.config": None}, "model.name_or_path", "recipes/data/tiny/tokenizer", "has no config.json"),
    ("sft", {}, "tokenizer.name_or_path", "recipes/data/tiny/tokenzier", "tokenzier"),
    ("sft", {}, "freeze", [{"freeze": "laers.*"}], "laers"),
    ("sft", {}, "optimizer.param_group_overrides", [{"pattern": "lm_hed", "lr_mult": 2.0}], "lm_hed"),
    ("sft", {}, "lr_scheduler.warmup_steps", 1000, "warmup_steps=1000"),
    ("sft", {}, "packed_sequence.packed_sequence_size", 8, "8"),
    ("sft", {}, "kernels", {"atention": "off"}, "atention"),
    ("sft", {}, "loss_fn", {"_target_": "integration_tests.user_code.mean_cross_entropy"}, "SUM"),
    ("sft", {}, "run_dir", "README.md/x", "README.md is a file"),
    ("pretrain", {}, "dataset.path", "recipes/data/pretrain/tarin_*.bin", "tarin_"),
    ("pretrain", {}, "step_scheduler.max_tokens", 10**9, "num_epochs=1 of the dataset are"),
    ("pretrain", {}, "dataset.sequence_length", 10**7, "10000000|10,000,000"),
    ("kd", {}, "teacher_model.config.num_attention_heads", 5, "5"),
    ("kd", {"kd_ratio": 0.5}, "loss_fn", {"_target_": "am_loss.linear_cross_entropy", "z_loss": 0.1}, "kd_ratio 0"),
    ("kd", {"teacher_model.config": TABLE}, "dataset.max_length", 512, "the gpt2 model has a table of n_positions=16"),
    ("sft", STREAM, "step_scheduler.ckpt_every_epoch", True, "a stream, and nobody knows where it ends"),
    ("vlm", {}, "processor.name_or_path", "recipes/data/chat", "has no processor that can be loaded"),
    ("vlm", {}, "dataset.path", "recipes/data/vlm/train.parqet", "train.parqet"),
]


def line_of(text: str, key: str) -> int:
    """The line of a config file as `yaml.safe_dump` writes it, on which `key` or what it stands in is set."""
    lines, number = text.splitlines(), 0
    for depth, part in enumerate(key.split(".")):
        found = [n for n, line in enumerate(lines[number:], start=number) if line.startswith("  " * depth + part + ":")]
        number = found[0]
    return number + 1


def config_with(recipe: str, path: Path, beside: Mapping[str, Any], key: str, value: Any) -> int:
    """Write a tiny config with these values; the line of `key`."""
    base = runs.shipped(runs.TINY[recipe])
    base["step_scheduler"] |= {"max_steps": 2} if recipe != "pretrain" else {}
    path.write_text(yaml.safe_dump(runs.changed(runs.changed(base, beside), {key: value}), sort_keys=False))
    return line_of(path.read_text(), key)


@pytest.mark.parametrize(
    ("recipe", "beside", "key", "value", "said"), WRONG, ids=[f"{row[0]} {row[2]}" for row in WRONG]
)
def test_a_dry_run_refuses_what_the_run_refuses_and_both_say_where(
    tmp_path: Path, recipe: str, beside: dict[str, Any], key: str, value: Any, said: str
) -> None:
    config = tmp_path / "config.yaml"
    line = config_with(recipe, config, beside, key, value)
    in_folder = () if key == "run_dir" else ("--run_dir", str(tmp_path / "run"))
    dry, text = runs.command(str(config), *in_folder, "--dry-run")
    assert dry in (1, 2)
    # The key, or the section where the cause is no single key of it.
    section = key.rpartition(".")[0] or key
    places = "|".join({rf"{line}: {re.escape(key)}", rf"\d+: {re.escape(section)}"})
    assert re.match(rf"(error: )?{re.escape(str(config))}:({places}): ", text), text
    assert re.search(said, text), text
    assert not (tmp_path / "run").exists()
    assert runs.command(str(config), *in_folder) == (dry, text)


def test_a_dry_run_on_one_process_stands_for_the_ranks_of_every_layout(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    layouts = {"distributed.dp_size": 4, "distributed.dp_replicate_size": 2}
    dry = ("--run_dir", str(tmp_path / "run"), "--dry-run")
    config_with("kd", config, layouts, "teacher_distributed", {"dp_size": 4})
    assert runs.command(str(config), *dry) == (0, "")
    config_with("kd", config, layouts, "teacher_distributed", {"dp_size": 3})
    status, text = runs.command(str(config), *dry)
    assert status == 1
    assert "dp_shard=3 * cp=1 * tp=1 = 3 is not world_size=4; nearest legal: " in text
    config_with("sft", config, {}, "distributed.dp_size", 8)
    status, text = runs.command(str(config), *dry)
    assert status == 1
    assert "global_batch_size=4 is not a multiple of local_batch_size=1 * world_size=8" in text


@pytest.mark.parametrize("recipe", runs.TINY)
def test_a_dry_run_of_a_good_config_begins_nothing(
    tmp_path: Path, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = f"recipes/configs/{runs.TINY[recipe]}"
    assert runs.command(config, "--run_dir", str(tmp_path / "run"), "--dry-run") == (
        0,
        "",
    )
    assert capsys.readouterr().out.startswith(f"recipe: {recipe}\n")
    assert list(tmp_path.iterdir()) == []
