"""Axis sizes, the ranks behind every mesh, the process group, and sums."""

from __future__ import annotations

import itertools
import math
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import am_mesh
from am_mesh import ParallelDims, clip_grad_norm_, grad_norm, process_group, sum_over
from am_testing import run_distributed

WORLD = 8
AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
FACTORISATIONS = [
    dict(zip(AXES, sizes)) for sizes in itertools.product((1, 2, 4, 8), repeat=len(AXES)) if math.prod(sizes) == WORLD
]


@pytest.fixture
def fake_rank():
    """Makes this process one rank of a world whose collectives do nothing."""

    def start(rank: int, world_size: int) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)

    yield start
    dist.destroy_process_group()


def expected_line(sizes: dict[str, int], merged: dict[str, tuple[str, ...]], name: str, rank: int) -> list[int]:
    """The ranks that differ from `rank` along `name` only, in the order of that axis."""
    strides = {axis: math.prod(sizes[inner] for inner in AXES[index + 1 :]) for index, axis in enumerate(AXES)}
    moving = merged.get(name, (name,))
    base = rank - sum((rank // strides[axis]) % sizes[axis] * strides[axis] for axis in moving)
    steps = itertools.product(*(range(sizes[axis]) for axis in moving))
    return [base + sum(step * strides[axis] for step, axis in zip(each, moving)) for each in steps]


def test_there_are_35_factorisations_of_eight_over_five_axes():
    assert len(FACTORISATIONS) == math.comb(3 + 4, 4)


@pytest.mark.parametrize("sizes", FACTORISATIONS, ids=lambda sizes: "x".join(map(str, sizes.values())))
def test_every_factorisation_of_eight_puts_each_rank_in_its_place(fake_rank, sizes):
    merged = {"dp": ("dp_replicate", "dp_shard"), "fsdp": ("dp_shard", "cp")}
    for rank in range(WORLD):
        fake_rank(rank, WORLD)
        dims = ParallelDims(**sizes).build("cpu")
        assert dims.world_size == WORLD
        for name in (*AXES, *merged):
            mesh = dims.mesh(name)
            line = expected_line(sizes, merged, name, rank)
            assert mesh.mesh_dim_names == (name,)
            assert mesh.mesh.tolist() == line
            assert mesh.get_local_rank() == line.index(rank)
            assert dist.get_process_group_ranks(mesh.get_group()) == line
            assert dims.sizes[name] == len(line)


@pytest.mark.parametrize("sizes", FACTORISATIONS, ids=lambda sizes: "x".join(map(str, sizes.values())))
def test_experts_see_the_ranks_of_dp_shard_cp_and_tp(fake_rank, sizes):
    ranks = sizes["dp_shard"] * sizes["cp"] * sizes["tp"]
    for ep in (size for size in (1, 2, 4, 8) if ranks % size == 0):
        for rank in (0, 3, WORLD - 1):
            fake_rank(rank, WORLD)
            dims = ParallelDims(**sizes, ep=ep).build("cpu")
            first = rank // ep * ep
            assert dims.mesh("ep").mesh.tolist() == list(range(first, first + ep))
            start = rank // ranks * ranks + rank % ep
            assert dims.mesh("ep_shard").mesh.tolist() == list(range(start, start + ranks, ep)[: ranks // ep])
            assert dims.sizes["ep"] * dims.sizes["ep_shard"] == ranks


def test_the_coordinates_of_a_four_dimensional_layout(fake_rank):
    table = {}
    for rank in range(WORLD):
        fake_rank(rank, WORLD)
        dims = ParallelDims(pp=2, dp_replicate=2, tp=2, ep=2).build("cpu")
        assert (dims.dp_shard, dims.world_size) == (1, WORLD)
        table[rank] = [dims.mesh(name).get_local_rank() for name in ("pp", "dp_replicate", "tp", "dp", "fsdp", "ep")]
    assert table == {
        0: [0, 0, 0, 0, 0, 0],
        1: [0, 0, 1, 0, 0, 1],
        2: [0, 1, 0, 1, 0, 0],
        3: [0, 1, 1, 1, 0, 1],
        4: [1, 0, 0, 0, 0, 0],
        5: [1, 0, 1, 0, 0, 1],
        6: [1, 1, 0, 1, 0, 0],
        7: [1, 1, 1, 1, 0, 1],
    }


def test_ranks_are_asked_for_by_what_they_do(fake_rank):
    fake_rank(5, 16)
    dims = ParallelDims(pp=2, dp_shard=2, cp=2, tp=2).build("cpu")
    assert dims.row_ranks.mesh.tolist() == [1, 5]
    assert (dims.row_ranks.get_local_rank(), dims.row_ranks.size()) == (1, 2)
    assert dims.loss_ranks.mesh.flatten().tolist() == [1, 3, 5, 7, 9, 11, 13, 15]
    assert tuple(dims.loss_ranks.get_coordinate() or ()) == (0, 1, 0)
    assert dims.all_ranks.mesh.flatten().tolist() == list(range(16))
    fake_rank(5, WORLD)
    dims = ParallelDims(dp_replicate=2, tp=2).build("cpu")
    assert dims.row_ranks.mesh.tolist() == [1, 3, 5, 7]
    assert dims.loss_ranks.mesh.flatten().tolist() == [1, 3, 5, 7]
    assert dims.all_ranks.mesh.flatten().tolist() == list(range(WORLD))


def sums_over_named_ranks(axes: dict[str, int]) -> list[int]:
    dims = ParallelDims(**axes).build("cpu")
    here = 10 ** dist.get_rank()
    return [sum_over(ranks, here) for ranks in (dims.row_ranks, dims.loss_ranks, dims.all_ranks)]


def test_everybody_includes_the_ranks_of_one_row():
    for axes in ({"dp_shard": 1, "tp": 2}, {"dp_shard": 1, "cp": 2}, {"dp_shard": 1, "pp": 2}):
        losses = [11, 11] if "tp" not in axes else [1, 10]
        assert run_distributed(sums_over_named_ranks, 2, axes) == [[1, losses[0], 11], [10, losses[1], 11]]


def test_meshes_of_several_axes(fake_rank):
    fake_rank(5, WORLD)
    dims = ParallelDims(dp_replicate=2, cp=2, ep=4).build("cpu")
    assert dims.mesh("dp_replicate", "fsdp").mesh.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert dims.mesh("dp_replicate", "dp_shard").mesh.tolist() == [[1, 3], [5, 7]]
    assert dims.mesh("dp", "cp").mesh.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert dims.mesh("ep_shard", "ep").mesh.tolist() == [[4, 5, 6, 7]]
    for names in (("fsdp", "dp_replicate"), ("fsdp", "cp"), ("dp", "dp")):
        with pytest.raises(ValueError, match=r"not distinct axes of one view in outer-to-inner order; the views are"):
            dims.mesh(*names)
    with pytest.raises(ValueError, match=r"unknown mesh axis 'hsdp'; choose from pp, dp_replicate, dp_shard, cp, tp"):
        dims.mesh("hsdp")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"tp": 3},
            "world_size=8 is not divisible by pp=1 * dp_replicate=1 * cp=1 * tp=3 = 3; nearest legal: "
            "(pp=1, dp_replicate=1, dp_shard=2, cp=1, tp=4) or (pp=1, dp_replicate=1, dp_shard=4, cp=1, tp=2) or",
        ),
        (
            {"dp_replicate": 2, "dp_shard": 3},
            "pp=1 * dp_replicate=2 * dp_shard=3 * cp=1 * tp=1 = 6 is not world_size=8; nearest legal: "
            "(pp=1, dp_replicate=2, dp_shard=4, cp=1, tp=1) or",
        ),
        (
            {"pp": 16},
            "world_size=8 is not divisible by pp=16 * dp_replicate=1 * cp=1 * tp=1 = 16; nearest legal: "
            "(pp=8, dp_replicate=1, dp_shard=1, cp=1, tp=1) or",
        ),
        ({"ep": 3}, "ep=3 does not divide dp_shard * cp * tp = 8 * 1 * 1 = 8; nearest legal: ep=4, ep=2, ep=8"),
        (
            {"dp_replicate": 4, "tp": 2, "ep": 4},
            "ep=4 does not divide dp_shard * cp * tp = 1 * 1 * 2 = 2; nearest legal: ep=2, ep=1",
        ),
        ({"tp": 16, "ep": 16}, "no factorisation of 8 leaves dp_shard * cp * tp divisible by ep=16"),
    ],
)
def test_sizes_that_do_not_make_up_the_world_are_refused_with_the_nearest_that_do(fake_rank, sizes, message):
    fake_rank(0, WORLD)
    with pytest.raises(ValueError, match=re.escape(message)):
        ParallelDims(**sizes).build("cpu")


def test_impossible_sizes_are_refused_at_once():
    with pytest.raises(ValueError, match=r"tp=0 is not a legal size; choose at least 1$"):
        ParallelDims(tp=0)
    with pytest.raises(ValueError, match=r"dp_shard=-2 is not a legal size; choose at least 1, or -1"):
        ParallelDims(dp_shard=-2)
    with pytest.raises(ValueError, match=r"ep=4 does not divide .* = 2 \* 1 \* 1 = 2; nearest legal: ep=2, ep=1"):
        ParallelDims(dp_shard=2, ep=4)
    with pytest.raises(TypeError, match=r"cp='2' is a str; axis sizes are ints"):
        ParallelDims(cp="2")
    with pytest.raises(TypeError, match=r"pp=True is a bool"):
        ParallelDims(pp=True)


def test_sizes_can_be_resolved_without_a_process_group():
    dims = ParallelDims(tp=4, dp_replicate=2)
    assert dims.resolve(64).dp_shard == 8
    assert dims.dp_shard == -1
    with pytest.raises(ValueError, match=r"world_size=0 is not a legal size"):
        dims.resolve(0)
    with pytest.raises(RuntimeError, match=r"no default process group; call build inside"):
        dims.build("cpu")
    with pytest.raises(RuntimeError, match=r"no meshes yet; use what `.build\(device_type\)` returns"):
        dims.resolve(64).mesh("tp")


def test_a_single_process_gets_a_group_of_one_that_ends_with_the_block():
    for _ in range(2):
        with process_group() as device:
            assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
            assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
            dims = ParallelDims().build(device.type)
            assert sum_over(dims.mesh("dp"), 3) == 3
        assert not dist.is_initialized()
    with pytest.raises(KeyError, match="inside"), process_group():
        raise KeyError("inside")
    assert not dist.is_initialized()
    with pytest.raises(ValueError, match=r"timeout_minutes=0 must be positive"), process_group(0):
        pass


def test_the_environment_of_torchrun_is_used(monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    with process_group(timeout_minutes=0.5):
        # Rank 0 serves the store there.
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        assert sum_over(ParallelDims().build("cpu").mesh("dp"), 2) == 2
    assert not dist.is_initialized()


@pytest.mark.parametrize(("here", "missing"), [(0, "1, 2"), (1, "0, 2")])
def test_ranks_that_never_arrive_are_named(monkeypatch, here, missing):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    # As under torchrun, whose agent serves the store.
    launched = {"RANK": here, "WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    for name, value in (launched | {"TORCHELASTIC_USE_AGENT_STORE": True}).items():
        monkeypatch.setenv(name, str(value))
    message = rf"rank {missing} of world_size=3 has not come within 0.005 minutes; every rank has to start"
    with pytest.raises(TimeoutError, match=message), process_group(timeout_minutes=0.005):
        pass
    assert not dist.is_initialized()


def embedded_worker() -> tuple[int, bool]:
    with process_group():
        size = dist.get_world_size()
    return size, dist.is_initialized()


def test_a_group_that_exists_is_used_and_left():
    assert run_distributed(embedded_worker, 2) == [(2, True), (2, True)]


def sum_worker(names: tuple[str, ...]) -> list[Any]:
    dims = ParallelDims(dp_replicate=2, cp=2).build("cpu")
    rank = dist.get_rank()
    tensor = torch.arange(4.0, dtype=torch.bfloat16).view(2, 2).t() * rank
    kept = tensor.clone()
    values = [sum_over(dims.mesh(*names), value) for value in (2**53 + 1, 0.1 * (rank + 1), tensor)]
    assert torch.equal(tensor, kept)
    return values


def test_sums_are_exact_and_keep_their_type():
    for whole, real, tensor in run_distributed(sum_worker, 4, ("dp", "cp")):
        assert (type(whole), whole) == (int, 4 * (2**53 + 1))
        assert type(real) is float
        assert real == pytest.approx(1.0, rel=1e-15)
        assert tensor.dtype == torch.bfloat16
        assert tensor.tolist() == [[0.0, 12.0], [6.0, 18.0]]
    # Along one axis: ranks 0 and 2, ranks 1 and 3.
    assert [tensor[0, 1].item() for *_, tensor in run_distributed(sum_worker, 4, ("dp_replicate",))] == [4, 8, 4, 8]
    for wrong in (True, "1", [1]):
        with process_group(), pytest.raises(TypeError, match="sum_over takes an int, a float or a tensor"):
            sum_over(ParallelDims().build("cpu").mesh("dp"), wrong)


def with_gradients(*gradients: torch.Tensor | None) -> list[nn.Parameter]:
    parameters = []
    for gradient in gradients:
        parameters.append(nn.Parameter(torch.zeros(3) if gradient is None else torch.zeros_like(gradient)))
        parameters[-1].grad = gradient
    return parameters


def test_the_norm_of_plain_parameters_is_accumulated_in_float64():
    # In float32 the many small squares would be lost beside the large one.
    gradients = [torch.tensor([4096.0])] + [torch.full((1,), 0.5)] * 4096
    exact = math.sqrt(4096.0**2 + 4096 * 0.25)
    assert grad_norm(with_gradients(*gradients, None)).item() == pytest.approx(exact, rel=1e-7)
    assert grad_norm([]).item() == 0.0
    model = nn.Linear(2, 1)
    model(torch.ones(1, 2)).sum().backward()
    assert grad_norm(model).item() == pytest.approx(math.sqrt(3.0), rel=1e-6)
    assert grad_norm(model.weight).item() == pytest.approx(math.sqrt(2.0), rel=1e-6)


def test_bfloat16_gradients_are_scaled_by_an_unrounded_factor():
    parameters = with_gradients(torch.full((64,), 1.5, dtype=torch.bfloat16), torch.tensor([5.0]))
    clip_grad_norm_(parameters, 3.9)
    # The norm was 13. 1.5 * 0.3 rounds to 230 / 512; with 0.3 rounded to bfloat16 first it would be 231 / 512.
    assert parameters[0].grad.dtype == torch.bfloat16
    assert parameters[0].grad.unique().tolist() == [230 / 512]
    assert parameters[1].grad.item() == pytest.approx(1.5, rel=1e-6)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_gradients_with_a_norm_that_is_not_finite_are_returned_unscaled(bad):
    parameters = with_gradients(torch.tensor([3.0, bad]), torch.tensor([4.0]))
    assert not clip_grad_norm_(parameters, 1.0).isfinite()
    torch.testing.assert_close(parameters[0].grad, torch.tensor([3.0, bad]), equal_nan=True, rtol=0, atol=0)
    assert parameters[1].grad.item() == 4.0


def test_limits_and_norms_that_make_no_sense_are_refused():
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"max_norm=.* would erase or flip the gradients; choose a positive"):
            clip_grad_norm_(with_gradients(torch.ones(2)), wrong)
        with pytest.raises(ValueError, match=r"norm_type=.* is not a norm; choose a positive number or math.inf"):
            grad_norm(with_gradients(torch.ones(2)), wrong)


def test_the_public_names_are_the_documented_ones():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    table = re.findall(r"^\| `(\w+)", readme, flags=re.MULTILINE)
    assert sorted(am_mesh.__all__) == sorted(table)
    assert all(name in dir(am_mesh) for name in am_mesh.__all__)
