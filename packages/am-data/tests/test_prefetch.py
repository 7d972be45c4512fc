"""The thread that prepares steps: how far ahead it is, where its errors come, and that it always ends."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import traceback
from functools import partial

import numpy as np
import pytest
import torch

import am_data

PATIENCE_SECONDS = 60


class Counted:
    """A dataset of 20 examples of one token that counts how many were asked for, and fails at one of them."""

    lengths = np.ones(20, dtype=np.int64)
    fingerprint = "counted"

    def __init__(self, fails_at=None):
        self.fails_at = fails_at
        self.asked = 0

    def __len__(self):
        return 20

    def __getitem__(self, index):
        if index == self.fails_at:
            raise KeyError(f"example {index} is gone")
        self.asked += 1
        return {"input_ids": [index], "labels": [index]}


class CountedStream(Counted):
    lengths = None
    __len__ = None

    def __init__(self, fails_at=None):
        super().__init__(fails_at)
        self.position = 0

    def __iter__(self):
        while self.position < 20:
            self.position += 1
            yield self[self.position - 1]
        self.position = 0

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def make_loader(dataset, **options):
    options = {"global_batch_size": 2, "local_batch_size": 2, "shuffle": False, "num_epochs": 1, **options}
    return am_data.DataLoader(dataset, **options)


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "am-data-prefetch"]


def wait_until(condition):
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize(("prefetch", "ahead"), [(0, 0), (1, 1), (3, 3)])
def test_as_many_steps_are_prepared_while_one_is_in_use(prefetch, ahead):
    dataset = Counted()
    steps = iter(make_loader(dataset, prefetch=prefetch))
    for number in (1, 2, 3):
        next(steps)
        # Two samples a step, and the one that is looked at before the first.
        expected = 1 + 2 * (number + ahead)
        wait_until(lambda expected=expected: dataset.asked >= expected)
        time.sleep(0.02)
        assert dataset.asked == expected
    assert len(threads()) == (prefetch > 0)
    steps.close()


@pytest.mark.parametrize("prefetch", [0, 1, 4, 50])
@pytest.mark.parametrize("fails_at", [4, 5, 6])
@pytest.mark.parametrize("kind", [Counted, CountedStream])
def test_an_error_comes_at_its_own_step_with_its_own_traceback(kind, fails_at, prefetch):
    loader = make_loader(kind(fails_at), prefetch=prefetch)
    steps = iter(loader)
    given = fails_at // 2
    for _ in range(given):
        next(steps)
    with pytest.raises(KeyError, match=f"example {fails_at} is gone") as caught:
        next(steps)
    names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert names[-1] == "__getitem__"
    assert loader.state_dict()["cursor"] == 2 * given
    assert not threads()
    with pytest.raises(StopIteration):
        next(steps)
    # A new loop goes on before the error.
    with pytest.raises(KeyError, match=f"example {fails_at} is gone"):
        next(iter(loader))


@pytest.mark.parametrize("kind", [Counted, CountedStream])
def test_the_thread_ends_with_its_loop(kind):
    loader = make_loader(kind(), prefetch=2)
    steps = iter(loader)
    assert not threads()
    next(steps)
    assert len(threads()) == 1
    steps.close()
    assert not threads()
    steps = iter(loader)
    next(steps)
    assert len(threads()) == 1
    del steps
    assert not threads()
    assert len(list(loader)) == 8
    assert not threads()
    for _ in loader:
        break
    assert not threads()


def test_the_thread_ends_with_an_iterator_that_is_in_a_cycle():
    steps = iter(make_loader(Counted()))
    next(steps)
    holder = [steps]
    holder.append(holder)
    del steps, holder
    gc.collect()
    wait_until(lambda: not threads())


@pytest.mark.parametrize("prefetch", [0, 1])
@pytest.mark.parametrize("kind", [Counted, CountedStream])
def test_one_loop_at_a_time(kind, prefetch):
    loader = make_loader(kind(), prefetch=prefetch)
    first = iter(loader)
    next(first)
    state = loader.state_dict()
    second = iter(loader)
    next(second)
    with pytest.raises(RuntimeError, match="was iterated anew or got another position, so this loop is over"):
        next(first)
    assert len(threads()) == prefetch
    loader.load_state_dict(state)
    with pytest.raises(RuntimeError, match="so this loop is over"):
        next(second)
    assert [batch["input_ids"].tolist() for batch in next(iter(loader))] == [[[2, 3]]]
    assert not threads()


def test_a_negative_prefetch_is_refused():
    with pytest.raises(ValueError, match="prefetch=-1 must be at least 0 steps"):
        make_loader(Counted(), prefetch=-1)


def test_collate_runs_beside_the_step_in_use():
    second = threading.Event()

    def collate(samples):
        batch = am_data.collate(samples)
        if batch["input_ids"][0, 0] == 2:
            second.set()
        return batch

    for step in make_loader(Counted(), collate=collate):
        assert step[0]["input_ids"].tolist() == [[0, 1]]
        assert second.wait(PATIENCE_SECONDS)
        break


def test_the_interpreter_ends_with_a_loop_that_was_left_and_a_stream_that_gives_nothing():
    code = """
import threading
import numpy as np
import am_data

class Waiting:
    def __iter__(self):
        for index in range(5):
            yield {"input_ids": [index], "labels": [index]}
        threading.Event().wait()
    def state_dict(self):
        return {}
    def load_state_dict(self, state):
        pass

examples = [{"input_ids": [1], "labels": [1]}] * 8
options = {"global_batch_size": 2, "local_batch_size": 2, "shuffle": False}
left = iter(am_data.DataLoader(am_data.TokenDataset(examples), prefetch=1, **options))
next(left)
waiting = iter(am_data.DataLoader(Waiting(), **options))
print(next(waiting)[0]["input_ids"].tolist(), next(waiting)[0]["input_ids"].tolist(), flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.strip(), done.stderr.strip()) == (0, "[[0, 1]] [[2, 3]]", "")


def test_steps_are_the_callers_own():
    steps = list(make_loader(Counted(), collate=partial(am_data.collate, layout="padded"), rank=1, world_size=2,
                             local_batch_size=1, global_batch_size=4))  # fmt: skip
    batches = [batch for step in steps for batch in step]
    for batch in batches:
        batch["input_ids"] += 100
    assert len({batch["input_ids"].data_ptr() for batch in batches}) == len(batches)
    assert all(isinstance(batch["input_ids"], torch.Tensor) for batch in batches)
