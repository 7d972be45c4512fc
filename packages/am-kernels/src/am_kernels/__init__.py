"""Attention, norms, rotary embedding and gated activations: faster, same meaning."""

__all__: list[str] = []
