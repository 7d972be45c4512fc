"""Losses of a head and of logits that are DTensors, cut along the vocabulary, against one process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from am_loss import linear_cross_entropy
from am_testing import run_distributed


def assert_near(actual, expected, tolerance):
    """`max|a - b| <= tolerance * max|b|`."""
    assert (actual.double() - expected.double()).abs().max() <= tolerance * expected.double().abs().max()


def cut(tensor, dim=0):
    """A leaf that is `Shard(dim)` over all ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return distribute_tensor(tensor.detach(), mesh, [Shard(dim)]).requires_grad_(tensor.requires_grad)


def linear(sharded):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(2, 12, 6), torch.randn(31, 6), torch.randn(31)
    labels = torch.randint(31, (2, 12))
    labels[:, ::3] = -100
    hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
    if sharded:
        weight, bias = cut(weight), cut(bias)
    loss = linear_cross_entropy(hidden, weight, labels, bias=bias, softcap=4.0, scale=0.3, z_loss=0.05, chunk_size=5)
    loss.backward()
    grads = [weight.grad, bias.grad]
    return [loss.detach(), hidden.grad, *(grad.full_tensor() if sharded else grad for grad in grads)]


def test_linear_cross_entropy():
    for results in run_distributed(linear, 3, True):
        for actual, expected in zip(results, linear(False)):
            assert_near(actual, expected, 1e-6)
