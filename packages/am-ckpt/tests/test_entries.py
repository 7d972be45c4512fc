"""What a loop of one's own keeps besides model and optimizer: numbers, generators, state of a rank, averages."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import am_ckpt
from am_testing import run_distributed


def roundtrip(saved: Any, here: Any, directory: Path) -> Any:
    am_ckpt.Checkpointer(directory).save(1, {"entry": saved})
    state = {"entry": here}
    assert am_ckpt.Checkpointer(directory).load(state) == 1
    return state["entry"]


@pytest.mark.parametrize(
    "value",
    [7, 0.1, "text", None, True, (1, "a"), b"bytes", 2**80, numpy.float32(0.1), numpy.int64(-3), numpy.bool_(True)],
)
def test_plain_values_are_replaced_in_the_dict(value: Any, tmp_path: Path) -> None:
    found = roundtrip(value, None, tmp_path)
    assert found == value
    assert type(found) is type(value)


def test_containers_and_tensors_are_filled_in_place(tmp_path: Path) -> None:
    counts, history, average = {"tokens": 1, "gone": 2}, [0], torch.zeros(3)
    weights = numpy.zeros((2, 3), numpy.float64)
    here = {"counts": counts, "history": history, "average": average, "weights": weights, "best": None}
    array = numpy.asfortranarray(numpy.arange(6.0).reshape(2, 3))
    am_ckpt.Checkpointer(tmp_path).save(
        1,
        {
            "counts": {"tokens": 10, "deep": {"a": [1, numpy.uint8(2)]}},
            "history": [1.5, 2.5],
            "average": torch.arange(3.0),
            "weights": array,
            "best": 0.25,
        },
    )
    am_ckpt.Checkpointer(tmp_path).load(here)
    assert counts == {"tokens": 10, "deep": {"a": [1, 2]}}
    assert (history, average.tolist(), here["best"]) == ([1.5, 2.5], [0, 1, 2], 0.25)
    assert numpy.array_equal(weights, array)


@pytest.mark.parametrize(
    "array",
    [
        numpy.arange(5, dtype=">i4")[::-1],
        numpy.array(3.5, numpy.float16),
        numpy.zeros((0, 2), bool),
        numpy.array([1 + 2j], numpy.complex64),
        numpy.array([2**64 - 1], numpy.uint64),
    ],
)
def test_arrays_inside_of_state(array: numpy.ndarray, tmp_path: Path) -> None:
    found = roundtrip({"a": [array]}, {}, tmp_path)["a"][0]
    assert (found.dtype, found.shape) == (array.dtype.newbyteorder("="), array.shape)
    assert numpy.array_equal(found, array)


@pytest.mark.parametrize(
    ("make", "draw"),
    [
        (lambda seed: torch.Generator().manual_seed(seed), lambda g: torch.rand(4, generator=g).tolist()),
        (numpy.random.RandomState, lambda g: g.normal(size=3).tolist()),
        (numpy.random.default_rng, lambda g: g.normal(size=3).tolist()),
        (lambda seed: numpy.random.Generator(numpy.random.Philox(seed)), lambda g: g.random(5).tolist()),
        (random.Random, lambda g: [g.random(), g.gauss(0, 1)]),
    ],
)
def test_generators_go_on_where_they_were(make: Any, draw: Any, tmp_path: Path) -> None:
    saved, inside = make(3), make(4)
    draw(saved)
    draw(inside)
    here, held = make(9), make(9)
    am_ckpt.Checkpointer(tmp_path).save(1, {"one": saved, "more": {"g": inside, "new": inside}})
    state = {"one": here, "more": {"g": held}}
    am_ckpt.Checkpointer(tmp_path).load(state)
    assert state["one"] is here
    assert state["more"]["g"] is held
    expected = draw(inside)
    assert draw(saved) == draw(here)
    assert expected == draw(held) == draw(state["more"]["new"])


def test_states_of_the_global_generators(tmp_path: Path) -> None:
    def states() -> dict[str, Any]:
        return {"torch": torch.get_rng_state(), "numpy": numpy.random.get_state(), "python": random.getstate()}

    state = {"rng": states(), "default": torch.default_generator}
    am_ckpt.Checkpointer(tmp_path).save(1, state)
    expected = torch.rand(3).tolist()
    state["rng"] = states()
    am_ckpt.Checkpointer(tmp_path).load(state)
    assert torch.rand(3).tolist() == expected
    torch.set_rng_state(state["rng"]["torch"])
    numpy.random.set_state(state["rng"]["numpy"])
    random.setstate(state["rng"]["python"])
    assert torch.rand(3).tolist() == expected


@pytest.mark.parametrize(
    ("saved", "here", "text"),
    [
        (torch.zeros(3), torch.zeros(4), r"state\['entry'\] is F32 \[4\] here, F32 \[3\] in the checkpoint"),
        ([1], {"a": 1}, r"state\['entry'\] is a dict here, a list in the checkpoint"),
        (3, torch.Generator(), r"state\['entry'\] is a Generator here, an int in the checkpoint"),
        ({"a": torch.zeros(2)}, {"a": torch.zeros(2), "b": torch.zeros(1)}, "1 not in the checkpoint: b"),
        ({"a": torch.zeros(2)}, {"a": torch.zeros(3)}, r"a: here F32 \[3\], in the checkpoint F32 \[2\]"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(saved: Any, here: Any, text: str, tmp_path: Path) -> None:
    am_ckpt.Checkpointer(tmp_path).save(1, {"entry": saved, "other": 5})
    state = {"other": 6, "entry": here}
    with pytest.raises(ValueError, match=text):
        am_ckpt.Checkpointer(tmp_path).load(state)
    assert state["other"] == 6


def test_what_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    for value in (object(), numpy.array(["a"]), {"a": numpy.array([None])}):
        with pytest.raises(TypeError, match="entry"):
            am_ckpt.Checkpointer(tmp_path).save(1, {"entry": value})
    for name in ("optim", "state"):
        with pytest.raises(ValueError, match=f"{name!r} .* another name"):
            am_ckpt.Checkpointer(tmp_path).save(1, {name: {"a": torch.zeros(1)}})


class Average:
    """Weights averaged over steps, sharded as the model is."""

    def __init__(self, kind: str, model: nn.Module) -> None:
        named = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        self.entry: Any = named
        if kind == "module":
            self.entry = nn.Module()
            for name, tensor in named.items():
                self.entry.register_buffer(name.replace(".", "_"), tensor)

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.entry if isinstance(self.entry, dict) else dict(self.entry.named_buffers())


def averaged(kind: str, seed: int) -> tuple[nn.Module, Average]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 7))
    if dist.is_initialized():
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, Average(kind, model)


def with_average(kind: str, directory: str, seed: int, save: bool) -> dict[str, list[Any]]:
    model, average = averaged(kind, seed)
    for tensor in average.tensors().values():
        tensor.add_(1.0)
    checkpoints = am_ckpt.Checkpointer(directory)
    state = {"model": model, "ema": average.entry, "step": 5}
    if save:
        checkpoints.save(1, state)
    else:
        assert checkpoints.load(state) == 1
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).tolist()
        for name, tensor in average.tensors().items()
    }


@pytest.mark.parametrize("kind", ["dict", "module"])
def test_averaged_weights_beside_the_model_are_sharded_and_change_ranks(kind: str, tmp_path: Path) -> None:
    two = run_distributed(with_average, 2, kind, str(tmp_path / "two"), 0, True)
    shards = sorted(path.name for path in (tmp_path / "two" / "step_000001" / "ema").iterdir())
    assert [name[:11] for name in shards] == ["shard-00001", "shard-00002"]
    assert am_ckpt.verify(tmp_path / "two" / "step_000001", full=True).problems == []
    assert with_average(kind, str(tmp_path / "two"), 1, False) == two[0]
    one = with_average(kind, str(tmp_path / "one"), 0, True)
    assert run_distributed(with_average, 2, kind, str(tmp_path / "one"), 1, False) == [one, one]
    steps = [tmp_path / folder / "step_000001" for folder in ("one", "two")]
    compared = am_ckpt.diff(*steps, tensors="ema/*")
    assert (compared.num_equal, compared.differences) == (4, [])
    # Damage is found there too.
    path = next((tmp_path / "one" / "step_000001" / "ema").iterdir())
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"ema/shard-00001.* is damaged"):
        with_average(kind, str(tmp_path / "one"), 1, False)


def of_each_rank(directory: str, save: bool) -> list[Any]:
    rank = dist.get_rank() if dist.is_initialized() else 0
    generator = torch.Generator().manual_seed(rank if save else 99)
    cursor = am_ckpt.PerRank({"file": rank if save else -1, "noise": torch.full((2,), float(rank if save else -1))})
    state = {"rng": am_ckpt.PerRank(generator), "cursor": cursor, "seen": am_ckpt.PerRank(rank if save else None)}
    checkpoints = am_ckpt.Checkpointer(directory)
    if save:
        checkpoints.save(1, state)
        # The same content is the same step.
        checkpoints.save(1, state)
    else:
        checkpoints.load(state)
    found = [cursor.value["file"], cursor.value["noise"].tolist(), state["seen"].value]
    return [*found, torch.rand(3, generator=generator).tolist()]


def test_state_of_each_rank_comes_back_to_it(tmp_path: Path) -> None:
    saved = run_distributed(of_each_rank, 2, str(tmp_path), True)
    assert saved[0] != saved[1]
    assert run_distributed(of_each_rank, 2, str(tmp_path), False) == saved
    with pytest.raises(ValueError, match=r"state\['rng'\] is that of each of 2 ranks, .* 1 here; .*leave 'rng' out"):
        of_each_rank(str(tmp_path), False)
    assert am_ckpt.Checkpointer(tmp_path).load({}) == 1


def test_state_of_each_rank_must_be_said_to_be_so(tmp_path: Path) -> None:
    checkpoints = am_ckpt.Checkpointer(tmp_path)
    checkpoints.save(1, {"a": am_ckpt.PerRank(3), "b": 4})
    with pytest.raises(ValueError, match=r"state\['a'\] is that of each rank in the checkpoint; .*PerRank"):
        checkpoints.load({"a": 0})
    with pytest.raises(ValueError, match=r"state\['b'\] is one for all ranks in the checkpoint; .*without PerRank"):
        checkpoints.load({"b": am_ckpt.PerRank(0)})


def differing(directory: str) -> str:
    try:
        am_ckpt.Checkpointer(directory).save(
            1, {"ema": {"a": torch.full((40000,), 1.0).index_fill_(0, torch.tensor([39999]), dist.get_rank())}}
        )
    except ValueError as error:
        return str(error)
    return ""


def test_tensors_that_differ_between_ranks_are_refused(tmp_path: Path) -> None:
    first, second = run_distributed(differing, 2, str(tmp_path))
    assert first == second
    assert "'a' [0:40000] has other values on rank 1 than on rank 0" in first
    assert "am_ckpt.PerRank" in first


def test_a_part_of_a_checkpoint_is_loaded_on_request(tmp_path: Path) -> None:
    def model(*names: str) -> nn.Module:
        module = nn.Module()
        for name in names:
            module.register_parameter(name, nn.Parameter(torch.full((2,), 1.0)))
        return module

    checkpoints = am_ckpt.Checkpointer(tmp_path)
    checkpoints.save(1, {"model": model("body", "head"), "count": 3})
    here = model("body", "new_head")
    nn.init.zeros_(here.body)
    nn.init.zeros_(here.new_head)
    state = {"model": here, "fresh": 8}
    with pytest.raises(ValueError, match=r"has no state \['fresh'\]"):
        checkpoints.load(state)
    with pytest.warns(UserWarning, match="loaded a part of step_000001") as caught:
        assert checkpoints.load(state, strict=False) == 1
    text = " ".join(str(warning.message) for warning in caught)
    assert "1 not in the checkpoint: new_head" in text
    assert "1 only in the checkpoint: head" in text
    assert "'fresh'" in text
    assert (here.body.tolist(), here.new_head.tolist(), state["fresh"]) == ([1, 1], [0, 0], 8)
    # A shape is still a mistake, and nothing in common is one too.
    wrong = model("body")
    wrong.body = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=r"body: here F32 \[3\]"):
        checkpoints.load({"model": wrong}, strict=False)
    with pytest.raises(ValueError, match="nothing of the model is in the checkpoint"):
        checkpoints.load({"model": model("other")}, strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoints.load({"model": model("body", "head")}, strict=False) == 1
