from __future__ import annotations

import gc
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import am_loss


def assert_near(actual, expected, tolerance):
    """`max|a - b| <= tolerance * max|b|`."""
    assert (actual.double() - expected).abs().max() <= tolerance * expected.abs().max()


# Two losses as users write them, with the signature that a training loop calls.
def weighted_cross_entropy(
    hidden, weight, shift_labels, *, bias=None, softcap=None, scale=None, shift_weights, chunk_size=None
):
    def loss(logits, targets):
        losses = F.cross_entropy(logits, targets["shift_labels"], reduction="none")
        return (losses * targets["shift_weights"]).sum()

    head = am_loss.Head(hidden, weight, bias, softcap, scale)
    targets = {"shift_labels": shift_labels, "shift_weights": shift_weights}
    return am_loss.chunked(head, targets, loss, chunk_size=chunk_size)


def smooth_focal(hidden, weight, shift_labels, *, bias=None, softcap=None, scale=None, shift_weights, chunk_size=None):
    def loss(logits, targets):
        log_p = F.log_softmax(logits, 1)
        of_label = log_p.gather(1, targets["shift_labels"].unsqueeze(1)).squeeze(1)
        focal = -((1 - of_label.exp()) ** 2) * of_label
        return ((focal - 0.1 * log_p.mean(1)) * targets["shift_weights"]).sum()

    head = am_loss.Head(hidden, weight, bias, softcap, scale)
    targets = {"shift_labels": shift_labels, "shift_weights": shift_weights}
    return am_loss.chunked(head, targets, loss, chunk_size=chunk_size)


def reference(name, inputs, labels, weights, softcap, scale):
    """Loss and gradients in float64, from all logits."""
    inputs = [tensor.detach().double().requires_grad_() for tensor in inputs if tensor is not None]
    mask = labels != -100
    logits, weights, labels = F.linear(*inputs)[mask], weights[mask].double(), labels[mask].long()
    if scale is not None:
        logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    p = torch.softmax(logits, 1)
    of_label = p[torch.arange(len(labels)), labels]
    losses = -of_label.log()
    if name == "smooth_focal":
        losses = (1 - of_label) ** 2 * losses - 0.1 * p.log().mean(1)
    loss = (weights * losses).sum()
    return loss.detach(), torch.autograd.grad(loss, inputs)


def problem(shape, width, vocabulary, dtype, with_bias=True):
    hidden = torch.randn(*shape, width).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width).to(dtype).requires_grad_()
    bias = torch.randn(vocabulary).to(dtype).requires_grad_() if with_bias else None
    labels = torch.randint(vocabulary, shape)
    labels[torch.rand(shape) < 0.3] = -100
    labels.view(-1)[0] = vocabulary - 1
    return hidden, weight, bias, labels, torch.rand(shape)


LOSSES = {"weighted_cross_entropy": weighted_cross_entropy, "smooth_focal": smooth_focal}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("shape", "width", "vocabulary"), [((1, 1), 1, 2), ((2, 19), 16, 101), ((3, 11), 5, 7)])
@pytest.mark.parametrize("chunk_size", [None, 1, 5])
@pytest.mark.parametrize(("softcap", "scale"), [(None, None), (4.0, None), (None, 0.3), (4.0, 0.3)])
def test_a_users_loss_equals_the_reference(name, shape, width, vocabulary, chunk_size, softcap, scale):
    for (dtype, tolerance), with_bias in itertools.product(
        [(torch.float64, 1e-12), (torch.float32, 1e-5)], [True, False]
    ):
        hidden, weight, bias, labels, weights = problem(shape, width, vocabulary, dtype, with_bias)
        expected, grads = reference(name, (hidden, weight, bias), labels, weights, softcap, scale)
        options = {"bias": bias, "softcap": softcap, "scale": scale, "shift_weights": weights}
        loss = LOSSES[name](hidden, weight, labels, chunk_size=chunk_size, **options)
        (2 * loss).backward()
        assert loss.dtype == dtype
        assert_near(loss, expected, tolerance)
        for tensor, grad in zip((hidden, weight, bias), grads):
            assert_near(tensor.grad, 2 * grad, tolerance)


def test_many_blocks_of_bfloat16_are_as_close_as_the_plain_loss():
    # 2**18 elements at a time: 5 rows of this vocabulary.
    hidden, weight, bias, labels, weights = problem((24,), 8, 50_000, torch.bfloat16)
    expected, grads = reference("weighted_cross_entropy", (hidden, weight, bias), labels, weights, None, None)
    mask = labels != -100
    logits = F.linear(hidden[mask], weight, bias).float()
    plain = (F.cross_entropy(logits, labels[mask], reduction="none") * weights[mask]).sum()
    plain_grads = torch.autograd.grad(plain, (hidden, weight, bias))
    loss = weighted_cross_entropy(hidden, weight, labels, bias=bias, shift_weights=weights, chunk_size=11)
    assert loss.dtype == torch.float32
    assert_near(loss, expected, 1e-3)
    for grad, plain_grad, exact in zip(torch.autograd.grad(loss, (hidden, weight, bias)), plain_grads, grads):
        assert (grad.double() - exact).norm() <= 1.5 * (plain_grad.double() - exact).norm()


def cross_entropy_sum(logits, targets):
    return F.cross_entropy(logits, targets["shift_labels"], reduction="sum")


def test_cross_entropy_through_chunked_equals_the_built_in_loss():
    hidden, weight, bias, labels, _ = problem((40,), 8, 50, torch.float64)
    ours = am_loss.linear_cross_entropy(hidden, weight, labels, bias=bias, chunk_size=7)
    theirs = am_loss.chunked(
        am_loss.Head(hidden, weight, bias), {"shift_labels": labels}, cross_entropy_sum, chunk_size=7
    )
    assert_near(theirs, ours, 1e-14)
    inputs = (hidden, weight, bias)
    for grad, expected in zip(torch.autograd.grad(theirs, inputs), torch.autograd.grad(ours, inputs)):
        assert_near(grad, expected, 1e-13)


def test_the_loss_sees_rows_with_a_target_alone_and_targets_of_any_width():
    hidden, weight, _, labels, weights = problem((2, 10), 4, 9, torch.float32)
    with torch.no_grad():
        hidden[labels == -100] = float("nan")
    wide = torch.arange(60.0).view(2, 10, 3)
    seen = []

    def loss(logits, targets):
        assert logits.shape == (len(targets["wide"]), 9)
        assert logits.dtype == torch.float32
        seen.append(targets)
        return logits.sum()

    targets = {"shift_labels": labels.int(), "wide": wide, "weights": weights}
    total = am_loss.chunked(am_loss.Head(hidden, weight), targets, loss, chunk_size=3)
    total.backward()
    mask = labels != -100
    assert torch.equal(torch.cat([part["wide"] for part in seen]), wide[mask])
    assert torch.equal(torch.cat([part["weights"] for part in seen]), weights[mask])
    assert torch.equal(torch.cat([part["shift_labels"] for part in seen]), labels[mask])
    assert max(len(part["wide"]) for part in seen) == 3
    assert torch.isfinite(hidden.grad).all()
    assert (hidden.grad[~mask] == 0).all()


def test_without_targets_a_zero_with_zero_gradients_and_no_call():
    hidden, weight, bias, labels, _ = problem((5,), 4, 9, torch.float32)

    def loss(logits, targets):
        raise AssertionError("no row has a target")

    total = am_loss.chunked(am_loss.Head(hidden, weight, bias), {"shift_labels": torch.full_like(labels, -100)}, loss)
    total.backward()
    assert total.item() == 0.0
    for tensor in (hidden, weight, bias):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_without_gradients_the_loss_is_the_same():
    hidden, weight, bias, labels, weights = problem((2, 19), 16, 101, torch.float32)
    options = {"bias": bias, "shift_weights": weights, "softcap": 4.0, "chunk_size": 5}
    expected = weighted_cross_entropy(hidden, weight, labels, **options)
    with torch.no_grad():
        loss = weighted_cross_entropy(hidden, weight, labels, **options)
    assert not loss.requires_grad
    assert torch.equal(loss, expected)
    weight.requires_grad_(False)
    weighted_cross_entropy(hidden, weight, labels, **options).backward()
    assert weight.grad is None
    assert hidden.grad.abs().max() > 0


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_under_activation_checkpointing(use_reentrant):
    hidden, weight, bias, labels, _ = problem((40,), 8, 50, torch.float32)
    weights = torch.ones(40)
    expected, grads = reference("weighted_cross_entropy", (hidden, weight, bias), labels, weights, None, None)
    calls = []

    def loss(logits, targets):
        calls.append(len(logits))
        return cross_entropy_sum(logits, targets)

    def run(hidden, weight, bias):
        return am_loss.chunked(am_loss.Head(hidden, weight, bias), {"shift_labels": labels}, loss, chunk_size=7)

    total = checkpoint(run, hidden, weight, bias, use_reentrant=use_reentrant)
    num_chunks = len(calls)
    total.backward()
    # Each chunk once more, not all chunks again for each.
    assert len(calls) == 2 * num_chunks
    assert sum(calls) == 2 * int((labels != -100).sum())
    assert_near(total, expected, 1e-6)
    for tensor, grad in zip((hidden, weight, bias), grads):
        assert_near(tensor.grad, grad, 1e-5)


def test_memory_of_a_chunk_is_freed_without_the_garbage_collector():
    hidden, weight, _, labels, _ = problem((6,), 4, 9, torch.float32)
    alive = []

    class Keep(torch.autograd.Function):
        """The identity, which marks how long its graph lives."""

        @staticmethod
        def forward(ctx, logits):
            return logits.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad

        class Mark:
            def __del__(self):
                alive.remove(id(self))

    def loss(logits, targets):
        kept = Keep.apply(logits)
        kept.grad_fn.mark = Keep.Mark()
        alive.append(id(kept.grad_fn.mark))
        return torch.softmax(kept, 1).exp().sum()

    gc.disable()
    try:
        am_loss.chunked(am_loss.Head(hidden, weight), {"shift_labels": labels}, loss, chunk_size=2).backward()
        assert alive == []
    finally:
        gc.enable()


def test_autocast_casts_as_linear_does():
    hidden, weight, _, labels, weights = problem((40,), 8, 50, torch.float32)
    expected = weighted_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels, shift_weights=weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = weighted_cross_entropy(hidden, weight, labels, shift_weights=weights)
    loss.backward()
    assert torch.equal(loss, expected)
    assert weight.grad.dtype == torch.float32


def test_what_would_be_silently_wrong_is_refused():
    hidden, weight, _, labels, weights = problem((10,), 4, 9, torch.float32)
    head = am_loss.Head(hidden, weight)
    targets = {"shift_labels": labels}
    with pytest.raises(ValueError, match=r"targets has \['labels'\] but no 'shift_labels'"):
        am_loss.chunked(head, {"labels": labels}, cross_entropy_sum)
    with pytest.raises(ValueError, match=r"target 'weights' has shape \(9,\); it must start with \(10,\)"):
        am_loss.chunked(head, {**targets, "weights": weights[:9]}, cross_entropy_sum)
    with pytest.raises(ValueError, match="target 'weights' requires a gradient"):
        am_loss.chunked(head, {**targets, "weights": weights.requires_grad_()}, cross_entropy_sum)
    with pytest.raises(ValueError, match=r"returned shape \(\d+,\); return the sum"):
        am_loss.chunked(head, targets, lambda logits, targets: logits.sum(1))
    with pytest.raises(ValueError, match="does not depend on the logits"):
        am_loss.chunked(head, targets, lambda logits, targets: logits.detach().sum())
    with pytest.raises(ValueError, match="does not depend on the logits"):
        am_loss.chunked(head, targets, lambda logits, targets: torch.ones((), requires_grad=True) * 2)
    with pytest.raises(ValueError, match="label 9 is outside"):
        am_loss.chunked(head, {"shift_labels": torch.full_like(labels, 9)}, cross_entropy_sum)
    with pytest.raises(ValueError, match="chunk_size=0"):
        am_loss.chunked(head, targets, cross_entropy_sum, chunk_size=0)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(am_loss.chunked(head, targets, cross_entropy_sum), hidden, create_graph=True)
