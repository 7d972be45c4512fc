"""What a run leaves behind opens in the tools people use: stock transformers, stock peft."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from am_recipes import configs, sft

ROOT = Path(__file__).resolve().parents[1]
LORA = [("peft.r", "4"), ("peft.target_modules", "all-linear")]


def run(run_dir: Path, *overrides: tuple[str, str]) -> Path:
    short = [("run_dir", str(run_dir)), ("step_scheduler.max_steps", "3"), ("step_scheduler.val_every_steps", "3")]
    assert sft.main(configs.parse("recipes/configs/tiny.yaml", [*short, *overrides])) == 0
    return run_dir


def logits(model: torch.nn.Module, tokenizer_folder: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    ids = tokenizer("Name three colours of the rainbow.", return_tensors="pt").input_ids
    generated = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert generated.shape[1] > ids.shape[1]
    with torch.no_grad():
        return model.eval()(ids).logits


def close(value: torch.Tensor, reference: torch.Tensor) -> bool:
    return bool((value - reference).abs().max() <= 1e-5 * reference.abs().max())


def test_full_export_is_the_trained_model(tmp_path: Path) -> None:
    folder = run(tmp_path / "run")
    exported = AutoModelForCausalLM.from_pretrained(folder / "export")
    # The trained weights, straight from the checkpoint's shards into a stock model.
    trained = AutoModelForCausalLM.from_config(exported.config)
    weights: dict[str, torch.Tensor] = {}
    for shard in (folder / "checkpoints" / "latest" / "model").glob("*.safetensors"):
        weights |= safetensors.torch.load_file(shard)
    missing, unexpected = trained.load_state_dict(weights, strict=False)
    assert unexpected == []
    assert missing == ["lm_head.weight"]
    trained.tie_weights()
    assert close(logits(exported, folder / "export"), logits(trained, folder / "export"))


# peft 0.21 reads a flag by the name that transformers 5.23 has renamed.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapter_export_opens_in_peft_and_equals_the_merged_one(tmp_path: Path) -> None:
    base = run(tmp_path / "base") / "export"
    lora = [("model.config", "null"), ("model.name_or_path", str(base)), ("model.dtype", "auto"), *LORA]
    adapter = run(tmp_path / "adapter", *lora)
    merged = run(tmp_path / "merged", *lora, ("export.merge_adapter", "true"))
    assert not (merged / "export" / "adapter_config.json").exists()
    stored = json.loads((adapter / "export" / "adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == str(base)
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter / "export")
    fused = AutoModelForCausalLM.from_pretrained(merged / "export")
    ours = logits(model, base)
    assert close(logits(fused, merged / "export"), ours)
    with model.disable_adapter():
        assert not close(logits(model, base), ours), "the adapter changes nothing"


def test_an_adapter_without_a_base_is_refused() -> None:
    with pytest.raises(configs.ConfigError, match=r"export\.merge_adapter is false with model\.config"):
        configs.parse("recipes/configs/tiny.yaml", LORA)


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_two_launched_ranks_equal_one_process(strategy: str, tmp_path: Path) -> None:
    one = run(tmp_path / "one")
    command = [sys.executable, "-m", "am_recipes.cli", "finetune", "llm", "-c", "recipes/configs/tiny.yaml"]
    command += ["--nproc-per-node", "2", "--run_dir", str(tmp_path / "two"), "--distributed.strategy", strategy]
    command += ["--step_scheduler.max_steps", "3", "--step_scheduler.val_every_steps", "3"]
    subprocess.run(command, check=True)
    rows = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (one, tmp_path / "two")
    ]
    for mine, theirs in zip(*rows, strict=True):
        for key in mine.keys() - {"time", "tokens_per_second", "peak_memory_bytes"}:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-5), key
    exports = [AutoModelForCausalLM.from_pretrained(folder / "export") for folder in (one, tmp_path / "two")]
    for (name, mine), (_, theirs) in zip(*(model.named_parameters() for model in exports), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6, msg=name)
