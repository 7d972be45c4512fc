"""A copy of tensors that training may not change: taken into host memory that is allocated once, and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.distributed.tensor import DTensor

# Every copy starts on a cache line, and so on a multiple of its item size.
_ALIGNMENT = 64


class StagingMemory:
    """Host memory for copies of tensors, kept from one call of `copy` to the next."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def copy(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Contiguous CPU copies of `tensors`, all in one block of memory. They overwrite those of the last call.

        The memory grows where it does not suffice, is never given back, and is pinned where a tensor is on an
        accelerator. On return the copies are complete.
        """
        spans = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
        devices = {tensor.device for tensor in tensors if tensor.device.type != "cpu"}
        if sum(spans) > self._memory.numel():
            # The old block first: both at once would need the memory twice.
            self._memory = torch.empty(0, dtype=torch.uint8)
            self._memory = torch.empty(sum(spans), dtype=torch.uint8, pin_memory=bool(devices))
        copies = []
        start = 0
        for tensor, span in zip(tensors, spans, strict=True):
            target = self._memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            target.copy_(tensor, non_blocking=True)
            copies.append(target)
            start += span
        for device in devices:
            torch.accelerator.current_stream(device).synchronize()
        return copies


Versions = dict[str, tuple[int, int, int]]


def versions(tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> Versions:
    """What changes when a tensor is written to in place, or gets other memory: by `section tensor 'name'`."""
    # Without gradients, to_local() is the shard itself and not a view of its own history.
    with torch.no_grad():
        return {
            f"{section} tensor {name!r}": (_version(tensor), _version(local := _local(tensor)), local.data_ptr())
            for section, named in tensors.items()
            for name, tensor in named.items()
        }


def require_unchanged(before: Versions, tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Raise `RuntimeError` naming the first tensor that was written to since `before`."""
    for what, version in versions(tensors).items():
        if version != before[what]:
            raise RuntimeError(
                f"{what} was changed while it was being saved: what was copied is of two moments. Save between "
                "optimizer steps, from the thread that trains"
            )


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _version(tensor: torch.Tensor) -> int:
    # Tensors made in inference mode count nothing.
    return 0 if tensor.is_inference() else tensor._version
