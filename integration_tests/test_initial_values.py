"""A parameter starts from one value, whoever fills it: it depends on its name and the seed alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft import LoraConfig
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig

import am_ckpt
import am_mesh
import am_models
import am_peft
from am_testing import run_distributed


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


def started(family: str) -> dict[str, torch.Tensor]:
    """Every value of a model that was built with an adapter, laid out over all ranks and only then filled."""
    config = AutoConfig.for_model(family, vocab_size=64, num_hidden_layers=2, hidden_size=48)
    with torch.device("meta"):
        model = am_models.AutoModelForCausalLM.from_config(config)
    if family == "mamba":
        am_peft.apply_lora(model, LoraConfig(r=3, target_modules=["in_proj"]))
    size = torch.distributed.get_world_size()
    am_mesh.parallelize(model, am_mesh.ParallelDims(dp_shard=size).build("cpu"), strategy="fsdp2")
    am_ckpt.load_hf(model, None, initialise=("*",), initialiser=am_models.initial_value, seed=5)
    values = {name: whole(parameter) for name, parameter in model.named_parameters()}
    if family == "mamba":
        am_peft.initialise_lora(model, seed=5)
        assert all(torch.equal(whole(p), values[name]) for name, p in model.named_parameters())
    return values


def whole(parameter: torch.Tensor) -> torch.Tensor:
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()


@pytest.mark.parametrize("family", ["gpt2", "mamba"])
def test_a_random_model_starts_as_its_family_says_on_every_layout(family: str) -> None:
    one = run_distributed(started, 1, family)[0]
    for size in (2, 4):
        values = run_distributed(started, size, family)[size - 1]
        assert all(torch.equal(value, one[name]) for name, value in values.items())
    if family == "gpt2":
        assert one["transformer.h.1.mlp.c_fc.weight"].std() == pytest.approx(0.02, rel=0.1)
        assert one["transformer.h.1.mlp.c_proj.weight"].std() == pytest.approx(0.01, rel=0.1)
    else:
        assert one["backbone.layers.1.mixer.dt_proj.bias"].mean() < -3
        assert any(value.any() for name, value in one.items() if "lora_A" in name)
