"""Rows to batches: chat rendering, loss masks, packing and a resumable loader."""

__all__: list[str] = []
