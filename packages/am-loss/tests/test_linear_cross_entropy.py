from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from am_loss import cross_entropy, linear_cross_entropy


def reference(hidden, weight, labels, bias=None, softcap=None, scale=None, z_loss=0.0):
    """Loss and gradients (hidden, weight[, bias]) in float64, from materialised logits."""
    inputs = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight, bias) if tensor is not None]
    logits = F.linear(*inputs)
    if scale is not None:
        logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    mask = labels != -100
    loss = F.cross_entropy(logits[mask], labels[mask].long(), reduction="sum")
    loss = loss + z_loss * torch.logsumexp(logits[mask], -1).square().sum()
    return loss.detach(), torch.autograd.grad(loss, inputs)


def problem(tokens, width, vocabulary, dtype=torch.float32, ignored=0.3, spread=1.0):
    hidden = (torch.randn(tokens, width) * spread).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width).to(dtype).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,))
    labels[torch.rand(tokens) < ignored] = -100
    return hidden, weight, labels


def assert_near(actual, expected, tolerance):
    """`max|a - b| <= tolerance * max|b|`."""
    assert (actual.double() - expected).abs().max() <= tolerance * expected.abs().max()


SIZES = [(1, 1, 2), (3, 5, 7), (37, 16, 101), (130, 33, 1000)]


@pytest.mark.parametrize(("tokens", "width", "vocabulary"), SIZES)
@pytest.mark.parametrize("chunk_size", [None, 1, 8])
def test_float32_loss_and_gradients(tokens, width, vocabulary, chunk_size):
    hidden, weight, labels = problem(tokens, width, vocabulary)
    labels[0] = vocabulary - 1
    expected, (hidden_grad, weight_grad) = reference(hidden, weight, labels)
    loss = linear_cross_entropy(hidden, weight, labels, chunk_size=chunk_size)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert_near(loss, expected, 1e-6)
    assert_near(hidden.grad, hidden_grad, 1e-5)
    assert_near(weight.grad, weight_grad, 1e-5)


@pytest.mark.parametrize(
    ("with_bias", "softcap", "scale"), list(itertools.product([False, True], [None, 4.0], [None, 0.3]))
)
@pytest.mark.parametrize("chunk_size", [None, 5])
def test_bias_softcap_and_scale_in_float64(with_bias, softcap, scale, chunk_size):
    hidden, weight, labels = problem(23, 6, 31, torch.float64)
    bias = torch.randn(31, dtype=torch.float64).requires_grad_() if with_bias else None
    expected, grads = reference(hidden, weight, labels, bias, softcap, scale)
    loss = linear_cross_entropy(hidden, weight, labels, bias=bias, softcap=softcap, scale=scale, chunk_size=chunk_size)
    loss.backward()
    assert loss.dtype == torch.float64
    assert_near(loss, expected, 1e-13)
    for tensor, grad in zip((hidden, weight, bias), grads):
        assert_near(tensor.grad, grad, 1e-12)


@pytest.mark.parametrize(("softcap", "scale"), [(None, None), (4.0, 0.3)])
@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_z_loss(softcap, scale, chunk_size, dtype, tolerance):
    hidden, weight, labels = problem(23, 6, 31, dtype)
    bias = torch.randn(31, dtype=dtype).requires_grad_()
    options = {"bias": bias, "softcap": softcap, "scale": scale, "z_loss": 0.05}
    expected, grads = reference(hidden, weight, labels, **options)
    loss = linear_cross_entropy(hidden, weight, labels, chunk_size=chunk_size, **options)
    loss.backward()
    assert_near(loss, expected, tolerance)
    for tensor, grad in zip((hidden, weight, bias), grads):
        assert_near(tensor.grad, grad, tolerance)


def test_without_targets_there_is_no_z_loss():
    hidden, weight, _ = problem(5, 4, 9)
    labels = torch.full((5,), -100)
    for loss in (
        linear_cross_entropy(hidden, weight, labels, z_loss=0.1),
        cross_entropy(F.linear(hidden, weight), labels, z_loss=0.1),
    ):
        assert loss.item() == 0.0
        for grad in torch.autograd.grad(loss, (hidden, weight)):
            assert torch.equal(grad, torch.zeros_like(grad))


def test_batched_hidden_and_int32_labels():
    hidden, weight, labels = problem(24, 6, 31)
    flat = linear_cross_entropy(hidden, weight, labels)
    batched = linear_cross_entropy(hidden.view(2, 12, 6), weight, labels.view(2, 12).int())
    assert torch.equal(flat, batched)
    (grad,) = torch.autograd.grad(batched, hidden)
    assert grad.shape == hidden.shape


def test_hidden_need_not_be_contiguous():
    hidden, weight, labels = problem(12, 8, 31)
    expected, (_, weight_grad) = reference(hidden, weight, labels)
    loss = linear_cross_entropy(hidden.detach().t().contiguous().t().requires_grad_(), weight, labels)
    loss.backward()
    assert_near(loss, expected, 1e-6)
    assert_near(weight.grad, weight_grad, 1e-5)


def test_result_does_not_depend_on_the_chunks():
    hidden, weight, labels = problem(100, 16, 64, torch.float64)
    results = []
    for chunk_size in (1, 7, 33, 100, 4096):
        loss = linear_cross_entropy(hidden, weight, labels, chunk_size=chunk_size)
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    for other in results[1:]:
        for first, second in zip(results[0], other):
            assert_near(second, first, 1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_size", [None, 16])
def test_half_precision_is_as_close_as_the_plain_loss(dtype, chunk_size):
    hidden, weight, labels = problem(200, 64, 500, dtype, spread=0.3)
    expected, grads = reference(hidden, weight, labels)
    mask = labels != -100
    plain = F.cross_entropy(F.linear(hidden[mask], weight).float(), labels[mask], reduction="sum")
    plain_grads = torch.autograd.grad(plain, (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, labels, chunk_size=chunk_size)
    ours = torch.autograd.grad(loss, (hidden, weight))
    assert loss.dtype == torch.float32
    assert ours[1].dtype == dtype
    assert_near(loss, expected, 1e-3)
    for grad, plain_grad, exact in zip(ours, plain_grads, grads):
        error = (grad.double() - exact).norm() / exact.norm()
        plain_error = (plain_grad.double() - exact).norm() / exact.norm()
        assert error <= 1.5 * plain_error


def test_weight_gradient_is_accumulated_in_float32():
    # 4,000 equal contributions far below bf16's resolution of their sum: bf16 accumulation stalls near 256 of them.
    hidden = torch.ones(4000, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    linear_cross_entropy(hidden, weight, torch.zeros(4000, dtype=torch.int64), chunk_size=1).backward()
    assert weight.grad.flatten().tolist() == [-2000.0, 2000.0]


def test_large_logits_do_not_overflow():
    hidden = torch.tensor([[1000.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1]))
    loss.backward()
    assert loss.item() == 2000.0
    assert weight.grad.flatten().tolist() == [1000.0, -1000.0, 0.0]


def test_all_ignored_is_a_zero_with_zero_gradients():
    hidden, weight, _ = problem(5, 4, 9)
    bias = torch.zeros(9, requires_grad=True)
    with torch.no_grad():
        hidden.fill_(float("nan"))
    loss = linear_cross_entropy(hidden, weight, torch.full((5,), -100), bias=bias)
    loss.backward()
    assert loss.item() == 0.0
    for tensor in (hidden, weight, bias):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_ignored_rows_are_not_multiplied_by_the_head():
    hidden, weight, labels = problem(6, 4, 9, ignored=0.0)
    labels[2] = -100
    with torch.no_grad():
        hidden[2] = float("nan")
    linear_cross_entropy(hidden, weight, labels).backward()
    assert torch.isfinite(weight.grad).all()
    assert torch.equal(hidden.grad[2], torch.zeros(4))


class CountProducts(TorchDispatchMode):
    """Counts the multiply-adds of matrix products, those with `out=` included."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        matrices = {"aten::mm": args, "aten::addmm": args[1:], "aten::addmm_": args[1:]}.get(function._schema.name)
        if matrices is not None:
            self.total += matrices[0].shape[0] * matrices[0].shape[1] * matrices[1].shape[1]
        return function(*args, **(kwargs or {}))


def counted_products(function):
    with CountProducts() as count:
        function()
    return count.total


def test_only_required_gradients_are_computed_and_only_for_targets():
    hidden, weight, labels = problem(64, 8, 50, ignored=0.5)
    product = int((labels != -100).sum()) * 8 * 50

    def run():
        linear_cross_entropy(hidden, weight, labels, chunk_size=16)

    assert counted_products(run) == 3 * product
    weight.requires_grad_(False)
    assert counted_products(run) == 2 * product
    hidden.requires_grad_(False)
    assert counted_products(run) == product
    hidden.requires_grad_()
    with torch.no_grad():
        assert counted_products(run) == product


def test_frozen_weight_gets_no_gradient():
    hidden, weight, labels = problem(20, 8, 50)
    _, (hidden_grad, _) = reference(hidden, weight, labels)
    weight.requires_grad_(False)
    linear_cross_entropy(hidden, weight, labels).backward()
    assert weight.grad is None
    assert_near(hidden.grad, hidden_grad, 1e-5)


def peak_bytes(function):
    """Largest number of bytes allocated at one time by torch inside `function`."""
    import torch.profiler

    cpu = [torch.profiler.ProfilerActivity.CPU]
    # Without acc_events torch warns, in 2.11 even of the only cycle, that the next cycle would clear the events.
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profile:
        function()
    now = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def test_memory_does_not_grow_with_tokens_times_vocabulary():
    width, vocabulary, chunk_size = 8, 4000, 64

    def measure(tokens):
        hidden, weight, labels = problem(tokens, width, vocabulary, ignored=0.0)
        return peak_bytes(lambda: linear_cross_entropy(hidden, weight, labels, chunk_size=chunk_size).backward())

    few, many = measure(256), measure(2048)
    # Per token only its row, its gradient and a few scalars; the logits would be 16,000 bytes of it.
    assert (many - few) / (2048 - 256) < 20 * width * 4
    # The logits buffer and the weight's gradient: less than four times both together.
    assert few < 4 * 4 * vocabulary * (chunk_size + width)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_under_activation_checkpointing(use_reentrant):
    hidden, weight, labels = problem(40, 8, 50)
    expected, (hidden_grad, weight_grad) = reference(hidden, weight, labels)
    loss = checkpoint(linear_cross_entropy, hidden, weight, labels, use_reentrant=use_reentrant)
    loss.backward()
    assert_near(loss, expected, 1e-6)
    assert_near(hidden.grad, hidden_grad, 1e-5)
    assert_near(weight.grad, weight_grad, 1e-5)


def test_gradients_accumulate_over_micro_batches():
    hidden, weight, labels = problem(40, 8, 50)
    _, (hidden_grad, weight_grad) = reference(hidden, weight, labels)
    for part in (slice(0, 11), slice(11, 40)):
        (linear_cross_entropy(hidden[part], weight, labels[part]) / 7).backward()
    assert_near(hidden.grad, hidden_grad / 7, 1e-5)
    assert_near(weight.grad, weight_grad / 7, 1e-5)


def test_backward_twice_over_a_retained_graph_gives_the_same():
    hidden, weight, labels = problem(40, 8, 50)
    loss = linear_cross_entropy(hidden, weight, labels)
    first = torch.autograd.grad(loss, (hidden, weight), torch.tensor(3.0), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    for tripled, single in zip(first, second):
        torch.testing.assert_close(tripled, 3 * single)


def test_second_derivative_is_refused():
    hidden, weight, labels = problem(10, 8, 20)
    loss = linear_cross_entropy(hidden, weight, labels)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_autocast_casts_as_linear_does():
    hidden, weight, labels = problem(40, 8, 50, spread=0.3)
    expected = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert torch.equal(loss, expected)
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("z_loss", [-0.1, float("nan"), float("inf")])
def test_impossible_z_loss_is_an_error(z_loss):
    hidden, weight, labels = problem(10, 8, 50)
    with pytest.raises(ValueError, match=rf"z_loss={z_loss} must be finite and not negative; pass 0.0 for none"):
        linear_cross_entropy(hidden, weight, labels, z_loss=z_loss)
    with pytest.raises(ValueError, match=rf"z_loss={z_loss} must be finite and not negative; pass 0.0 for none"):
        cross_entropy(F.linear(hidden, weight), labels, z_loss=z_loss)


@pytest.mark.parametrize("loss_fn", [cross_entropy, linear_cross_entropy])
@pytest.mark.parametrize("label", [-1, 50, 10**6])
def test_impossible_label_is_an_error_with_its_value(loss_fn, label):
    hidden, weight, labels = problem(10, 8, 50)
    labels[3] = label
    arguments = (hidden, weight) if loss_fn is linear_cross_entropy else (F.linear(hidden, weight),)
    with pytest.raises(ValueError, match=rf"label {label} is outside \[0, 50\)"):
        loss_fn(*arguments, labels)


def test_arguments_that_do_not_fit_are_refused():
    hidden, weight, labels = problem(10, 8, 50)
    with pytest.raises(ValueError, match=r"labels has shape \(9,\) but hidden has shape \(10, 8\)"):
        linear_cross_entropy(hidden, weight, labels[:9])
    with pytest.raises(ValueError, match=r"weight has shape \(50, 7\)"):
        linear_cross_entropy(hidden, weight[:, :7], labels)
    with pytest.raises(ValueError, match=r"bias has shape \(49,\)"):
        linear_cross_entropy(hidden, weight, labels, bias=torch.zeros(49))
    with pytest.raises(TypeError, match=r"hidden torch.float32, weight torch.bfloat16"):
        linear_cross_entropy(hidden, weight.bfloat16(), labels)
    with pytest.raises(TypeError, match=r"labels has dtype torch.float32"):
        linear_cross_entropy(hidden, weight, labels.float())
    with pytest.raises(ValueError, match="chunk_size=0"):
        linear_cross_entropy(hidden, weight, labels, chunk_size=0)
    with pytest.raises(ValueError, match="softcap=0"):
        linear_cross_entropy(hidden, weight, labels, softcap=0)
