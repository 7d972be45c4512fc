"""Cross entropy and divergences of a block of logits that overwrite the logits with their gradient."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from am_loss._chunks import Targets
from am_loss._head import Head, apply_scale_and_softcap, project
from am_loss._vocabulary import Vocabulary

Divergence = Literal["forward_kl", "reverse_kl", "jensen_shannon"]

# A block of one float32 buffer stays in a CPU's cache, and its thread barriers are few.
_BLOCK_ELEMENTS = 2**21
# With a teacher five buffers of a block are in use.
_TEACHER_BLOCK_ELEMENTS = 2**18


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """`-log softmax(logits)[label] + z_loss * logsumexp(logits)^2`, in one part. Target: `labels [N]` int64."""

    weights: ClassVar[tuple[float, ...]] = (1.0,)
    block_elements: ClassVar[int] = _BLOCK_ELEMENTS
    vocabulary: Vocabulary
    z_loss: float = 0.0

    def of_chunk(self, targets: Targets) -> Targets:
        return targets

    def of_block(self, logits: Tensor, targets: Targets, with_gradient: bool) -> Tensor:
        return _cross_entropy(logits, targets["labels"], self.vocabulary, self.z_loss, with_gradient).unsqueeze(0)


class Distillation:
    """Cross entropy and `temperature^2 * divergence` from a teacher, weighted with `1 - kd_ratio` and `kd_ratio`.

    Targets: `labels [N]` int64 and `teacher_hidden [N, D']`. The divergence is over the first `num_tokens` ids. At
    `kd_ratio` 1 no cross entropy is computed: that part is 0. An object serves one loss: it keeps the teacher's buffer.

    Of a `vocabulary` that is cut, the teacher's head has the rows of those of the first `num_tokens` ids that are here.
    """

    block_elements = _TEACHER_BLOCK_ELEMENTS

    def __init__(
        self,
        vocabulary: Vocabulary,
        teacher: Head,
        kd_ratio: float,
        divergence: Divergence,
        temperature: float,
        num_tokens: int,
    ) -> None:
        self.vocabulary = vocabulary
        self.teacher = teacher
        self.kd_ratio = kd_ratio
        self.divergence: Divergence = divergence
        self.temperature = temperature
        self.num_tokens = vocabulary.num_here(num_tokens)
        self.weights = (1 - kd_ratio, kd_ratio)
        self._buffer: Tensor | None = None

    def of_chunk(self, targets: Targets) -> Targets:
        """The teacher's raw logits in place of its hidden states: one product for all blocks of the chunk."""
        hidden_CD = targets["teacher_hidden"]
        # The first chunk is the largest.
        if self._buffer is None:
            self._buffer = hidden_CD.new_empty(hidden_CD.shape[0], self.teacher.weight.shape[0])
        return {"labels": targets["labels"], "teacher_logits": project(self.teacher, hidden_CD, self._buffer)}

    def of_block(self, logits: Tensor, targets: Targets, with_gradient: bool) -> Tensor:
        teacher_logits = targets["teacher_logits"].to(logits.dtype)
        apply_scale_and_softcap(teacher_logits, self.teacher.scale, self.teacher.softcap, False)
        losses_2C = logits.new_zeros(2, logits.shape[0])
        losses_2C[1], gradient = _divergence(
            logits[:, : self.num_tokens] / self.temperature,
            teacher_logits[:, : self.num_tokens] / self.temperature,
            self.divergence,
            self.vocabulary,
        )
        losses_2C[1] *= self.temperature**2
        if self.kd_ratio < 1:
            losses_2C[0] = _cross_entropy(logits, targets["labels"], self.vocabulary, 0.0, with_gradient)
        if with_gradient:
            # Not 0 * logits, which may be infinite.
            logits.mul_(1 - self.kd_ratio) if self.kd_ratio < 1 else logits.zero_()
            # The divergence is one of logits / temperature, and counts temperature^2 times.
            logits[:, : self.num_tokens].add_(gradient, alpha=self.kd_ratio * self.temperature)
        return losses_2C


class _Softmax(NamedTuple):
    """Probabilities `[C, V]`; of each row, over all ids, the largest value and its log probability, `[C, 1]` both."""

    probabilities: Tensor
    largest: Tensor
    log_largest: Tensor


def _softmax(values: Tensor, out: Tensor | None = None) -> _Softmax:
    """Over the ids that `values [C, V]` has; `out` may be `values`.

    `log sum exp(x) = max x - log max p`, and max p is at least 1 / V.
    """
    if values.shape[1] == 0:
        none = values.new_full((values.shape[0], 1), -math.inf)
        return _Softmax(values, none, torch.zeros_like(none))
    largest = values.amax(1, keepdim=True)
    probabilities = torch.softmax(values, 1, out=out)
    return _Softmax(probabilities, largest, probabilities.amax(1, keepdim=True).log_())


def _of_all_ids(vocabulary: Vocabulary, *parts: _Softmax) -> list[_Softmax]:
    """Of softmaxes over the ids that ranks hold, those over all ids, with this rank's probabilities; one exchange."""
    if vocabulary.group is None:
        return list(parts)
    largest = torch.stack([part.largest for part in parts])
    # A rank may have no id, or none that is possible: its softmax is then NaN.
    empty = largest.isneginf()
    log_largest = torch.stack([part.log_largest for part in parts]).masked_fill_(empty, 0.0)
    of_ranks = vocabulary.gather(torch.stack([largest, log_largest]))
    highest = of_ranks[:, 0].amax(0)
    log_highest = (of_ranks[:, 0] - highest - of_ranks[:, 1]).logsumexp(0).neg_()
    # What this rank's sum of exponentials is of that of all.
    shares = (largest - highest - (log_largest - log_highest)).exp_()
    for part, share, nothing in zip(parts, shares, empty, strict=True):
        part.probabilities.mul_(share)
        if nothing.is_cuda or nothing.any():
            part.probabilities.masked_fill_(nothing, 0.0)
    return [_Softmax(part.probabilities, *values) for part, *values in zip(parts, highest, log_highest, strict=True)]


def _cross_entropy(
    values: Tensor, targets: Tensor, vocabulary: Vocabulary, z_loss: float, with_gradient: bool
) -> Tensor:
    """Losses `[C]` of logits `values [C, V]`, which are overwritten with their gradients if `with_gradient`.

    Where ranks hold parts of the vocabulary, the loss of a row is that of the rank that holds its target, 0 elsewhere.
    """
    targets, here = targets.unsqueeze(1), None
    if vocabulary.group is not None:
        targets, here = vocabulary.position_of(targets)
    # No id here, so no target either.
    has_ids = values.shape[1] > 0
    target_values = values.gather(1, targets) if has_ids else values.new_zeros(values.shape[0], 1)
    # A loss is log sum exp - x[target]: exact where p[target] itself would underflow.
    ((_, largest, log_largest),) = _of_all_ids(vocabulary, _softmax(values, out=values))
    log_sums = largest - log_largest
    losses = log_sums - target_values
    if z_loss != 0.0:
        losses += z_loss * log_sums.square()
    if with_gradient and has_ids:
        if z_loss != 0.0:
            values.mul_(1.0 + 2.0 * z_loss * log_sums)
        one = torch.full_like(target_values, -1.0)
        values.scatter_add_(1, targets, one if here is None else one.mul_(here))
    if here is not None:
        losses.masked_fill_(~here, 0.0)
    return losses.squeeze(1)


def _divergence(
    student: Tensor, teacher: Tensor, divergence: Divergence, vocabulary: Vocabulary
) -> tuple[Tensor, Tensor]:
    """Divergences `[C]` of the distributions with logits `[C, N]`, and their gradients by the student's logits.

    Both inputs are overwritten. With P, Q the teacher's and the student's distribution and q = softmax(x): a gradient g
    by q becomes `q * (g - sum(q * g))` by x. Where ranks hold parts of the vocabulary, the divergences are this rank's
    terms of the sums over ids, the gradients complete.
    """
    (p, teacher_largest, teacher_log_largest), (q, largest, log_largest) = _of_all_ids(
        vocabulary, _softmax(teacher), _softmax(student)
    )
    # log p/q from the logits, since p and q underflow. The difference of the log sums is taken part by part: rounding
    # the sums themselves would cost the digits that a small divergence lives in.
    log_sums_ratio = (teacher_largest - largest) - (teacher_log_largest - log_largest)
    log_ratio = teacher.sub_(student).sub_(log_sums_ratio)
    if divergence == "forward_kl":
        return log_ratio.mul_(p).sum(1), q.sub_(p)
    if divergence == "reverse_kl":
        product = log_ratio.mul_(q).neg_()
        losses = product.sum(1)
        return losses, product.sub_(q.mul_(_whole(losses, vocabulary)))
    log_q_over_m = log_ratio_to_middle(log_ratio)
    product = torch.mul(log_q_over_m, q, out=student)
    reverse = product.sum(1)
    losses = (p.mul_(log_q_over_m.add_(log_ratio)).sum(1) + reverse) / 2
    return losses, product.sub_(q.mul_(_whole(reverse, vocabulary))).div_(2)


def _whole(sums: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Sums over ids `[C]` over all of them, `[C, 1]`."""
    return (sums if vocabulary.group is None else vocabulary.sum_(sums.clone())).unsqueeze(1)


def log_ratio_to_middle(log_ratio: Tensor) -> Tensor:
    """`log q/m` where `m = (p + q) / 2`, from `log_ratio = log p/q`; `log p/m` is larger by `log_ratio`."""
    # The default threshold of 20 is coarse in float64.
    return math.log(2.0) - F.softplus(log_ratio, threshold=40.0)
