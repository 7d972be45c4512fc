from __future__ import annotations

import pytest
import torch

from am_loss import cross_entropy


def plain_sum(logits, labels, ignore_index=-100, softcap=None, scale=None, z_loss=0.0):
    """The definition, one token at a time, in float64."""
    total = logits.new_zeros(())
    for row, label in zip(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1).tolist()):
        if label == ignore_index:
            continue
        values = row * (1.0 if scale is None else scale)
        values = values if softcap is None else softcap * torch.tanh(values / softcap)
        log_sum = torch.log(torch.exp(values).sum())
        total = total + log_sum - values[label] + z_loss * log_sum**2
    return total


@pytest.mark.parametrize(("softcap", "scale"), [(None, None), (3.0, None), (None, 0.25), (5.0, 2.0)])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_value_and_gradient_equal_the_definition(softcap, scale, z_loss):
    logits = torch.randn(2, 7, 13, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(13, (2, 7))
    labels[0, 2:5] = -100
    expected = plain_sum(logits, labels, softcap=softcap, scale=scale, z_loss=z_loss)
    (expected_grad,) = torch.autograd.grad(expected, logits)
    loss = cross_entropy(logits, labels, softcap=softcap, scale=scale, z_loss=z_loss)
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-14)


def test_custom_ignore_index_is_honoured():
    logits = torch.randn(5, 4, dtype=torch.float64)
    labels = torch.tensor([0, -1, 3, -1, 2])
    expected = plain_sum(logits, labels, ignore_index=-1)
    torch.testing.assert_close(cross_entropy(logits, labels, ignore_index=-1), expected, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match=r"label -1 is outside \[0, 4\)"):
        cross_entropy(logits, labels)


def test_bfloat16_logits_are_summed_in_float32():
    logits = torch.randn(300, 50).bfloat16()
    labels = torch.randint(50, (300,))
    loss = cross_entropy(logits, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), plain_sum(logits.double(), labels), rtol=1e-6, atol=0)


def test_ignored_rows_may_hold_nan_and_all_ignored_is_a_connected_zero():
    logits = torch.randn(4, 6)
    logits[1] = float("nan")
    logits.requires_grad_()
    labels = torch.tensor([1, -100, 2, 3])
    cross_entropy(logits, labels).backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[1] == 0).all()
    logits.grad = None
    loss = cross_entropy(logits, torch.full((4,), -100))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros(4, 6))


def test_labels_are_not_changed():
    labels = torch.tensor([1, -100, 2])
    cross_entropy(torch.randn(3, 4), labels)
    assert labels.tolist() == [1, -100, 2]
