"""Training losses that return sums and never hold the logits."""

__all__: list[str] = []
