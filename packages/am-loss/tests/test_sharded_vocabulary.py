"""Losses of a head and of logits that are DTensors, cut along the vocabulary, against the same loss of whole ones."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

import am_loss
from am_testing import run_distributed

HEAD = {"softcap": 4.0, "scale": 0.3}
TEACHER = {"teacher_softcap": 2.0, "teacher_scale": 1.5}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def assert_near(actual, expected, tolerance, what=""):
    """`max|a - b| <= tolerance * max|b|`."""
    distance = (actual.double() - expected.double()).abs().max()
    assert distance <= tolerance * expected.double().abs().max(), (what, distance)


def cut(tensor, dim=0):
    """A leaf that is `Shard(dim)` over all ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return distribute_tensor(tensor.detach(), mesh, [Shard(dim)]).requires_grad_(tensor.requires_grad)


def drawn(*shapes, dtype, grad):
    generator = torch.Generator().manual_seed(len(shapes))
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [tensor.requires_grad_() for tensor in tensors] if grad else tensors


def labels_for(vocabulary, num_targets=16):
    labels = torch.arange(24).mul(7).remainder(vocabulary)
    labels[num_targets:] = -100
    labels[0] = vocabulary - 1
    return labels.roll(3).view(2, 12)


def values(results, *leaves):
    """The results, and the leaves' gradients of the first of them, whole."""
    results = results if isinstance(results, tuple) else (results,)
    results[0].backward()
    whole = [None if leaf.grad is None else leaf.grad for leaf in leaves]
    whole = [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in whole]
    return [*(result.detach() for result in results), *whole]


def linear_cross_entropy(sharded, vocabulary, dtype, with_bias, frozen=False, num_targets=16, **options):
    hidden, weight, *bias = drawn((2, 12, 6), (vocabulary, 6), *[(vocabulary,)] * with_bias, dtype=dtype, grad=True)
    if frozen:
        weight.requires_grad_(False)
    if sharded:
        weight, bias = cut(weight), [cut(tensor) for tensor in bias]
    labels = labels_for(vocabulary, num_targets)
    loss = am_loss.linear_cross_entropy(hidden, weight, labels, bias=bias[0] if bias else None, **options)
    return values(loss, hidden, weight, *bias)


def linear_distillation(sharded, vocabulary, teacher_vocabulary, dtype, *, whole_teacher=False, **options):
    hidden, weight, bias = drawn((2, 12, 6), (vocabulary, 6), (vocabulary,), dtype=dtype, grad=True)
    shapes = (2, 12, 9), (teacher_vocabulary, 9), (teacher_vocabulary,), ()
    teacher_hidden, teacher_weight, teacher_bias, _ = drawn(*shapes, dtype=dtype, grad=False)
    if sharded:
        weight, bias = cut(weight), cut(bias)
        if not whole_teacher:
            teacher_weight, teacher_bias = cut(teacher_weight), cut(teacher_bias)
    result = am_loss.linear_distillation(
        hidden,
        weight,
        labels_for(vocabulary),
        bias=bias,
        teacher_hidden=teacher_hidden,
        teacher_weight=teacher_weight,
        teacher_bias=teacher_bias,
        temperature=2.0,
        **options,
    )
    return values(tuple(result), hidden, weight, bias)


def of_logits(sharded, vocabulary, teacher_vocabulary, dtype, *, whole_teacher=False, **options):
    """`distillation` with a teacher's vocabulary, `cross_entropy` without."""
    (logits,) = drawn((2, 12, vocabulary), dtype=dtype, grad=True)
    labels = labels_for(vocabulary)
    if sharded:
        logits = cut(logits, 2)
    if teacher_vocabulary is None:
        return values(am_loss.cross_entropy(logits, labels, **options), logits)
    teacher, _ = drawn((2, 12, teacher_vocabulary), (), dtype=dtype, grad=False)
    teacher = cut(teacher, 2) if sharded and not whole_teacher else teacher
    return values(am_loss.distillation(logits, teacher, labels, temperature=2.0, **options), logits)


CASES = [
    *(
        (linear_cross_entropy, (vocabulary, dtype, with_bias), options)
        for vocabulary, dtype in ((31, torch.float64), (31, torch.float32), (24, torch.float32), (5, torch.float64))
        for with_bias in (0, 1)
        for options in ({}, {**HEAD, "z_loss": 0.05, "chunk_size": 5})
    ),
    (linear_cross_entropy, (31, torch.bfloat16, 1), {"chunk_size": 5}),
    (linear_cross_entropy, (31, torch.float64, 0), {"frozen": True}),
    (linear_cross_entropy, (31, torch.float64, 1), {"num_targets": 0, "z_loss": 0.1}),
    *(
        (linear_distillation, (*sizes, torch.float64), {"divergence": divergence, "kd_ratio": kd_ratio, **options})
        for divergence in ("forward_kl", "reverse_kl", "jensen_shannon")
        for kd_ratio, sizes, options in (
            (0.3, (31, 31), {"chunk_size": 5}),
            (0.3, (31, 40), {"num_tokens": 29, **HEAD, **TEACHER}),
            (1.0, (40, 31), {"num_tokens": 9, "chunk_size": 7}),
            (0.5, (31, 50), {"num_tokens": 31, "whole_teacher": True}),
        )
    ),
    (linear_distillation, (31, 33, torch.float32), {"kd_ratio": 0.0, "num_tokens": 30}),
    (linear_distillation, (31, 33, torch.float32), {"num_tokens": 30}),
    (linear_distillation, (31, 33, torch.bfloat16), {"num_tokens": 30}),
    (of_logits, (31, None, torch.float64), {**HEAD, "z_loss": 0.05}),
    (of_logits, (5, None, torch.float32), {}),
    (of_logits, (31, None, torch.bfloat16), {}),
    (of_logits, (31, 40, torch.float64), {"num_tokens": 29, "divergence": "reverse_kl"}),
    (of_logits, (31, 31, torch.float64), {"whole_teacher": True, "divergence": "jensen_shannon"}),
    (of_logits, (31, 31, torch.float32), {}),
]


def all_cases():
    return [function(True, *arguments, **options) for function, arguments, options in CASES]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_loss_and_gradients_equal_those_of_the_whole_vocabulary(world_size):
    by_rank = run_distributed(all_cases, world_size)
    for index, (function, arguments, options) in enumerate(CASES):
        whole = function(False, *arguments, **options)
        dtype = next(argument for argument in arguments if isinstance(argument, torch.dtype))
        for results in by_rank:
            for actual, expected, same in zip(results[index], whole, by_rank[0][index], strict=True):
                assert (actual is None) == (expected is None)
                if expected is None:
                    continue
                assert actual.dtype == expected.dtype
                assert torch.equal(actual, same)
                assert_near(actual, expected, TOLERANCE[dtype], (function.__name__, arguments, options))


def impossible_ids():
    """A rank all of whose ids have the logit -inf."""
    hidden, weight, bias = drawn((2, 12, 6), (8, 6), (8,), dtype=torch.float64, grad=True)
    with torch.no_grad():
        bias[4:] = -torch.inf
    labels = labels_for(4)
    whole = values(am_loss.linear_cross_entropy(hidden, weight, labels, bias=bias), hidden, weight, bias)
    hidden.grad = None
    weight, bias = cut(weight), cut(bias)
    return whole, values(am_loss.linear_cross_entropy(hidden, weight, labels, bias=bias), hidden, weight, bias)


def test_a_rank_without_a_possible_id():
    for whole, sharded in run_distributed(impossible_ids, 2):
        for actual, expected in zip(sharded, whole, strict=True):
            assert_near(actual, expected, 1e-12)


class Sizes(TorchDispatchMode):
    """The number of elements of the largest tensor that anything in it returns."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        # A DTensor has no memory beside that of its part, which is seen as well.
        if isinstance(result, torch.Tensor) and not isinstance(result, DTensor):
            self.largest = max(self.largest, result.untyped_storage().nbytes() // result.element_size())
        return result


def largest_and_peak(distil):
    """Elements of the largest tensor and bytes allocated at one time, for 512 tokens of 64 and 2,000 ids."""
    weight = cut(torch.randn(2000, 64).requires_grad_())
    hidden, labels = torch.randn(512, 64, requires_grad=True), torch.arange(512)

    def run():
        if distil:
            teacher = {"teacher_hidden": hidden.detach(), "teacher_weight": weight.detach()}
            am_loss.linear_distillation(hidden, weight, labels, chunk_size=16, **teacher).loss.backward()
        else:
            am_loss.linear_cross_entropy(hidden, weight, labels, chunk_size=16).backward()

    with Sizes() as sizes:
        run()
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profile:
        run()
    now = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return sizes.largest, peak


@pytest.mark.parametrize("distil", [False, True])
def test_no_rank_holds_the_logits_or_the_head(distil):
    part = 1000 * 64
    for largest, peak in run_distributed(largest_and_peak, 2, distil):
        # Its own part of the head's gradient; the head has 128,000 elements, the logits 1,024,000.
        assert largest == part
        # That gradient, its sum over the steps and one in the making, and less for everything else.
        assert 2 * 4 * part < peak < 5 * 4 * part


def refusals():
    two = init_device_mesh("cpu", (1, 2))
    hidden, weight, bias = drawn((2, 12, 6), (31, 6), (31,), dtype=torch.float32, grad=True)
    labels, row = labels_for(31), torch.arange(6)
    mesh, sharded = init_device_mesh("cpu", (2,)), cut(weight)
    head, teacher = am_loss.linear_cross_entropy, {"teacher_hidden": hidden.detach(), "teacher_weight": sharded}
    replicated = distribute_tensor(hidden.detach(), mesh, [Replicate()])
    calls = [
        lambda: head(hidden, distribute_tensor(weight.detach(), mesh, [Replicate()]), labels),
        lambda: head(hidden, cut(weight, 1), labels),
        lambda: head(hidden, distribute_tensor(weight.detach(), two, [Shard(0), Shard(0)]), labels),
        lambda: head(replicated, sharded, labels),
        lambda: head(hidden, sharded, labels, bias=bias),
        lambda: head(hidden, sharded, labels.roll(dist.get_rank())),
        lambda: head(hidden, sharded, labels.where(labels < 20 + 5 * dist.get_rank(), -100)),
        lambda: head(hidden, sharded, labels + 31),
        # Of 16 and 15 ids: without their whole shape each rank takes its own size times two for it.
        lambda: am_loss.cross_entropy(DTensor.from_local(weight[: 16 - dist.get_rank()].t(), mesh, [Shard(1)]), row),
        lambda: am_loss.linear_distillation(hidden, weight, labels, **teacher),
        lambda: am_loss.chunked(
            am_loss.Head(hidden, sharded), {"shift_labels": labels}, lambda logits, _: logits.sum()
        ),
        lambda: torch.autograd.grad(head(hidden, sharded, labels), hidden, create_graph=True),
    ]
    messages = []
    for call in calls:
        with pytest.raises((TypeError, ValueError, RuntimeError)) as error:
            call()
        messages.append(str(error.value))
    return messages


def test_what_cannot_be_is_refused_with_its_name():
    expected = [
        "weight is a DTensor with placements (Replicate(),) on a mesh of shape (2,); a loss takes a plain tensor",
        "weight is a DTensor with placements (Shard(dim=1),) on a mesh of shape (2,); a loss takes a plain tensor",
        "on a mesh of shape (1, 2); a loss takes a plain tensor",
        "hidden is a DTensor, and rows are the same on all ranks that hold a part of the head",
        "weight is cut over the ranks [0, 1] and bias is whole on each rank; cut both over the same ranks",
        "the ranks [0, 1] hold parts of one vocabulary and have different labels, [16, 16] targets",
        "have different labels, [10, 12] targets",
        "is outside [0, 31)",
        "the ranks [0, 1] hold parts of vocabularies of [32, 30] ids, which must be one size; cut the whole with",
        "weight is whole on each rank and teacher_weight is cut over the ranks [0, 1]",
        "weight is a DTensor, and a loss of your own sees whole rows of logits; pass a plain tensor",
        "cannot be differentiated twice",
    ]
    for messages in run_distributed(refusals, 2):
        for message, part in zip(messages, expected, strict=True):
            assert part in message


def one_rank():
    whole, sharded = (linear_cross_entropy(flag, 31, torch.float32, 1, **HEAD) for flag in (False, True))
    return all(torch.equal(one, other) for one, other in zip(whole, sharded, strict=True))


def test_a_mesh_of_one_rank_is_bit_for_bit_the_whole_loss():
    assert run_distributed(one_rank, 1) == [True]
