"""What can run here, and why the rest cannot."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from am_kernels._bucketed import BLOCK, MAX_LENGTH
from am_kernels._varlen import why_not


@dataclass(frozen=True)
class Backend:
    """One way to compute one operation. `reason` says what it is used for, or why it is not usable here."""

    operation: str
    name: str
    usable: bool
    reason: str

    def __str__(self) -> str:
        return f"{self.operation:<13} {self.name:<10} {'usable' if self.usable else 'not usable':<11} {self.reason}"


class BackendReport(list[Backend]):
    """A list of `Backend` that prints as a table."""

    def __str__(self) -> str:
        return "\n".join(str(backend) for backend in self)


def backends(device_type: str = "cpu") -> BackendReport:
    """The backends of every operation for tensors on `device_type` ("cpu", "cuda"), in the order they are preferred.

    Raises ValueError for a device type that this build of torch has no device of.
    """
    if device_type != "cpu" and not _has_device(device_type):
        raise ValueError(f"device_type={device_type!r}: torch {torch.__version__} finds no such device; use 'cpu'")
    on_cpu = device_type == "cpu"
    bucketed = (
        f"documents up to {MAX_LENGTH} tokens, batched by length in blocks of {BLOCK} queries"
        if on_cpu
        else f"is for the CPU; documents on {device_type} go through sdpa one by one"
    )
    against_varlen = why_not(device_type)
    varlen = "torch.nn.attention.varlen.varlen_attn, all documents in one call; by name only"
    if against_varlen:
        varlen = f"does not support {', '.join(against_varlen)}"
    report = [
        Backend("attention", "bucketed", on_cpu, bucketed),
        Backend("attention", "sdpa", True, "torch.nn.functional.scaled_dot_product_attention, per document"),
        Backend("attention", "varlen", not against_varlen, varlen),
        Backend("attention", "reference", True, "plain PyTorch; the choice for sink and softcap"),
    ]
    report += [
        Backend(operation, "torch", True, "plain PyTorch with a hand-derived gradient")
        for operation in ("rms_norm", "add_rms_norm", "rope", "swiglu")
    ]
    return BackendReport(report)


def _has_device(device_type: str) -> bool:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator is not None and accelerator.type == device_type
