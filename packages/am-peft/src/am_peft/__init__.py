"""LoRA on any PyTorch model, with PEFT's configuration and PEFT's files."""

__all__: list[str] = []
