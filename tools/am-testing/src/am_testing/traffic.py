"""What crosses the ranks, counted at every collective."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Sent(NamedTuple):
    """One collective: "all_reduce", "all_gather" or "reduce_scatter", the shape of its tensor here, what is sent."""

    kind: str
    shape: tuple[int, ...]
    num_bytes: float


class SentBytes(TorchDispatchMode):
    """`with SentBytes(n) as sent:` lists in `sent.collectives` what this rank sends to groups of `n` ranks in a ring.

    An all-reduce sends `2 (n - 1) / n` of its tensor, an all-gather `n - 1` times the part that this rank gives, a
    reduce-scatter `n - 1` times the part that it gets; those two shapes are listed. Whatever calls it in this thread is
    seen: `torch.distributed`, FSDP2, DTensor, and their backwards on a CPU. Any other collective is a RuntimeError.
    """

    def __init__(self, num_ranks: int) -> None:
        super().__init__()
        self.num_ranks = num_ranks
        self.collectives: list[Sent] = []

    @property
    def num_bytes(self) -> int:
        return round(sum(sent.num_bytes for sent in self.collectives))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        namespace, _, name = function._schema.name.partition("::")
        if namespace in ("c10d", "_c10d_functional") and name not in ("wait_tensor", "_wrap_tensor_autograd"):
            kind, tensor, times = self._rule(name, args, result)
            num_bytes = times * tensor.numel() * tensor.element_size()
            self.collectives.append(Sent(kind, tuple(tensor.shape), num_bytes))
        return result

    def _rule(self, name: str, args: Any, result: Any) -> tuple[str, Tensor, float]:
        others = self.num_ranks - 1
        if name in ("allreduce_", "all_reduce", "all_reduce_"):
            return "all_reduce", args[0][0] if name == "allreduce_" else args[0], 2 * others / self.num_ranks
        if name in ("_allgather_base_", "all_gather_into_tensor"):
            return "all_gather", args[1] if name == "_allgather_base_" else args[0], others
        if name in ("_reduce_scatter_base_", "reduce_scatter_tensor"):
            return "reduce_scatter", args[0] if name == "_reduce_scatter_base_" else result, others
        raise RuntimeError(f"the collective {name} has no rule for the bytes that it sends; give it one")
