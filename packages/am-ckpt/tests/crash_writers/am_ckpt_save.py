"""The Checkpointer, with retention: for crash_matrix.py."""

from __future__ import annotations

import torch

import am_ckpt

# The first optimizer imports torch._dynamo, which takes a second: before the forks.
torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)


def state(value):
    model = torch.nn.Linear(64, 64)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, value)
    return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=float(value))}


def save(folder, value):
    am_ckpt.Checkpointer(folder, keep_last=1).save(value, state(value))


def load(folder):
    loaded = state(9)
    step = am_ckpt.Checkpointer(folder).load(loaded)
    values = {float(x) for p in loaded["model"].parameters() for x in p.unique()}
    assert values == {float(step)}, (step, values)
    assert loaded["optimizer"].param_groups[0]["lr"] == step
    return step
