"""Options of sharding change where tensors are and when they travel, never a number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from am_mesh import (
    ParallelDims,
    clip_grad_norm_,
    forward_backward,
    fully_shard,
    parallelize,
    process_group,
    replicate,
    sum_over,
    tensor_parallel,
)
from am_testing import run_distributed

VOCABULARY, WIDTH, MICRO_BATCHES, TOLERANCE = 37, 16, 4, 1e-5
PLAN = {"layers.*.branches.*.up": "colwise", "layers.*.branches.*.down": "rowwise"}


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 8)
        self.down = nn.Linear(8, WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(hidden)))


class Block(nn.Module):
    """Two branches, of which a micro-batch takes one; sizes that no number of ranks divides; a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.branches = nn.ModuleList(Branch() for _ in range(2))
        self.narrow = nn.Linear(WIDTH, 3)
        self.wide = nn.Linear(3, WIDTH).requires_grad_(False)
        self.scale = nn.Parameter(torch.full((1,), 0.7))

    def forward(self, hidden: torch.Tensor, branch: int) -> torch.Tensor:
        normed = self.norm(hidden)
        return hidden + self.branches[branch](normed) + self.wide(self.narrow(normed)) * self.scale


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(VOCABULARY, WIDTH).requires_grad_(False)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, branch: int) -> torch.Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, branch)
        return self.head(hidden)


def train(model: nn.Module, rank: int, ranks: int, steps: int = 2) -> dict[str, Any]:
    """This rank's part of the first loss, and the outputs; whole gradients of the first step, and weights after two.

    With two ranks or four, the second branch is not used on the first, nor the first on the last.
    """
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(VOCABULARY, (MICRO_BATCHES, 2, 6), generator=generator)
    mine = [(ids[number], number // 2) for number in torch.arange(MICRO_BATCHES).chunk(ranks)[rank].tolist()]
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    # One tensor at a time: those of different meshes do not fit in one list. A large eps: no gradient is near zero.
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-2, eps=1e-2, foreach=False)
    outputs = []
    result: dict[str, Any] = {}

    def forward(number: int, batch: tuple[torch.Tensor, int]) -> dict[str, torch.Tensor]:
        outputs.append(model(*batch))
        return {"loss": F.cross_entropy(outputs[-1].flatten(0, 1).float(), batch[0].flatten(), reduction="sum")}

    for step in range(steps):
        loss = forward_backward(model, mine, forward, ids.numel())["loss"]
        norm = clip_grad_norm_(model, 0.05)
        if step == 0:
            gradients = {f"gradient {name}": whole(parameter.grad) for name, parameter in trainable.items()}
            result = {"loss": loss, "norm": norm, "logits": torch.stack(outputs).detach(), **gradients}
        optimizer.step()
        optimizer.zero_grad()
    return result | {name: whole(parameter) for name, parameter in trainable.items()}


def whole(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def worker(axes: dict[str, int], options: dict[str, Any]) -> dict[str, Any]:
    with process_group() as device:
        dims = ParallelDims(**axes).build(device.type)
        model = parallelize(Model(), dims, tp_plan=PLAN, **options)
        if options.get("cpu_offload"):
            assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
        return reduced(model, dims)


def reduced(model: nn.Module, dims: ParallelDims) -> dict[str, Any]:
    rows = dims.row_ranks
    result = train(model, rows.get_local_rank(), rows.size())
    result["loss"] = sum_over(rows, result["loss"])
    parts = [torch.empty_like(result["logits"]) for _ in range(rows.size())]
    torch.distributed.all_gather(parts, result["logits"], group=rows.get_group())
    return result | {"logits": torch.cat(parts)}


def check(actual: dict[str, torch.Tensor], tolerance: float = TOLERANCE) -> None:
    expected = train(Model(), 0, 1)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        difference = ((actual[name].float() - value).abs().max() / value.abs().max()).item()
        assert difference <= tolerance, f"{name}: {difference:.3g}"


CASES = [
    pytest.param(2, {}, {"cpu_offload": True, "prefetch": 1, "recompute": "selective"}, id="offload"),
    pytest.param(4, {"dp_replicate": 2}, {"cpu_offload": True, "recompute": "full"}, id="hsdp-offload"),
    pytest.param(4, {}, {"reshard_after_forward": 2, "prefetch": 2}, id="reshard-to-2"),
    pytest.param(4, {"dp_replicate": 2}, {"reshard_after_forward": True, "prefetch": 9}, id="hsdp-reshard-root"),
    pytest.param(4, {"tp": 2}, {"cpu_offload": True, "prefetch": 1, "recompute": "selective"}, id="tp-offload"),
    pytest.param(4, {"tp": 2}, {"strategy": "ddp", "recompute": "full"}, id="tp-ddp"),
    pytest.param(4, {"tp": 2, "dp_replicate": 2}, {"reshard_after_forward": False}, id="tp-hsdp"),
    pytest.param(1, {}, {"cpu_offload": True}, id="offload-alone"),
]


@pytest.mark.parametrize(("world_size", "axes", "options"), CASES)
def test_every_option_trains_the_model_of_one_process(world_size, axes, options):
    for actual in run_distributed(worker, world_size, axes, options):
        check(actual)


def pieces_worker() -> list[dict[str, Any]]:
    """The pieces of `parallelize` by hand, on a model that tensor parallelism has split."""
    results = []
    with process_group() as device:
        dims = ParallelDims(tp=2).build(device.type)
        for lay_out, view in (
            (replicate, dims.mesh("replica", "whole", "tp")),
            (fully_shard, dims.mesh("dp_replicate", "fsdp", "tp")),
        ):
            model = Model()
            tensor_parallel(model, view["tp"], plan=PLAN)
            with pytest.raises(
                ValueError, match=r"split by tensor parallelism, .* give dims\.mesh\('replica', 'whole'"
            ):
                replicate(model, dims.mesh("dp"))
            results.append(reduced(lay_out(model, view[view.mesh_dim_names[:2]]), dims))
        with pytest.raises(ValueError, match=r"reshard_after_forward=2 is not a smaller group of the 2 ranks"):
            parallelize(Model(), dims, tp_plan=PLAN, reshard_after_forward=2)
    return results


def test_the_pieces_work_on_a_model_that_is_split():
    for results in run_distributed(pieces_worker, 4):
        for actual in results:
            check(actual)


def dtype_worker(options: dict[str, Any]) -> tuple[torch.dtype, dict[str, Any]]:
    with process_group() as device:
        dims = ParallelDims().build(device.type)
        model = parallelize(Model(), dims, **options)
        with torch.no_grad():
            logits = model(torch.zeros(1, 3, dtype=torch.int64), 0)
        return logits.dtype, reduced(model, dims)


@pytest.mark.parametrize("world_size", [1, 2])
def test_outputs_have_the_dtype_asked_for_and_the_precision_of_the_computation(world_size):
    half = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.bfloat16, "output_dtype": torch.float32}
    for dtype, actual in run_distributed(dtype_worker, world_size, half):
        assert dtype == torch.float32
        assert {actual[name].dtype for name, _ in Model().named_parameters() if name in actual} == {torch.float32}
        with pytest.raises(AssertionError):
            check(actual)
        # Roundings of 2^-9 through three blocks; a gradient that is missing or counted twice is off by 1/2 or 1.
        check(actual, 0.1)


class Gathers(TorchDispatchMode):
    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "allgather" in func.name():
            self.events.append("gather")
        return func(*args, **(kwargs or {}))


def order_worker(prefetch: int | None) -> list[str]:
    """What is gathered and computed in a forward and backward, in the order of the host."""
    events: list[str] = []
    with process_group() as device:
        dims = ParallelDims().build(device.type)
        model = parallelize(Model(), dims, prefetch=prefetch)
        for name, layer in model.layers.named_children():
            layer.narrow.register_forward_hook(lambda module, args, output, name=name: events.append(f"layer {name}"))
        with Gathers(events):
            model(torch.zeros(1, 3, dtype=torch.int64), 0).sum().backward()
    return events


def test_prefetch_gathers_blocks_before_they_are_reached():
    (none, *_), (two, *_) = (run_distributed(order_worker, 2, prefetch) for prefetch in (None, 2))
    # The root first, which holds embedding and head.
    assert none[:7] == ["gather", "gather", "layer 0", "gather", "layer 1", "gather", "layer 2"]
    assert two[:7] == ["gather", "gather", "gather", "gather", "layer 0", "layer 1", "layer 2"]
    assert sorted(none) == sorted(two)
