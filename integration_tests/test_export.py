"""What a run leaves behind opens in the tools people use: stock transformers, stock peft."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from am_recipes import configs, sft
from integration_tests import runs

CONFIG = runs.ROOT / "recipes" / "configs" / "tiny.yaml"
SHORT = {"step_scheduler.max_steps": "3", "step_scheduler.val_every_steps": "3"}
LORA = [("peft.r", "4"), ("peft.target_modules", "all-linear")]


def run(run_dir: Path, *overrides: tuple[str, str]) -> Path:
    assert sft.main(configs.parse(CONFIG, [("run_dir", str(run_dir)), *SHORT.items(), *overrides])) == 0
    return run_dir


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of three steps of every parameter, on one process."""
    return runs.train(tmp_path_factory.mktemp("full"), "run", CONFIG, SHORT)


def logits(model: torch.nn.Module, tokenizer_folder: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    ids = tokenizer("Name three colours of the rainbow.", return_tensors="pt").input_ids
    generated = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert generated.shape[1] > ids.shape[1]
    with torch.no_grad():
        return model.eval()(ids).logits


def close(value: torch.Tensor, reference: torch.Tensor) -> bool:
    return bool((value - reference).abs().max() <= 1e-5 * reference.abs().max())


def test_full_export_is_the_trained_model(full: Path) -> None:
    exported = AutoModelForCausalLM.from_pretrained(full / "export")
    # The trained weights, straight from the checkpoint's shards into a stock model.
    trained = AutoModelForCausalLM.from_config(exported.config)
    weights: dict[str, torch.Tensor] = {}
    for shard in (full / "checkpoints" / "latest" / "model").glob("*.safetensors"):
        weights |= safetensors.torch.load_file(shard)
    missing, unexpected = trained.load_state_dict(weights, strict=False)
    assert unexpected == []
    assert missing == ["lm_head.weight"]
    trained.tie_weights()
    assert close(logits(exported, full / "export"), logits(trained, full / "export"))


# peft 0.21 reads a flag by the name that transformers 5.23 has renamed.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapter_export_opens_in_peft_and_equals_the_merged_one(full: Path, tmp_path: Path) -> None:
    base = full / "export"
    lora = [("model.config", "null"), ("model.name_or_path", str(base)), ("model.dtype", "auto"), *LORA]
    adapter = run(tmp_path / "adapter", *lora)
    merged = run(tmp_path / "merged", *lora, ("export.merge_adapter", "true"))
    assert not (merged / "export" / "adapter_config.json").exists()
    stored = json.loads((adapter / "export" / "adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == str(base)
    # It finds its base by itself, as does peft with a base at hand.
    model = peft.AutoPeftModelForCausalLM.from_pretrained(adapter / "export")
    fused = AutoModelForCausalLM.from_pretrained(merged / "export")
    ours = logits(model, base)
    assert close(logits(fused, merged / "export"), ours)
    with model.disable_adapter():
        assert not close(logits(model, base), ours), "the adapter changes nothing"


def test_an_adapter_without_a_base_is_refused() -> None:
    with pytest.raises(configs.ConfigError, match=r"export\.merge_adapter is false with model\.config"):
        configs.parse(CONFIG, LORA)


@pytest.mark.parametrize("recipe", ["tiny.yaml", "pretrain/tiny.yaml", "kd/tiny.yaml"])
def test_a_merge_that_would_fail_at_the_end_is_refused_at_the_start(recipe: str, tmp_path: Path) -> None:
    options = ["--peft.r", "2", "--peft.target_modules", "[lm_head]", "--export.merge_adapter", "true"]
    file, run_dir = f"recipes/configs/{recipe}", tmp_path / "run"
    outcome = runs.command(file, "--run_dir", str(run_dir), "--model.config.tie_word_embeddings", "true", *options)
    runs.require_refusal(outcome, 2, r"export\.merge_adapter", "cannot merge 'lm_head': its weight is shared as model")
    assert not run_dir.exists()


def test_an_export_folder_with_other_files_is_refused_at_the_start(tmp_path: Path) -> None:
    """Where a run is already; before one is there, the whole directory is refused."""
    run_dir = run(tmp_path / "run", ("export.enabled", "false"))
    (run_dir / "export").mkdir()
    (run_dir / "export" / "notes.txt").touch()
    before = (run_dir / "run.json").read_bytes()
    options = [f"--{key}={value}" for key, value in SHORT.items()]
    outcome = runs.command(str(CONFIG), "--run_dir", str(run_dir), *options)
    runs.require_refusal(outcome, 1, r"export is not replaced: it holds notes\.txt")
    assert (run_dir / "run.json").read_bytes() == before


def launched(run_dir: Path) -> None:
    """Two ranks of FSDP2 by the command that a user types."""
    command = [sys.executable, "-m", "am_recipes.cli", "finetune", "llm", "-c", str(CONFIG), "--nproc-per-node", "2"]
    options = {"run_dir": str(run_dir), "distributed.strategy": "fsdp2"} | SHORT
    subprocess.run([*command, *(word for key, value in options.items() for word in (f"--{key}", value))], check=True)


def forked(run_dir: Path) -> None:
    """Two ranks of DDP, without a launcher."""
    runs.train(run_dir.parent, run_dir.name, CONFIG, SHORT | {"distributed.strategy": "ddp"}, world_size=2)


@pytest.mark.parametrize("start", [launched, forked])
def test_two_ranks_equal_one_process(start: Callable[[Path], None], full: Path, tmp_path: Path) -> None:
    start(tmp_path / "two")
    for mine, theirs in zip(runs.metrics(full), runs.metrics(tmp_path / "two"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    exports = [AutoModelForCausalLM.from_pretrained(folder / "export") for folder in (full, tmp_path / "two")]
    for (name, mine), (_, theirs) in zip(*(model.named_parameters() for model in exports), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6, msg=name)
