"""Training losses that return sums and never hold the logits."""

from am_loss._cross_entropy import cross_entropy
from am_loss._linear_cross_entropy import linear_cross_entropy

__all__ = ["cross_entropy", "linear_cross_entropy"]
