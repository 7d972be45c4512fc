from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from am_loss import DistillationLoss, distillation, linear_cross_entropy, linear_distillation
from am_testing import run_distributed

DIVERGENCES = ["forward_kl", "reverse_kl", "jensen_shannon"]
STUDENT = [[2.0, 0.5, -1.0], [0.1, 0.2, 0.3]]
TEACHER = [[1.5, 0.0, -0.5], [0.2, -0.1, 0.0]]


def divergence_of(student, teacher, name):
    """The definition, from probabilities: sum over rows."""
    q, p = torch.softmax(student, -1), torch.softmax(teacher, -1)
    if name == "forward_kl":
        return (p * (p / q).log()).sum()
    if name == "reverse_kl":
        return (q * (q / p).log()).sum()
    m = (p + q) / 2
    return ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2


def head(hidden, weight, bias=None, softcap=None, scale=None):
    logits = F.linear(hidden, weight, bias)
    if scale is not None:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class Problem:
    """A student and a teacher of different width, vocabulary padding, dtype and head."""

    def __init__(self, tokens=23, vocabulary=31, teacher_vocabulary=31, dtype=torch.float64, with_bias=True):
        self.student = [torch.randn(tokens, 6), torch.randn(vocabulary, 6)]
        self.teacher = [torch.randn(tokens, 9), torch.randn(teacher_vocabulary, 9) * 0.5]
        if with_bias:
            self.student.append(torch.randn(vocabulary))
            self.teacher.append(torch.randn(teacher_vocabulary))
        self.student = [tensor.to(dtype).requires_grad_() for tensor in self.student]
        self.teacher = [tensor.to(dtype) for tensor in self.teacher]
        self.labels = torch.randint(vocabulary, (tokens,))
        self.labels[torch.rand(tokens) < 0.3] = -100
        self.labels[0] = 1

    def loss(self, rows=slice(None), **options):
        """The loss of `rows`."""
        hidden, weight, *bias = self.student
        teacher_hidden, teacher_weight, *teacher_bias = self.teacher
        return linear_distillation(
            hidden[rows],
            weight,
            self.labels[rows],
            bias=bias[0] if bias else None,
            teacher_hidden=teacher_hidden[rows],
            teacher_weight=teacher_weight,
            teacher_bias=teacher_bias[0] if bias else None,
            **options,
        )

    def gradients(self, loss):
        return torch.autograd.grad(loss, self.student)

    def reference(
        self, divergence, temperature=1.0, kd_ratio=0.5, num_tokens=None, head_options=None, teacher_head=None
    ):
        """(loss, cross entropy, divergence) and gradients in float64, from materialised logits."""
        student = [tensor.detach().double().requires_grad_() for tensor in self.student]
        logits = head(*student, **(head_options or {}))
        teacher_logits = head(*(tensor.double() for tensor in self.teacher), **(teacher_head or {}))
        mask = self.labels != -100
        cross_entropy = F.cross_entropy(logits[mask], self.labels[mask], reduction="sum")
        parts = [values[mask, :num_tokens] / temperature for values in (logits, teacher_logits)]
        divergence = temperature**2 * divergence_of(*parts, divergence)
        loss = (1 - kd_ratio) * cross_entropy + kd_ratio * divergence
        return (loss.detach(), cross_entropy.detach(), divergence.detach()), torch.autograd.grad(loss, student)


def assert_near(actual, expected, tolerance):
    """`max|a - b| <= tolerance * max|b|`."""
    assert (actual.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 0.0264843), (2.0, 0.0451128)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 5e-8), (torch.float32, 2e-7)])
def test_known_numbers(temperature, expected, dtype, tolerance):
    logits, teacher_logits = torch.tensor(STUDENT, dtype=dtype), torch.tensor(TEACHER, dtype=dtype)
    labels, eye = torch.tensor([0, 2]), torch.eye(3, dtype=dtype)
    plain = distillation(logits, teacher_logits, labels, temperature=temperature)
    linear = linear_distillation(
        logits, eye, labels, teacher_hidden=teacher_logits, teacher_weight=eye, kd_ratio=1.0, temperature=temperature
    )
    assert plain.item() / 2 == pytest.approx(expected, abs=tolerance)
    assert linear.divergence.item() / 2 == pytest.approx(expected, abs=tolerance)
    assert linear.loss.item() == linear.divergence.item()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("num_tokens", [None, 29])
def test_distillation_equals_the_definition(divergence, temperature, num_tokens):
    logits = torch.randn(2, 7, 31, dtype=torch.float64, requires_grad=True)
    teacher_logits = torch.randn(2, 7, 31 if num_tokens is None else 40, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(31, (2, 7))
    labels[0, 2:5] = -1
    mask = labels != -1
    parts = [values[mask][:, :num_tokens] / temperature for values in (logits, teacher_logits.detach())]
    expected = temperature**2 * divergence_of(*parts, divergence)
    (expected_grad,) = torch.autograd.grad(expected, logits)
    options = {"divergence": divergence, "temperature": temperature, "num_tokens": num_tokens, "ignore_index": -1}
    loss = distillation(logits, teacher_logits, labels, **options)
    loss.backward()
    assert loss.dtype == torch.float64
    assert_near(loss, expected, 1e-12)
    assert_near(logits.grad, expected_grad, 1e-12)
    assert teacher_logits.grad is None
    half = distillation(logits.bfloat16(), teacher_logits.float(), labels, **options)
    assert half.dtype == torch.float32
    assert_near(half, expected, 2e-2)


HEADS = [({}, {}), ({"softcap": 3.0}, {"scale": 0.5}), ({"softcap": 4.0, "scale": 0.3}, {"softcap": 2.0, "scale": 1.5})]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("head_options", "teacher_head"), HEADS)
@pytest.mark.parametrize("chunk_size", [None, 1, 5])
def test_linear_distillation_in_float64(divergence, temperature, head_options, teacher_head, chunk_size):
    problem = Problem()
    teacher_options = {f"teacher_{name}": value for name, value in teacher_head.items()}
    for kd_ratio in (0.3, 1.0):
        expected, grads = problem.reference(
            divergence, temperature, kd_ratio, head_options=head_options, teacher_head=teacher_head
        )
        options = {"divergence": divergence, "temperature": temperature, "kd_ratio": kd_ratio, "chunk_size": chunk_size}
        result = problem.loss(**options, **head_options, **teacher_options)
        assert isinstance(result, DistillationLoss)
        assert_near(result.loss, expected[0], 1e-12)
        assert_near(result.divergence, expected[2], 1e-12)
        if kd_ratio == 1.0:
            assert result.cross_entropy.item() == 0.0
        else:
            assert_near(result.cross_entropy, expected[1], 1e-13)
        assert result.loss.requires_grad
        assert not result.cross_entropy.requires_grad
        assert not result.divergence.requires_grad
        for actual, grad in zip(problem.gradients(result.loss), grads):
            assert_near(actual, grad, 1e-11)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("vocabulary", "teacher_vocabulary"), [(31, 40), (40, 31), (31, 31)])
@pytest.mark.parametrize("kd_ratio", [0.3, 1.0])
def test_padded_vocabularies(divergence, vocabulary, teacher_vocabulary, kd_ratio):
    problem = Problem(vocabulary=vocabulary, teacher_vocabulary=teacher_vocabulary)
    expected, grads = problem.reference(divergence, 2.0, kd_ratio, num_tokens=29)
    result = problem.loss(divergence=divergence, temperature=2.0, kd_ratio=kd_ratio, num_tokens=29, chunk_size=4)
    assert_near(result.loss, expected[0], 1e-12)
    assert_near(result.divergence, expected[2], 1e-12)
    actual_grads = problem.gradients(result.loss)
    for actual, grad in zip(actual_grads, grads):
        assert_near(actual, grad, 1e-11)
    if kd_ratio == 1.0:
        _, weight_grad, bias_grad = actual_grads
        assert torch.equal(weight_grad[29:], torch.zeros_like(weight_grad[29:]))
        assert torch.equal(bias_grad[29:], torch.zeros_like(bias_grad[29:]))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("chunk_size", [None, 16])
def test_float32_and_bfloat16_are_as_close_as_the_plain_loss(divergence, chunk_size):
    for dtype, value_tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        problem = Problem(200, 500, 500, dtype, with_bias=False)
        expected, grads = problem.reference(divergence, 2.0)
        mask = problem.labels != -100
        logits = F.linear(problem.student[0][mask], problem.student[1])
        teacher_logits = F.linear(problem.teacher[0][mask], problem.teacher[1])
        targets = problem.labels[mask]
        plain = distillation(logits, teacher_logits, targets, divergence=divergence, temperature=2.0)
        plain = (plain + F.cross_entropy(logits.float(), targets, reduction="sum")) / 2
        plain_grads = problem.gradients(plain)
        result = problem.loss(divergence=divergence, temperature=2.0, chunk_size=chunk_size)
        assert [value.dtype for value in result] == [torch.float32] * 3
        for actual, exact in zip(result, expected):
            assert_near(actual, exact, value_tolerance)
        for actual, plain_grad, exact in zip(problem.gradients(result.loss), plain_grads, grads):
            assert actual.dtype == dtype
            error = (actual.double() - exact).norm() / exact.norm()
            # Where float32 rounding is all there is, 1e-6 of the norm is as good as any order of additions.
            assert error <= max(1.5 * (plain_grad.double() - exact).norm() / exact.norm(), 1e-6)


def test_teacher_of_another_dtype():
    problem = Problem(with_bias=False, dtype=torch.float32)
    problem.teacher = [tensor.bfloat16() for tensor in problem.teacher]
    (_, _, expected), _ = problem.reference("forward_kl")
    assert_near(problem.loss().divergence, expected, 2e-2)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_teacher_that_is_the_student_gives_zero(divergence, temperature, dtype):
    hidden = torch.randn(50, 16).to(dtype).requires_grad_()
    weight = torch.randn(300, 16).to(dtype).requires_grad_()
    labels = torch.randint(300, (50,))
    options = {"divergence": divergence, "temperature": temperature}
    linear = linear_distillation(
        hidden, weight, labels, teacher_hidden=hidden, teacher_weight=weight, kd_ratio=1.0, chunk_size=20, **options
    ).loss
    logits = F.linear(hidden, weight).detach().requires_grad_()
    plain = distillation(logits, logits, labels, **options)
    assert abs(linear.item()) / 50 <= 1e-7
    assert abs(plain.item()) / 50 <= 1e-7
    for grad in (*torch.autograd.grad(linear, (hidden, weight)), *torch.autograd.grad(plain, logits)):
        assert grad.abs().max() <= 1e-7


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_far_apart_distributions_are_finite_and_exact(divergence):
    # Probabilities of e^-200 and e^-300 are 0 in float32; their logarithms are not.
    logits = torch.tensor([[0.0, -200.0, 3.0], [1.0, 2.0, -300.0]], requires_grad=True)
    teacher_logits = torch.tensor([[-200.0, 0.0, 1.0], [-300.0, 1.0, 0.0]])
    exact = [values.detach().double() for values in (logits, teacher_logits)]
    exact[0].requires_grad_()
    expected = divergence_of(*exact, divergence)
    (expected_grad,) = torch.autograd.grad(expected, exact[0])
    labels = torch.tensor([0, 1])
    eye = torch.eye(3)
    linear = linear_distillation(
        logits, eye, labels, teacher_hidden=teacher_logits, teacher_weight=eye, divergence=divergence, kd_ratio=1.0
    ).loss
    for loss in (linear, distillation(logits, teacher_logits, labels, divergence=divergence)):
        # log p/m of up to log 2 is a sum of terms near 200.
        assert_near(loss, expected, 3e-6)
        (grad,) = torch.autograd.grad(loss, logits)
        assert_near(grad, expected_grad, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kd_ratio_0_is_linear_cross_entropy_bit_for_bit(dtype):
    problem = Problem(100, 64, 64, dtype)
    hidden, weight, bias = problem.student
    result = problem.loss(kd_ratio=0.0, chunk_size=16)
    expected = linear_cross_entropy(hidden, weight, problem.labels, bias=bias, chunk_size=16)
    assert torch.equal(result.loss, expected)
    assert torch.equal(result.cross_entropy, expected)
    assert result.divergence.item() == 0.0
    for actual, grad in zip(problem.gradients(result.loss), problem.gradients(expected)):
        assert torch.equal(actual, grad)


@pytest.mark.parametrize("kd_ratio", [0.0, 0.5, 1.0])
def test_without_targets_a_connected_zero(kd_ratio):
    problem = Problem()
    problem.labels[:] = -100
    with torch.no_grad():
        problem.student[0].fill_(float("nan"))
        problem.teacher[0].fill_(float("nan"))
    result = problem.loss(kd_ratio=kd_ratio)
    assert [value.item() for value in result] == [0.0] * 3
    for grad in problem.gradients(result.loss):
        assert torch.equal(grad, torch.zeros_like(grad))
    logits = torch.full((3, 4), float("nan"), requires_grad=True)
    loss = distillation(logits, logits, torch.full((3,), -100))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros(3, 4))


def test_ignored_rows_may_hold_nan_in_student_and_teacher():
    problem = Problem()
    problem.labels[3] = -100
    (expected, _, _), _ = problem.reference("forward_kl")
    with torch.no_grad():
        problem.student[0][3] = float("nan")
        problem.teacher[0][3] = float("nan")
    result = problem.loss()
    assert_near(result.loss, expected, 1e-12)
    hidden_grad, weight_grad, _ = problem.gradients(result.loss)
    assert torch.equal(hidden_grad[3], torch.zeros(6, dtype=torch.float64))
    assert torch.isfinite(weight_grad).all()


def test_nan_of_a_teacher_is_not_hidden():
    problem = Problem()
    problem.teacher[0][0] = float("nan")
    assert problem.loss().loss.isnan()


def test_batched_shapes_and_no_grad():
    problem = Problem(24, with_bias=False)
    hidden, weight = problem.student
    teacher_hidden, teacher_weight = problem.teacher
    flat = problem.loss()
    with torch.no_grad():
        batched = linear_distillation(
            hidden.view(2, 12, 6),
            weight,
            problem.labels.view(2, 12).int(),
            teacher_hidden=teacher_hidden.view(2, 12, 9),
            teacher_weight=teacher_weight,
        )
    assert all(torch.equal(first, second) for first, second in zip(flat, batched))
    assert not batched.loss.requires_grad


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_a_frozen_part_gets_no_gradient_and_the_teacher_never(frozen):
    problem = Problem()
    for tensor in problem.teacher:
        tensor.requires_grad_()
    _, grads = problem.reference("reverse_kl")
    problem.student[frozen].requires_grad_(False)
    problem.loss(divergence="reverse_kl").loss.backward()
    for number, (tensor, grad) in enumerate(zip(problem.student, grads)):
        if number == frozen:
            assert tensor.grad is None
        else:
            assert_near(tensor.grad, grad, 1e-11)
    assert all(tensor.grad is None for tensor in problem.teacher)


def test_autocast_casts_both_heads():
    problem = Problem(dtype=torch.float32, with_bias=False)
    half = Problem(dtype=torch.float32, with_bias=False)
    half.labels = problem.labels
    half.student = [tensor.bfloat16() for tensor in problem.student]
    half.teacher = [tensor.bfloat16() for tensor in problem.teacher]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = problem.loss()
    assert torch.equal(result.loss, half.loss().loss)
    assert all(grad.dtype == torch.float32 for grad in problem.gradients(result.loss))


def test_second_derivative_is_refused():
    problem = Problem()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(problem.loss().loss, problem.student, create_graph=True)


def shard_sums(seed, divergence):
    """Rank r takes every `world_size`-th row in float32; the sums over the ranks of loss parts and gradients."""
    import torch.distributed as dist

    torch.manual_seed(seed)
    problem = Problem(dtype=torch.float32)
    # Rank 0 of four has no target at all.
    problem.labels[::4] = -100
    result = problem.loss(slice(dist.get_rank(), None, dist.get_world_size()), divergence=divergence, temperature=2.0)
    sums = [value.detach().clone() for value in (*result, *problem.gradients(result.loss))]
    for value in sums:
        dist.all_reduce(value)
    return sums


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_ranks_sum_to_the_single_process_result_in_float64(world_size, divergence):
    torch.manual_seed(7)
    problem = Problem(dtype=torch.float32)
    problem.labels[::4] = -100
    expected, grads = problem.reference(divergence, 2.0)
    for sums in run_distributed(shard_sums, world_size, 7, divergence):
        for actual, exact in zip(sums, (*expected, *grads)):
            assert_near(actual, exact, 1e-5)


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


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_memory_does_not_grow_with_tokens_times_vocabulary(divergence):
    vocabulary, chunk_size = 4000, 64

    def measure(tokens):
        problem = Problem(tokens, vocabulary, vocabulary, torch.float32)
        return peak_bytes(lambda: problem.loss(divergence=divergence, chunk_size=chunk_size).loss.backward())

    few, many = measure(256), measure(2048)
    # Per token only the two rows, a gradient and a few scalars; one row of logits would be 16,000 bytes of it.
    assert (many - few) / (2048 - 256) < 20 * (6 + 9) * 4
    # Two logits buffers, five blocks of at most one buffer, and the weight's gradient.
    assert few < 8 * 4 * vocabulary * (chunk_size + 6)


def test_impossible_options_are_refused():
    problem = Problem()
    logits, labels = torch.randn(4, 5), torch.tensor([0, 1, 2, -100])

    def plain(**options):
        return distillation(logits, logits, labels, **options)

    for loss in (problem.loss, plain):
        for temperature in (0.0, -1.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=rf"temperature={temperature} must be positive and finite; 1.0 leaves"):
                loss(temperature=temperature)
        with pytest.raises(ValueError, match=r"divergence='kl' is unknown; choose one of forward_kl, reverse_kl, jen"):
            loss(divergence="kl")
        for num_tokens in (0, -1, 32):
            with pytest.raises(ValueError, match=rf"num_tokens={num_tokens} must be in \[1, (31|5)\]: .* len\(tokeniz"):
                loss(num_tokens=num_tokens)
    for kd_ratio in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=rf"kd_ratio={kd_ratio} must be in \[0, 1\]; 0 is cross entropy alone"):
            problem.loss(kd_ratio=kd_ratio)
    with pytest.raises(ValueError, match=r"teacher_softcap=-1\.0 must be positive"):
        problem.loss(teacher_softcap=-1.0)
    with pytest.raises(ValueError, match="chunk_size=0"):
        problem.loss(chunk_size=0)


def test_vocabularies_that_differ_are_refused_without_num_tokens():
    message = r"the student has 31 ids and the teacher 40; .* pass num_tokens=len\(tokenizer\), at most 31"
    for kd_ratio in (0.0, 0.5, 1.0):
        with pytest.raises(ValueError, match=message):
            Problem(teacher_vocabulary=40).loss(kd_ratio=kd_ratio)
    with pytest.raises(ValueError, match=message):
        distillation(torch.randn(3, 31), torch.randn(3, 40), torch.tensor([0, 1, 2]))


def test_arguments_that_do_not_fit_are_refused():
    problem = Problem(with_bias=False)
    (hidden, weight), (teacher_hidden, teacher_weight), labels = problem.student, problem.teacher, problem.labels

    def loss(teacher_hidden=teacher_hidden, teacher_weight=teacher_weight, **options):
        linear_distillation(
            hidden, weight, labels, teacher_hidden=teacher_hidden, teacher_weight=teacher_weight, **options
        )

    with pytest.raises(ValueError, match=r"labels has shape \(23,\) but teacher_hidden has shape \(22, 9\)"):
        loss(teacher_hidden=teacher_hidden[1:])
    with pytest.raises(ValueError, match=r"teacher_weight has shape \(31, 6\); it must be \[V, 9\]"):
        loss(teacher_weight=weight)
    with pytest.raises(ValueError, match=r"teacher_bias has shape \(30,\)"):
        loss(teacher_bias=torch.zeros(30, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"teacher_hidden torch.float64, teacher_weight torch.float32"):
        loss(teacher_weight=teacher_weight.float())
    labels[2] = 31
    with pytest.raises(ValueError, match=r"label 31 is outside \[0, 31\)"):
        loss()
    with pytest.raises(ValueError, match=r"labels has shape \(23,\) but teacher_logits has shape \(22, 31\)"):
        distillation(torch.randn(23, 31), torch.randn(22, 31), labels)
    with pytest.raises(TypeError, match=r"dtypes differ or are not floating: teacher_logits torch\.int64"):
        distillation(torch.randn(23, 31), torch.ones(23, 31).long(), labels)
