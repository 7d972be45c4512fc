"""Distillation: the divergence of a student's distribution over the next token from a teacher's.

With P the teacher's distribution and Q the student's, both softened by a temperature: forward KL is `KL(P || Q)`
(Hinton et al. 2015, arXiv:1503.02531), reverse KL is `KL(Q || P)` (MiniLLM, arXiv:2306.08543) and Jensen-Shannon is
`(KL(P || M) + KL(Q || M)) / 2` with `M = (P + Q) / 2`. Each counts `temperature^2` times, so that the size of
its gradients does not depend on the temperature.
"""

from __future__ import annotations

import math
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from am_loss._chunks import chunked_sums
from am_loss._head import Head, checked_head
from am_loss._logits import sum_of_logits
from am_loss._objectives import CrossEntropy, Distillation, Divergence, log_ratio_to_middle
from am_loss._targets import check_floating, check_labels, refuse_dtensor, select_targets, selected_rows
from am_loss._vocabulary import Vocabulary, check_same_ranks, own_part, rows_for


class DistillationLoss(NamedTuple):
    """Float32 sums over target tokens; `loss` alone has a graph."""

    loss: Tensor
    """`(1 - kd_ratio) * cross_entropy + kd_ratio * divergence`."""
    cross_entropy: Tensor
    """Of the student; 0 where `kd_ratio` is 1, since it is then not computed."""
    divergence: Tensor
    """Times `temperature^2`; 0 where `kd_ratio` is 0, since the teacher is then not computed."""


def distillation(
    logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    divergence: Divergence = "forward_kl",
    temperature: float = 1.0,
    num_tokens: int | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Sum over target tokens of `temperature^2 * divergence`, in float32. The teacher gets no gradient.

    Returns a float32 scalar (float64 for float64 `logits`): a SUM; divide by the number of targets of the whole
    optimizer step. Without any target it is a 0 that is connected to the graph. Use `linear_distillation` where both
    heads' weights are at hand: it never holds the logits.

    Args:
        logits: `[..., V]` of the student, floating, finite and final (after soft-cap and scale); or a DTensor that is
            `Shard` along V over a mesh of one axis, whose ranks all call this. Those of the teacher are then cut over
            the same ranks, or whole.
        teacher_logits: `[..., V']`, as `logits`.
        labels: `[...]` integers, already shifted: they say which positions count.
        divergence: of the distributions `softmax(z / temperature)`.
        num_tokens: both distributions are over the first so many ids, for vocabularies that are padded to different
            sizes (the length of the tokenizer); by default V and V' must be equal. That equal ids are equal tokens is
            the caller's to check.
        ignore_index: positions with this label are left out before anything is computed.

    Raises:
        ValueError: an impossible option, a label outside `[0, V)` or shapes that do not fit.
        TypeError: any other DTensor, or a dtype that does not fit.
    """
    refuse_dtensor("and rows are the same on all ranks", labels=labels)
    check_floating(logits=logits)
    check_floating(teacher_logits=teacher_logits)
    check_labels("logits", logits, labels)
    check_labels("teacher_logits", teacher_logits, labels)
    _check_options(divergence, temperature)
    num_tokens = _shared_tokens(logits.shape[-1], teacher_logits.shape[-1], num_tokens)
    logits, vocabulary = own_part("logits", logits, -1)
    teacher_logits, of_teacher = own_part("teacher_logits", teacher_logits.detach(), -1)
    index, targets = select_targets(labels, vocabulary, ignore_index)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    rows, teacher_rows = (selected_rows(values, labels, index) for values in (logits, teacher_logits))
    if vocabulary.group is not None or of_teacher.group is not None:
        columns = Head(teacher_rows, teacher_rows.t())
        teacher = _cut_alike(columns, of_teacher, vocabulary, num_tokens, ("logits", "teacher_logits"))
        objective = Distillation(vocabulary, teacher, 1.0, divergence, temperature, num_tokens)
        return sum_of_logits(rows, {"labels": targets, "teacher_logits": teacher.weight.t()}, objective)
    log_p, log_q = (F.log_softmax(values[:, :num_tokens].to(dtype) / temperature, 1) for values in (teacher_rows, rows))
    p, q, log_ratio = log_p.exp(), log_q.exp(), log_p - log_q
    # p and q both sum to 1; with their difference in the sum, the rounding of those sums cancels where P is near Q.
    if divergence == "forward_kl":
        total = (p * log_ratio + (q - p)).sum()
    elif divergence == "reverse_kl":
        total = ((p - q) - q * log_ratio).sum()
    else:
        log_q_over_m = log_ratio_to_middle(log_ratio)
        total = (p * (log_q_over_m + log_ratio) + q * log_q_over_m).sum() / 2
    return total * temperature**2


def linear_distillation(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None = None,
    teacher_softcap: float | None = None,
    teacher_scale: float | None = None,
    kd_ratio: float = 0.5,
    divergence: Divergence = "forward_kl",
    temperature: float = 1.0,
    num_tokens: int | None = None,
    ignore_index: int = -100,
    chunk_size: int | None = None,
) -> DistillationLoss:
    """`(1 - kd_ratio) * cross_entropy + kd_ratio * distillation` without holding the logits of student or teacher.

    Returns float32 SUMS over target tokens (float64 for a float64 student), see `DistillationLoss`. Without any target:
    zeros, `loss` connected to the graph. The arguments without `teacher_` are the student's, as in
    `linear_cross_entropy`; the cross entropy is over all V ids. Under tensor parallelism both weights and biases are
    cut over the same ranks, or the teacher's are whole; both hidden states are plain and the same on all ranks.

    Args:
        teacher_hidden: `[..., D']`, of a floating dtype of the teacher's own. What is the teacher's gets no gradient.
        teacher_weight: `[V', D']`; `teacher_bias`, `teacher_softcap` and `teacher_scale` as the student's.
        kd_ratio: 0 gives `linear_cross_entropy` bit for bit, and the teacher's head is not multiplied; at 1 no cross
            entropy is computed. The part that is not computed is reported as 0.
        divergence: as in `distillation`, and so are `temperature` and `num_tokens`.

    Raises:
        ValueError: what `linear_cross_entropy` and `distillation` refuse, or a `kd_ratio` outside `[0, 1]`.
        TypeError: as those two.
        RuntimeError: when differentiated twice.
    """
    student, vocabulary = checked_head(Head(hidden, weight, bias, softcap, scale), labels)
    teacher, of_teacher = checked_head(
        Head(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_scale), labels, "teacher_"
    )
    _check_options(divergence, temperature)
    if not 0 <= kd_ratio <= 1:
        raise ValueError(f"kd_ratio={kd_ratio} must be in [0, 1]; 0 is cross entropy alone, 1 distillation alone")
    num_tokens = _shared_tokens(vocabulary.size, of_teacher.size, num_tokens)
    index, targets = select_targets(labels, vocabulary, ignore_index)
    if kd_ratio == 0:
        entropy = CrossEntropy(vocabulary)
        loss, cross_entropy = chunked_sums(student, index, {"labels": targets}, entropy, chunk_size)
        return DistillationLoss(loss, cross_entropy, torch.zeros_like(cross_entropy))
    teacher = _cut_alike(teacher, of_teacher, vocabulary, num_tokens)
    teacher_rows = teacher.hidden if index is None else teacher.hidden[index]
    rows = {"labels": targets, "teacher_hidden": teacher_rows.detach()}
    objective = Distillation(vocabulary, teacher, kd_ratio, divergence, temperature, num_tokens)
    return DistillationLoss(*chunked_sums(student, index, rows, objective, chunk_size))


def _cut_alike(
    teacher: Head,
    of_teacher: Vocabulary,
    vocabulary: Vocabulary,
    num_tokens: int,
    names: tuple[str, str] = ("weight", "teacher_weight"),
) -> Head:
    """The teacher's head with the rows of the first `num_tokens` ids that the student's has on this rank."""
    if vocabulary.group is None and of_teacher.group is None:
        return teacher
    if of_teacher.group is not None:
        check_same_ranks(names, vocabulary, of_teacher)
    weight = rows_for(teacher.weight, of_teacher, vocabulary, num_tokens)
    bias = None if teacher.bias is None else rows_for(teacher.bias, of_teacher, vocabulary, num_tokens)
    return teacher._replace(weight=weight, bias=bias)


def _check_options(divergence: str, temperature: float) -> None:
    names = get_args(Divergence)
    if divergence not in names:
        raise ValueError(f"divergence={divergence!r} is unknown; choose one of {', '.join(names)}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be positive and finite; 1.0 leaves the distributions alone")


def _shared_tokens(vocabulary: int, teacher_vocabulary: int, num_tokens: int | None) -> int:
    """The number of leading ids that both distributions are over."""
    if num_tokens is None:
        if vocabulary != teacher_vocabulary:
            raise ValueError(
                f"the student has {vocabulary} ids and the teacher {teacher_vocabulary}; if they share a tokenizer and "
                f"one is padded, pass num_tokens=len(tokenizer), at most {min(vocabulary, teacher_vocabulary)}"
            )
        return vocabulary
    if not 1 <= num_tokens <= min(vocabulary, teacher_vocabulary):
        raise ValueError(
            f"num_tokens={num_tokens} must be in [1, {min(vocabulary, teacher_vocabulary)}]: "
            f"the student has {vocabulary} ids and the teacher {teacher_vocabulary}; pass len(tokenizer)"
        )
    return num_tokens
