"""A factor of LoRA starts from one value, whoever fills it: it depends on its name and the seed alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft import LoraConfig
from torch import nn

import am_ckpt
import am_peft


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5))


def with_lora(device: str, adapter_dtype: torch.dtype | None, init_lora_weights: bool | str) -> nn.Module:
    with torch.device(device):
        model = layers()
    config = LoraConfig(r=3, target_modules=["0", "2"], init_lora_weights=init_lora_weights)
    return am_peft.apply_lora(model, config, adapter_dtype=adapter_dtype)


@pytest.mark.parametrize("init_lora_weights", [True, False, "gaussian"])
@pytest.mark.parametrize("adapter_dtype", [None, torch.bfloat16])
def test_a_loader_and_initialise_lora_start_from_the_same_values(
    init_lora_weights: bool | str, adapter_dtype: torch.dtype | None, tmp_path: Path
) -> None:
    base = layers().state_dict()
    safetensors.torch.save_file(base, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    loaded = with_lora("meta", adapter_dtype, init_lora_weights)
    am_ckpt.load_hf(loaded, tmp_path, initialise=("*lora_*",), seed=5)
    filled = with_lora("cpu", adapter_dtype, init_lora_weights)
    filled.load_state_dict(base, strict=False)
    am_peft.initialise_lora(filled, seed=5)
    expected = filled.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
