"""Device mesh, process group, FSDP2/HSDP/DDP and gradient norms for PyTorch training."""

__all__: list[str] = []
