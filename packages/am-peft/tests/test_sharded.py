from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from am_peft import Adapter, adapter_state_dict, apply_lora, initialise_lora, load_adapter, merge_lora, save_adapter
from am_testing import run_distributed

ROWS = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


def build(device="cpu"):
    """Odd sizes, so that shards are uneven; a trained head besides the adapters."""
    from peft import LoraConfig

    torch.manual_seed(0)
    with torch.device(device):
        model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
    return apply_lora(model, LoraConfig(r=3, target_modules=["0", "2"], modules_to_save=["4"]))


def fill(model):
    """Non-zero B, the same on every rank."""
    generator = torch.Generator().manual_seed(2)
    state = {name: torch.randn(value.shape, generator=generator) for name, value in adapter_state_dict(model).items()}
    Adapter(model).load_state_dict(state)
    return state


def shard(model):
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    # The head is a group of its own, the adapted layers belong to the root's.
    fully_shard(model[4], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def train_step(model, rows):
    model(rows).square().sum().backward()


def single():
    model = build()
    fill(model)
    train_step(model, ROWS)
    grads = {name: parameter.grad for name, parameter in Adapter(model).named_parameters()}
    return model, grads


def fsdp_job(folder):
    model = build()
    fill(model)
    shard(model)
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    train_step(model, ROWS.chunk(size)[rank])
    # FSDP averages over ranks; the loss here is a sum.
    grads = {name: parameter.grad.full_tensor() * size for name, parameter in Adapter(model).named_parameters()}
    frozen = [
        name
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad and parameter.grad is not None
    ]
    state = adapter_state_dict(model)
    save_adapter(model, folder)
    initialise_lora(model, seed=7)
    started = adapter_state_dict(model)
    fill(model)
    output = model(ROWS)
    merge_lora(model)
    return grads, frozen, state, started, output.detach(), model(ROWS).detach()


@pytest.mark.parametrize("world_size", [2, 3])
def test_fsdp2_gives_the_gradients_and_states_of_one_process(world_size, tmp_path):
    model, expected = single()
    for grads, frozen, state, started, output, merged in run_distributed(fsdp_job, world_size, str(tmp_path)):
        assert grads.keys() == expected.keys()
        for name, grad in grads.items():
            assert (grad - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max()
        assert frozen == []
        for name, value in adapter_state_dict(model).items():
            assert torch.equal(state[name], value)
        other = build()
        initialise_lora(other, seed=7)
        for name, value in adapter_state_dict(other).items():
            if "lora_" in name:
                assert torch.equal(started[name], value)
        reference = model(ROWS)
        assert (output - reference).abs().max() <= 1e-5 * reference.abs().max()
        assert (merged - reference).abs().max() <= 1e-5 * reference.abs().max()
    plain = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if "lora_" not in name})
    loaded = load_adapter(plain, tmp_path)
    assert torch.equal(loaded(ROWS), model(ROWS))


def meta_job():
    model = shard(build("meta"))
    model.to_empty(device="cpu")
    initialise_lora(model, seed=7)
    return adapter_state_dict(model)


def test_values_do_not_depend_on_the_layout_when_built_on_meta():
    model = build()
    initialise_lora(model, seed=7)
    expected = {name: value for name, value in adapter_state_dict(model).items() if "lora_" in name}
    for state in run_distributed(meta_job, 2):
        for name, value in expected.items():
            assert torch.equal(state[name], value)


def ddp_job():
    model = build()
    fill(model)
    wrapped = DistributedDataParallel(model)
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    train_step(wrapped, ROWS.chunk(size)[rank])
    return {name: parameter.grad * size for name, parameter in Adapter(model).named_parameters()}


def test_ddp_gives_the_gradients_of_one_process():
    _, expected = single()
    for grads in run_distributed(ddp_job, 2):
        for name, grad in grads.items():
            assert (grad - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max()
