"""Datasets, streams and collate functions of a user: plain classes and functions that know nothing of am_data."""

from __future__ import annotations

import itertools
import re
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

import am_data

LENGTHS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4]


def make_example(index):
    """Token `index + 1` alone, as often as `LENGTHS` says, with a weight per token that tells the place."""
    length = LENGTHS[index]
    tokens = np.full(length, index + 1)
    return {"input_ids": tokens, "labels": tokens, "weights": index + np.arange(length) / 16}


class Numbers:
    """A Dataset."""

    def __init__(self, size=23):
        self.size = size

    fingerprint = "numbers-1"

    @property
    def lengths(self):
        return np.array(LENGTHS[: self.size])

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return make_example(index)


class Lines:
    """A Stream whose iteration, at its end, leaves it at the start. It gives the very dict that it goes on changing."""

    def __init__(self, size=23):
        self.size = size
        self.state = {"position": 0}

    def __iter__(self):
        while self.state["position"] < self.size:
            self.state["position"] += 1
            yield make_example(self.state["position"] - 1)
        self.state["position"] = 0

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


class RewoundLines(Lines):
    """A Stream that starts over when it is iterated at its end: before and after an end, its state is the same."""

    def __iter__(self):
        if self.state["position"] == self.size:
            self.state["position"] = 0
        while self.state["position"] < self.size:
            self.state["position"] += 1
            yield make_example(self.state["position"] - 1)


def with_flags(samples):
    """A Collate: rows padded with zeros, and a tensor that am_data knows nothing of."""
    width = max((len(sample["input_ids"]) for sample in samples), default=1)
    ids, labels = torch.zeros(max(1, len(samples)), width, dtype=torch.int64), torch.full((1, 1), -100)
    labels = labels.repeat(ids.shape)
    for row, sample in enumerate(samples):
        tokens = torch.as_tensor(sample["input_ids"])
        ids[row, : len(tokens)], labels[row, : len(tokens) - 1] = tokens, tokens[1:]
    return {"input_ids": ids, "shift_labels": labels, "flags": torch.ones(len(samples))}


SOURCES = {
    "dataset": Numbers,
    "dataset of whole steps": lambda: Numbers(24),
    "packs": lambda: am_data.PackedDataset(Numbers(), 12),
    "stream": Lines,
    "stream of whole steps": lambda: Lines(24),
    "rewound stream": RewoundLines,
    "rewound stream of whole steps": lambda: RewoundLines(24),
}
COLLATES = {"packed": am_data.collate, "padded": partial(am_data.collate, layout="padded"), "own": with_flags}


def make_loader(source, *, rank=0, world_size=1, **options):
    options = {"global_batch_size": 8, "local_batch_size": 2, "seed": 3, **options}
    if not isinstance(source, am_data.Dataset):
        options = {"shuffle": False, **options}
    return am_data.DataLoader(source, rank=rank, world_size=world_size, **options)


def run(make_source, steps, *, world_size=1, state=None, **options):
    """For each step the micro-batches of each rank, and the position after it, equal on all ranks."""
    loaders = [make_loader(make_source(), rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    if state is not None:
        for loader in loaders:
            loader.load_state_dict(state)
    iterators = [iter(loader) for loader in loaders]
    found = []
    for _ in range(steps):
        shares = [next(iterator) for iterator in iterators]
        states = [loader.state_dict() for loader in loaders]
        assert all(other == states[0] for other in states)
        found.append((shares, states[0]))
    for iterator in iterators:
        iterator.close()
    return found


def assert_equal_runs(one, other):
    for (shares, state), (other_shares, other_state) in zip(one, other, strict=True):
        assert state == other_state
        for batch, other_batch in zip(chain(*shares), chain(*other_shares), strict=True):
            assert batch.keys() == other_batch.keys()
            for name, tensor in batch.items():
                assert tensor.dtype == other_batch[name].dtype
                assert torch.equal(tensor, other_batch[name])


def indices_of(shares):
    """The examples of a step over all ranks, told by their tokens; a document of one token shows once, too."""
    return sorted({int(token) - 1 for batch in chain(*shares) for token in batch["input_ids"].flatten() if token})


# The collate function of the user takes single examples.
@pytest.mark.parametrize(
    ("kind", "collate"), [pair for pair in itertools.product(SOURCES, COLLATES) if pair != ("packs", "own")]
)
def test_a_step_holds_the_same_for_every_world_size(kind, collate):
    alone = run(SOURCES[kind], 7, collate=COLLATES[collate])
    together = run(SOURCES[kind], 7, world_size=2, collate=COLLATES[collate])
    assert [state for _, state in alone] == [state for _, state in together]
    assert [indices_of(shares) for shares, _ in alone] == [indices_of(shares) for shares, _ in together]
    if kind != "packs":
        size = len(SOURCES[kind]()) if kind.startswith("dataset") else SOURCES[kind]().size
        for epoch in (alone[:3], alone[3:6]):
            assert sorted(chain.from_iterable(indices_of(shares) for shares, _ in epoch)) == list(range(size))


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", SOURCES)
def test_prefetch_changes_nothing(kind, world_size):
    expected = run(SOURCES[kind], 7, world_size=world_size, prefetch=0)
    for prefetch in (1, 5):
        assert_equal_runs(expected, run(SOURCES[kind], 7, world_size=world_size, prefetch=prefetch))


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("kind", SOURCES)
def test_a_stopped_run_goes_on(kind, prefetch):
    whole = run(SOURCES[kind], 7, prefetch=prefetch)
    for stop in range(1, 7):
        (*_, (_, state)) = run(SOURCES[kind], stop, prefetch=prefetch)
        assert_equal_runs(whole[stop:], run(SOURCES[kind], 7 - stop, prefetch=prefetch, state=state))


@pytest.mark.parametrize("prefetch", [0, 1, 5])
@pytest.mark.parametrize("kind", SOURCES)
def test_epochs_end_and_loops_go_on_where_they_were_left(kind, prefetch):
    whole = [state for _, state in run(SOURCES[kind], 6)]
    loader = make_loader(SOURCES[kind](), num_epochs=2, prefetch=prefetch)
    states = []
    # A loop that is left after one step, one after two, then the rest; prepared steps are dropped and made again.
    for left_after in (1, 2, None):
        for number, _ in enumerate(loader, start=1):
            states.append(loader.state_dict())
            assert loader.epoch == loader.state_dict()["epoch"]
            if number == left_after:
                break
    per_epoch = sum(state["epoch"] == 0 for state in whole)
    assert states == whole[: 2 * per_epoch]
    assert loader.epoch == 2
    finished = loader.state_dict()
    resumed = make_loader(SOURCES[kind](), num_epochs=2, prefetch=prefetch)
    resumed.load_state_dict(finished)
    assert list(resumed) == []
    # A loop after the last epoch starts over.
    assert [loader.state_dict() for _ in loader] == states


@pytest.mark.parametrize("size", [10, 12])
def test_rows_of_the_readme_make_a_stream_of_an_iterable_dataset(size):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (code,) = re.findall(r"^```python\n(class Rows:.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    names = {}
    exec(code, names)

    def make():
        rows = [{"input_ids": [index + 1], "labels": [index + 1]} for index in range(size)]
        return names["Rows"](datasets.Dataset.from_list(rows).to_iterable_dataset())

    options = {"global_batch_size": 4, "local_batch_size": 4}
    whole = run(make, 7, **options)
    contents = [(indices_of(shares), state["epoch"], state["cursor"]) for shares, state in whole]
    assert [sorted(chain.from_iterable(step[0] for step in epoch)) for epoch in (contents[:3], contents[3:6])] == [
        list(range(size))
    ] * 2
    for stop in range(1, 7):
        resumed = run(make, 7 - stop, state=whole[stop - 1][1], **options)
        assert [(indices_of(shares), state["epoch"], state["cursor"]) for shares, state in resumed] == contents[stop:]
    with pytest.raises(TypeError, match=r"a datasets.IterableDataset .* would miss rows .*; wrap it in a class"):
        make_loader(make().rows)


def test_a_stream_drops_the_rest_of_an_epoch():
    dropped = run(Lines, 4, drop_last=True)
    assert [indices_of(shares) for shares, _ in dropped] == [[*range(8)], [*range(8, 16)]] * 2
    assert [state["epoch"] for _, state in dropped] == [0, 0, 1, 1]
    assert_equal_runs(dropped[2:], run(Lines, 2, drop_last=True, state=dropped[1][1]))
    whole = run(partial(Lines, 24), 4, drop_last=True)
    assert [len(indices_of(shares)) for shares, _ in whole] == [8, 8, 8, 8]


class PackedLines(Lines):
    def __iter__(self):
        for first, second in pairwise(super().__iter__()):
            yield [first, second]


def test_a_stream_may_give_packs():
    ((shares, _),) = run(PackedLines, 1, global_batch_size=2, local_batch_size=1)
    assert [batch["document_ids"].max().item() for batch in chain(*shares)] == [2, 2]


def test_what_a_stream_is_not_asked_for():
    with pytest.raises(ValueError, match=r"shuffle=True was asked of a stream \(Lines\).*; give shuffle=False"):
        am_data.DataLoader(Lines(), global_batch_size=8, local_batch_size=2)
    loader = make_loader(Lines())
    assert loader.is_stream
    assert not make_loader(Numbers()).is_stream
    with pytest.raises(TypeError, match=r"a stream \(Lines\) has no length, nor has its loader; set max_steps"):
        len(loader)
    with pytest.raises(ValueError, match=r"max_tokens=9 cannot be counted in steps of a stream \(Lines\).*max_steps"):
        loader.steps_for_tokens(9)
    with pytest.raises(TypeError, match=r"PackedDataset needs the lengths .* a stream \(Lines\) does not have; let"):
        am_data.PackedDataset(Lines(), 10)


class Once(Lines):
    def __iter__(self):
        while self.state["position"] < self.size:
            self.state["position"] += 1
            yield make_example(self.state["position"] - 1)


@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_stream_that_does_not_start_over_is_an_error_after_its_steps(prefetch):
    steps = iter(make_loader(Once(), prefetch=prefetch))
    assert [len(next(steps)) for _ in range(3)] == [4, 4, 4]
    with pytest.raises(ValueError, match=r"epoch 1 of the stream \(Once\) gave no sample; a finished stream starts"):
        next(steps)
    with pytest.raises(ValueError, match=r"epoch 0 of the stream \(Lines\) gave no full step; .*global_batch_size=8 "):
        next(iter(make_loader(Lines(7), drop_last=True)))


def test_a_position_of_something_else_is_refused():
    state = make_loader(Lines()).state_dict()
    with pytest.raises(ValueError, match=r"has fingerprint='stream-Lines', this loader 'stream-Once'"):
        make_loader(Once()).load_state_dict(state)
    with pytest.raises(ValueError, match=r"has fingerprint='stream-Lines', this loader 'numbers-1'"):
        make_loader(Numbers()).load_state_dict(state)
    with pytest.raises(ValueError, match=r"has fingerprint='numbers-1', this loader 'stream-Lines'"):
        make_loader(Lines()).load_state_dict(make_loader(Numbers()).state_dict())


def test_the_state_of_a_stream_is_its_own():
    loader = make_loader(Lines(), prefetch=2)
    next(iter(loader))
    assert loader.state_dict() == {
        "epoch": 0,
        "cursor": 8,
        "ended": False,
        "stream": {"position": 8},
        "fingerprint": "stream-Lines",
    }


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_steps_for_tokens(shuffle, drop_last):
    loader = make_loader(Numbers(), shuffle=shuffle, drop_last=drop_last)
    seen = [0]
    for step, _ in zip(loader, range(10)):
        seen.append(seen[-1] + sum(int((batch["document_ids"] > 0).sum()) for batch in step))
    for max_tokens in range(1, seen[-1] + 1):
        steps = loader.steps_for_tokens(max_tokens)
        assert seen[steps - 1] < max_tokens <= seen[steps]
    with pytest.raises(ValueError, match="max_tokens=0 must be at least 1 token"):
        loader.steps_for_tokens(0)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_arrays_of_one_number_per_token_are_shifted_with_the_labels(layout):
    first = {"input_ids": [1, 2, 3], "labels": [1, 2, 3], "weights": [0.5, 1.5, 2.5], "rank": np.int16([7, 8, 9])}
    window = {"input_ids": [4, 5], "labels": [4, 5, 6], "weights": [4.5, 5.5, 6.5], "rank": np.int16([4, 5, 6])}
    batch = am_data.collate([[first, window], window], layout=layout)
    expected = {
        "packed": ([[1.5, 2.5, 0, 5.5, 6.5, 5.5, 6.5]], [[8, 9, 0, 5, 6, 5, 6]]),
        "padded": ([[1.5, 2.5, 0, 5.5, 6.5], [5.5, 6.5, 0, 0, 0]], [[8, 9, 0, 5, 6], [5, 6, 0, 0, 0]]),
    }[layout]
    assert (batch["shift_weights"].tolist(), batch["shift_rank"].tolist()) == expected
    assert (batch["shift_weights"].dtype, batch["shift_rank"].dtype) == (torch.float32, torch.int16)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_weight_stays_with_its_target(layout):
    for shares, _ in run(Numbers, 3, world_size=2, collate=partial(am_data.collate, layout=layout)):
        for batch in chain(*shares):
            targets = batch["shift_labels"] != -100
            expected = (batch["shift_labels"] - 1 + (batch["position_ids"] + 1) / 16) * targets
            assert torch.equal(batch["shift_weights"], expected)


def test_a_rank_without_samples_has_the_tensors_of_the_others():
    ((shares, _),) = run(partial(Numbers, 2), 1, world_size=4, global_batch_size=8, local_batch_size=2)
    kinds = [{name: tensor.dtype for name, tensor in batch.items()} for batch in chain(*shares)]
    assert "shift_weights" in kinds[0]
    assert all(kind == kinds[0] for kind in kinds)
    empty = [batch for batch in chain(*shares) if not batch["document_ids"].any()]
    assert len(empty) == 2
    assert all(batch["shift_weights"].tolist() == [[0.0]] for batch in empty)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (
            {"input_ids": [1, 2], "labels": [1, 2], "weights": [1.0]},
            r"examples hold weights; it has shape \(1,\) for 2",
        ),
        ({"input_ids": [1], "labels": [1, 2], "weights": [1.0]}, r"weights; it has shape \(1,\) for 2 labels"),
        ({"input_ids": [1, 2], "labels": [1, 2], "weights": ["a", "b"]}, "weights of dtype <U1; give numbers"),
        ({"input_ids": [1], "labels": [1], "attention_mask": [1]}, "hold attention_mask, which the layout decides"),
    ],
)
def test_further_arrays_that_do_not_fit_are_refused(example, message):
    with pytest.raises(ValueError, match=message):
        am_data.collate([example])


def test_examples_of_a_micro_batch_hold_the_same_arrays():
    plain = {"input_ids": [1], "labels": [1]}
    with pytest.raises(ValueError, match="an example has no weights, which others of its micro-batch have"):
        am_data.collate([plain, {**plain, "weights": [1.0]}])


class Part:
    """The first members of a Dataset alone."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return make_example(index)


class PartOfStream:
    def __iter__(self):
        yield make_example(0)


def test_missing_members_are_named():
    message = (
        "Part is no am_data.Dataset, it lacks `lengths`, `fingerprint`, and no am_data.Stream, it lacks `__iter__`"
    )
    for refuse in (make_loader, partial(am_data.PackedDataset, capacity=9)):
        with pytest.raises(TypeError, match=message):
            refuse(Part())
    with pytest.raises(TypeError, match=r"no am_data.Stream, it lacks `state_dict`, `load_state_dict`; add what is"):
        make_loader(PartOfStream())
    with pytest.raises(TypeError, match=r"Numbers is a class; give a dataset or a stream, as Numbers\(...\) makes it"):
        make_loader(Numbers)


def changed(base, **members):
    return type(base.__name__, (base,), members)()


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        (
            changed(Numbers, lengths=np.ones(5, int)),
            ValueError,
            r"lengths has shape \(5,\) for len\(dataset\)=23; give",
        ),
        (changed(Numbers, lengths=np.ones(23)), TypeError, "lengths has dtype float64; .* whole numbers"),
        (changed(Numbers, lengths=np.zeros(23, int)), ValueError, "23 of Numbers.lengths are below 1"),
        (changed(Numbers, fingerprint=7), TypeError, "fingerprint is a int; give a str"),
        (Numbers(0), ValueError, r"the dataset \(Numbers\) is empty"),
        (changed(Lines, state_dict=lambda self: None), TypeError, r"Lines.state_dict\(\) returned a NoneType; return"),
    ],
)
def test_wrong_facts_are_refused_when_the_loader_is_made(dataset, error, message):
    with pytest.raises(error, match=message):
        make_loader(dataset)


def gives(*samples):
    return {"__getitem__": lambda self, index: samples[0], "__iter__": lambda self: iter(samples * 9)}


@pytest.mark.parametrize("base", [Numbers, Lines])
@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ("text", " is a str; give a mapping with `input_ids` and `labels`, or a list of such"),
        ({"input_ids": [1]}, " has no `labels`, only input_ids; add the arrays"),
        ({"text": "x"}, " has no `input_ids` and `labels`, only text"),
        ([], " is an empty list; give"),
        (["x"], " holds a str; an example is a mapping of arrays"),
        (None, " is a NoneType; give"),
    ],
)
def test_samples_that_are_no_examples_are_refused_at_the_first_step(base, sample, message):
    steps = iter(make_loader(changed(base, **gives(sample)), shuffle=False))
    where = {Numbers: r"dataset\[0\]", Lines: "sample 0 of the stream"}[base]
    with pytest.raises(TypeError, match=where + message):
        next(steps)


def test_lengths_that_are_not_those_of_the_samples_are_refused():
    dataset = changed(Numbers, lengths=np.full(23, 3))
    loader = make_loader(dataset, shuffle=False, global_batch_size=1, local_batch_size=1)
    with pytest.raises(ValueError, match=r"dataset\[1\] has 1 input_ids, dataset.lengths says 3; lengths are the"):
        list(iter(loader))


def returns(**changes):
    """`am_data.collate` with some of its tensors replaced, where there are samples or `always`."""

    def collate(samples):
        batch = {**am_data.collate(samples), **changes}
        return {name: tensor for name, tensor in batch.items() if tensor is not None}

    return collate


IDS, IGNORED = torch.zeros(2, 5, dtype=torch.int64), torch.full((2, 5), -100)


@pytest.mark.parametrize(
    ("collate", "error", "message"),
    [
        ("packed", TypeError, "collate='packed' is a str; give a function"),
        (lambda samples: [1], TypeError, r"collate\(\[\]\) returned a list; return a mapping"),
        (returns(weights=[1.0]), TypeError, "returned 'weights' as a list; every value is a tensor"),
        (
            returns(input_ids=None),
            ValueError,
            "returned no input_ids, only position_ids, shift_labels, document_ids; a",
        ),
        (returns(shift_labels=None), ValueError, "returned no shift_labels, only input_ids, "),
        (returns(input_ids=IDS.float()), TypeError, "returned input_ids of torch.float32; .* torch.int64"),
        (returns(input_ids=IDS[0]), ValueError, r"returned input_ids \[5\]; give \[B, S\]"),
        (returns(input_ids=IDS), ValueError, r"returned position_ids \[1, 1\] against input_ids \[2, 5\]"),
        (
            lambda samples: {"input_ids": IDS, "shift_labels": IGNORED[:, 1:]},
            ValueError,
            r"returned shift_labels \[2, 4\] against input_ids \[2, 5\]; .* has their \[B, S\]",
        ),
        (
            lambda samples: {"input_ids": IDS, "shift_labels": IGNORED, "shift_weights": torch.ones(5)},
            ValueError,
            r"returned shift_weights \[5\] against input_ids \[2, 5\]",
        ),
        (
            lambda samples: {"input_ids": IDS, "shift_labels": IDS},
            ValueError,
            r"collate\(\[\]\) has 10 targets in shift_labels; of no samples at all it makes one row without targets",
        ),
        (
            lambda samples: am_data.collate(samples[:1] or [samples[0]]),
            IndexError,
            r"raised by collate\(\[\]\): of no samples at all, collate makes one row without targets",
        ),
    ],
)
def test_batches_that_a_loss_would_stumble_over_are_refused_when_the_loader_is_made(collate, error, message):
    with pytest.raises(error, match=message):
        make_loader(Numbers(), collate=collate)


def test_a_batch_that_is_wrong_with_samples_is_refused_at_the_first_step():
    def collate(samples):
        batch = am_data.collate(samples)
        return batch if not samples else {**batch, "shift_labels": batch["shift_labels"][:, :-1]}

    # The last of four ranks has no sample of the first step, and stops as the others do.
    for rank in range(4):
        loader = make_loader(Numbers(3), collate=collate, rank=rank, world_size=4)
        with pytest.raises(ValueError, match=r"collate returned shift_labels \[1, \d\] against input_ids \[1, \d\]"):
            next(iter(loader))


def test_arrays_that_come_and_go_are_refused():
    def getitem(self, index):
        return {**make_example(index), **({"more": np.zeros(LENGTHS[index])} if index == 9 else {})}

    loader = make_loader(
        changed(Numbers, __getitem__=getitem), shuffle=False, global_batch_size=1, local_batch_size=1, num_epochs=1
    )
    with pytest.raises(ValueError, match="a micro-batch and the first sample differ in shift_more; every example"):
        list(iter(loader))


def test_protocols_tell_datasets_from_streams_and_who_reports():
    assert isinstance(Numbers(), am_data.Dataset)
    assert not isinstance(Numbers(), am_data.Stream)
    assert isinstance(Lines(), am_data.Stream)
    assert not isinstance(Lines(), am_data.Dataset)
    plain = am_data.TokenDataset([{"input_ids": [1], "labels": [1]}])
    assert isinstance(plain, am_data.Dataset)
    assert not isinstance(plain, am_data.Reported)
    assert isinstance(changed(Lines, report="all lines"), am_data.Reported)
    assert isinstance(am_data.PackedDataset(plain, 2), am_data.Dataset)


def test_packs_of_packs_hold_all_examples():
    packs = am_data.PackedDataset(Numbers(), 10)
    (*_, again) = [am_data.PackedDataset(packs, 40)]
    indices = sorted(int(example["input_ids"][0]) - 1 for number in range(len(again)) for example in again[number])
    assert indices == list(range(23))
