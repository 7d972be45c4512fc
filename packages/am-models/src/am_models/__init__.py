"""Hugging Face models made fast in place, with their own signature."""

__all__: list[str] = []
