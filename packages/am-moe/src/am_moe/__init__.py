"""Mixture-of-experts routing, permutation and grouped GEMM for PyTorch."""

__all__: list[str] = []
