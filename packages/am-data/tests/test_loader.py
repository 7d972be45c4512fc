"""Every sample once an epoch, whatever the number of ranks and wherever the run was stopped."""

from __future__ import annotations

from functools import partial
from itertools import chain

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import am_data


def make_dataset(num_examples=23, seed=0):
    """Example `i` holds the token `i + 1` alone, 1 to 9 times, so that a batch shows which examples it is made of."""
    lengths = np.random.default_rng(seed).integers(1, 10, num_examples)
    return am_data.TokenDataset(
        {"input_ids": [index + 1] * length, "labels": [index + 1] * length} for index, length in enumerate(lengths)
    )


def make_loader(dataset=None, *, rank=0, world_size=1, **options):
    options = {"global_batch_size": 8, "local_batch_size": 2, "seed": 3, **options}
    return am_data.DataLoader(dataset or make_dataset(), rank=rank, world_size=world_size, **options)


def examples_of(micro_batches):
    """Indices of the examples of a step of one rank, checked against the documents of its batches."""
    found = []
    for batch in micro_batches:
        tokens, documents = batch["input_ids"][0], batch["document_ids"][0]
        for document in range(1, int(documents.max()) + 1):
            ids = tokens[documents == document].unique().tolist()
            assert len(ids) == 1
            found.append(ids[0] - 1)
    return found


def run_ranks(world_size, steps, state=None, **options):
    """The examples of each of `steps` steps over all ranks, and the state after them."""
    loaders = [make_loader(rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    if state is not None:
        for loader in loaders:
            loader.load_state_dict(state)
    iterators = [iter(loader) for loader in loaders]
    taken = []
    for _ in range(steps):
        shares = [next(iterator) for iterator in iterators]
        assert len({len(share) for share in shares}) == 1
        taken.append(sorted(index for share in shares for index in examples_of(share)))
    states = [loader.state_dict() for loader in loaders]
    assert all(other == states[0] for other in states)
    return taken, states[0]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("shuffle", [True, False])
def test_the_same_steps_for_every_world_size_and_every_row_once(world_size, shuffle):
    steps, _ = run_ranks(world_size, 6, shuffle=shuffle)
    assert steps == run_ranks(1, 6, shuffle=shuffle)[0]
    for epoch in (steps[:3], steps[3:]):
        assert sorted(chain.from_iterable(epoch)) == list(range(23))
        assert [len(step) for step in epoch] == [8, 8, 7]
    assert (steps[:3] == steps[3:]) is (not shuffle)
    if not shuffle:
        assert steps[0] == list(range(8))


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 4])
@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 2), (2, 1)])
def test_a_stopped_run_goes_on_with_another_world_size(stop, before, after):
    uninterrupted, end = run_ranks(1, 6)
    first, state = run_ranks(before, stop)
    second, resumed_end = run_ranks(after, 6 - stop, state)
    assert first + second == uninterrupted
    assert resumed_end == end


def test_the_state_is_small_and_plain():
    loader = make_loader()
    steps = iter(loader)
    next(steps)
    state = loader.state_dict()
    fingerprint = make_dataset().fingerprint
    assert state == {"epoch": 0, "cursor": 8, "seed": 3, "num_samples": 23, "fingerprint": fingerprint}
    for _ in range(3):
        next(steps)
    assert loader.state_dict() == {**state, "epoch": 1, "cursor": 8}
    assert loader.epoch == 1


def test_a_position_survives_another_global_batch_size():
    taken, state = run_ranks(1, 1)
    rest, _ = run_ranks(2, 4, state, global_batch_size=4)
    assert sorted(chain.from_iterable(taken + rest)) == list(range(23))


@pytest.mark.parametrize(
    ("saved", "loaded", "message"),
    [
        ({}, {"dataset": make_dataset(seed=1)}, "saved position has fingerprint='{old}', this loader '{new}'"),
        ({}, {"seed": 4}, "saved position has seed=3, this loader 4"),
        ({}, {"shuffle": False}, "saved position has fingerprint="),
    ],
)
def test_a_position_in_other_data_is_refused(saved, loaded, message):
    state = make_loader(**saved).state_dict()
    other = make_loader(**loaded)
    expected = message.format(old=state["fingerprint"], new=other.state_dict()["fingerprint"])
    with pytest.raises(ValueError, match=expected):
        other.load_state_dict(state)


def test_ranks_that_run_out_get_batches_without_targets():
    # The last step has 7 examples for 4 ranks of 2; with 2 left, half of the ranks have nothing.
    dataset = make_dataset(18)
    counts = []
    for rank in range(4):
        steps = list(make_loader(dataset, rank=rank, world_size=4, num_epochs=1))
        assert [len(step) for step in steps] == [1, 1, 1]
        last = steps[-1][0]
        # Token 0 is the padding token; the examples' tokens start at 1.
        counts.append(int((last["input_ids"] > 0).any()))
        if counts[-1] == 0:
            assert {name: tensor.tolist() for name, tensor in last.items()} == {
                "input_ids": [[0]],
                "position_ids": [[0]],
                "shift_labels": [[-100]],
                "document_ids": [[0]],
            }
    assert sorted(counts) == [0, 0, 1, 1]


def test_accumulation_gives_every_rank_as_many_micro_batches():
    # 16 = 4 micro-batches of 2 examples for each of 2 ranks.
    steps = list(make_loader(global_batch_size=16, world_size=2, num_epochs=1))
    assert [len(step) for step in steps] == [4, 2]


def test_packs_are_samples_too():
    dataset = make_dataset(60)
    packed = am_data.PackedDataset(dataset, 20)
    loader = make_loader(packed, global_batch_size=4, local_batch_size=1, num_epochs=1)
    batches = [batch for step in loader for batch in step]
    assert sorted(chain.from_iterable(examples_of([batch]) for batch in batches)) == list(range(60))
    assert max(batch["input_ids"].shape[1] for batch in batches) <= 20
    assert len(batches) == len(packed)


def test_padded_batches_carry_the_same_targets():
    totals = []
    for layout in ("packed", "padded"):
        loader = make_loader(
            collate=partial(am_data.collate, layout=layout, pad_token_id=0), num_epochs=1, shuffle=False
        )
        totals.append([sum(int((b["shift_labels"] != -100).sum()) for b in step) for step in loader])
    assert totals[0] == totals[1]
    assert next(iter(make_loader(collate=partial(am_data.collate, layout="padded"))))[0]["input_ids"].shape[0] == 2


def test_ranks_get_like_work():
    dataset = make_dataset(64)
    tokens = []
    for rank in range(4):
        step = next(iter(make_loader(dataset, rank=rank, world_size=4, global_batch_size=64, local_batch_size=4)))
        tokens.append([batch["input_ids"].shape[1] for batch in step])
    # Within a micro-batch, dealing back and forth leaves at most the spread of one example between ranks.
    spread = np.max(tokens, axis=0) - np.min(tokens, axis=0)
    assert spread.max() <= 4


def test_length_epochs_and_dropping_the_rest():
    loader = make_loader(num_epochs=2)
    assert len(loader) == 3
    assert len(list(loader)) == 6
    dropping = make_loader(num_epochs=1, drop_last=True)
    assert len(dropping) == 2
    assert [len(examples_of(step)) for step in dropping] == [8, 8]


def test_a_validation_loader_starts_over_and_a_finished_training_does_not():
    loader = make_loader(shuffle=False, num_epochs=1)
    first, second = ([examples_of(step) for step in loader] for _ in range(2))
    assert first == second
    finished = loader.state_dict()
    resumed = make_loader(shuffle=False, num_epochs=1)
    resumed.load_state_dict(finished)
    assert list(resumed) == []


def test_a_new_loop_goes_on_where_the_last_one_was_left():
    loader = make_loader(num_epochs=1)
    next(iter(loader))
    rest = [examples_of(step) for step in loader]
    assert len(rest) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"global_batch_size": 10, "world_size": 2},
            r"global_batch_size=10 is not a multiple of local_batch_size=2 \* world_size=2 = 4; choose 8 or 12",
        ),
        ({"global_batch_size": 1}, "= 2; choose 2"),
        ({"local_batch_size": 0}, "local_batch_size=0 must be at least 1"),
        ({"rank": 2, "world_size": 2}, r"rank=2 must be in 0..1 for world_size=2"),
        ({"num_epochs": 0}, "num_epochs=0 must be at least 1"),
        ({"global_batch_size": 32, "drop_last": True}, "23 samples make no full step of global_batch_size=32"),
    ],
)
def test_impossible_arguments_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        make_loader(**options)


def steps_of_rank(rank):
    """The first step of one of 4 ranks by a mesh of one dim, and by the data-parallel dim of a mesh of two."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
    try:
        mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        options = {"global_batch_size": 8, "local_batch_size": 2, "seed": 3}
        with pytest.raises(ValueError, match="were given beside a mesh"):
            am_data.DataLoader(make_dataset(), mesh=mesh, rank=0, **options)
        with pytest.raises(ValueError, match="the mesh has 2 dimensions"):
            am_data.DataLoader(make_dataset(), mesh=square, **options)
        loaders = [am_data.DataLoader(make_dataset(), mesh=one, **options) for one in (mesh, square["dp"])]
        return [examples_of(next(iter(loader))) for loader in loaders]
    finally:
        dist.destroy_process_group()


def test_a_mesh_gives_rank_and_world_size():
    results = [steps_of_rank(rank) for rank in range(4)]
    expected = run_ranks(1, 1)[0][0]
    assert sorted(chain.from_iterable(whole for whole, _ in results)) == expected
    # Two ranks of the tensor-parallel axis share their data-parallel coordinate and so their rows.
    assert results[0][1] == results[1][1]
    assert results[2][1] == results[3][1]
    assert sorted(results[0][1] + results[2][1]) == expected


def test_batches_are_tensors_of_one_forward_pass():
    for batch in next(iter(make_loader())):
        assert set(batch) == {"input_ids", "position_ids", "shift_labels", "document_ids"}
        assert all(isinstance(tensor, torch.Tensor) and tensor.ndim == 2 for tensor in batch.values())
