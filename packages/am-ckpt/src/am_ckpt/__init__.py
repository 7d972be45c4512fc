"""Training checkpoints that commit atomically, resume exactly and load anywhere."""

__all__: list[str] = []
