"""What a run is told of its data: what a step holds, and where the last one of an epoch is another."""

from __future__ import annotations

import numpy as np
import pytest

import am_data
from am_recipes import data


class Endless:
    """A stream of one token after the other."""

    def __iter__(self):
        yield {"input_ids": np.arange(3), "labels": np.arange(3)}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def rows(number: int) -> am_data.TokenDataset:
    return am_data.TokenDataset([{"input_ids": np.arange(1, 11), "labels": np.arange(1, 11)}] * number)


@pytest.mark.parametrize(
    ("number", "pack", "drop_last", "said"),
    [
        (16, 0, False, "a step is 8 rows: on average 80 tokens\nan epoch is 2 steps"),
        (22, 0, False, "a step is 8 rows: on average 80 tokens\nan epoch is 3 steps, the last of 6 instead of 8"),
        # 17 packs of three rows each.
        (51, 30, True, "a step is 8 packs: on average 24.0 rows, 240 tokens\nan epoch is 2 steps; "
         "dataloader.drop_last leaves 1 of 17 packs out of each"),
        (51, 30, False, "a step is 8 packs: on average 24.0 rows, 240 tokens\nan epoch is 3 steps, the last of 1 "
         "instead of 8\n"
         "at the same learning rate, so each of them moves the model more than others do;\n"
         "dataloader.drop_last leaves such a step out"),
        (3, 0, False, "a step is 8 rows: on average 80 tokens\nan epoch is 1 step, the last of 3 instead of 8"),
    ],
)  # fmt: skip
def test_what_a_step_holds_is_said_with_the_short_one(number: int, pack: int, drop_last: bool, said: str) -> None:
    dataset = rows(number)
    packed = am_data.PackedDataset(dataset, pack) if pack else dataset
    options = {"global_batch_size": 8, "local_batch_size": 1, "num_epochs": 1, "drop_last": drop_last}
    loader = am_data.DataLoader(packed, **options)
    assert data.step_size(8, dataset, loader, drop_last) == said
    # It is so: each epoch has these steps, and drop_last leaves the short one of packs out too.
    steps = list(loader)
    assert len(steps) == (number if not pack else 17) // 8 if drop_last else len(loader)
    tokens = sum(data.count_tokens(step) for step in steps)
    assert tokens == (480 if drop_last else 10 * number)


def test_a_step_of_a_stream_is_its_samples() -> None:
    loader = am_data.DataLoader(Endless(), global_batch_size=4, local_batch_size=1, shuffle=False)
    assert data.step_size(4, Endless(), loader, False) == "a step is 4 samples of a stream"
    with pytest.raises(TypeError, match="has no length"):
        _ = loader.num_samples
