"""The step of micro-batches: its sums and gradients, and what is refused. On several ranks: test_parallelize.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from am_mesh import forward_backward


def rows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 5, generator=generator) for size in (3, 1, 4)]


def test_sums_and_gradients_are_those_of_all_rows_at_once():
    layer, whole = nn.Linear(5, 2), nn.Linear(5, 2)
    whole.load_state_dict(layer.state_dict())
    numbers = []

    def forward(number: int, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        numbers.append(number)
        return {"loss": layer(batch).square().sum(), "rows": torch.tensor(float(len(batch)))}

    sums = forward_backward(layer, rows(), forward, 16)
    expected = whole(torch.cat(rows())).square().sum() / 16
    expected.backward()
    assert numbers == [0, 1, 2]
    assert sums["rows"].item() == 8 / 16
    assert not sums["loss"].requires_grad
    torch.testing.assert_close(sums["loss"], expected.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(layer.weight.grad, whole.weight.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.bias.grad, whole.bias.grad, rtol=1e-5, atol=1e-6)


def test_a_sum_with_a_graph_of_its_own_is_logged_and_trains_nothing():
    layer = nn.Linear(5, 2)

    def forward(number: int, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": layer(batch).sum() * 0.0, "other": layer(batch).sum()}

    sums = forward_backward(layer, rows(), forward, 1)
    assert layer.weight.grad is not None
    assert layer.weight.grad.abs().max() == 0
    assert sums["other"].abs() > 0
    assert not sums["other"].requires_grad


@pytest.mark.parametrize(
    ("sums", "divisor", "message"),
    [
        (lambda number, total: {"loss": total}, 0, r"3 micro-batches and divisor=0: a step needs at least one of each"),
        (lambda number, total: {"ce": total}, 1, r"gave the sums \['ce'\]; it must give 'loss'"),
        (
            lambda number, total: {"loss": total, f"part_{number}": total},
            1,
            r"gave the sums \['loss', 'part_1'\].* the same names: \['loss', 'part_0'\]",
        ),
        (lambda number, total: {"loss": total[None]}, 1, r"gave 'loss' of shape \(1,\); give the sum"),
    ],
)
def test_a_forward_that_gives_something_else_is_refused(sums, divisor, message):
    layer = nn.Linear(5, 2)
    with pytest.raises(ValueError, match=message):
        forward_backward(layer, rows(), lambda number, batch: sums(number, layer(batch).sum()), divisor)


def test_a_step_without_micro_batches_is_refused():
    with pytest.raises(ValueError, match=r"0 micro-batches and divisor=1"):
        forward_backward(nn.Linear(1, 1), [], lambda number, batch: {}, 1)
