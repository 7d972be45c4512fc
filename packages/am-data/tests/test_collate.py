"""The Batch contract, in both layouts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import am_data

LONG = {"input_ids": np.array([11, 12, 13, 14]), "labels": np.array([-100, 12, 13, 14])}
SHORT = {"input_ids": np.array([21, 22]), "labels": np.array([-100, 22])}


def lists(batch):
    return {name: tensor.tolist() for name, tensor in batch.items()}


def test_padded_rows():
    assert lists(am_data.collate([LONG, SHORT], layout="padded", pad_token_id=9)) == {
        "input_ids": [[11, 12, 13, 14], [21, 22, 9, 9]],
        "position_ids": [[0, 1, 2, 3], [0, 1, 0, 0]],
        "shift_labels": [[12, 13, 14, -100], [22, -100, -100, -100]],
        "document_ids": [[1, 1, 1, 1], [1, 1, 0, 0]],
    }


def test_packed_documents_restart_and_never_cross():
    for samples in ([LONG, SHORT], [[LONG, SHORT]]):
        batch = am_data.collate(samples, layout="packed")
        assert lists(batch) == {
            "input_ids": [[11, 12, 13, 14, 21, 22]],
            "position_ids": [[0, 1, 2, 3, 0, 1]],
            "shift_labels": [[12, 13, 14, -100, 22, -100]],
            "document_ids": [[1, 1, 1, 1, 2, 2]],
        }
    assert {name: tensor.dtype for name, tensor in batch.items()} == {
        "input_ids": torch.int64,
        "position_ids": torch.int64,
        "shift_labels": torch.int64,
        "document_ids": torch.int32,
    }


def test_packs_as_padded_rows():
    batch = lists(am_data.collate([[SHORT, SHORT], [SHORT]], layout="padded"))
    assert batch["document_ids"] == [[1, 1, 2, 2], [1, 1, 0, 0]]
    assert batch["shift_labels"] == [[22, -100, 22, -100], [22, -100, -100, -100]]


def test_a_target_at_the_first_token_of_a_document_is_nobodys():
    whole = {"input_ids": np.array([1, 2]), "labels": np.array([1, 2])}
    assert lists(am_data.collate([whole, whole]))["shift_labels"] == [[2, -100, 2, -100]]


def test_lengths_are_rounded_or_fixed():
    assert am_data.collate([LONG, SHORT], pad_to_multiple_of=4)["input_ids"].shape == (1, 8)
    assert am_data.collate([LONG, SHORT], layout="padded", pad_to_multiple_of=3)["input_ids"].shape == (2, 6)
    batch = am_data.collate([LONG, SHORT], max_length=10)
    assert batch["document_ids"].tolist() == [[1, 1, 1, 1, 2, 2, 0, 0, 0, 0]]


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_no_samples_give_a_row_of_padding(layout):
    batch = lists(am_data.collate([], layout=layout, pad_token_id=3, pad_to_multiple_of=2))
    assert batch == {
        "input_ids": [[3, 3]],
        "position_ids": [[0, 0]],
        "shift_labels": [[-100, -100]],
        "document_ids": [[0, 0]],
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "thd"}, "layout='thd' is unknown; choose 'packed' or 'padded'"),
        ({"max_length": 5}, "a row has 6 tokens, max_length=5"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of=0 must be at least 1"),
        ({"max_length": 7, "pad_to_multiple_of": 2}, "max_length=7 is not a multiple of pad_to_multiple_of=2"),
    ],
)
def test_impossible_layouts_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        am_data.collate([LONG, SHORT], **options)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_labels_one_longer_give_the_last_token_a_target(layout):
    window = {"input_ids": np.array([1, 2, 3]), "labels": np.array([1, 2, 3, 4])}
    batch = lists(am_data.collate([[window, SHORT, window]], layout=layout))
    assert batch["input_ids"] == [[1, 2, 3, 21, 22, 1, 2, 3]]
    assert batch["shift_labels"] == [[2, 3, 4, 22, -100, 2, 3, 4]]


@pytest.mark.parametrize("labels", [[1, 2], [1, 2, 3, 4, 5]])
def test_labels_of_another_length_are_refused(labels):
    window = {"input_ids": np.array([1, 2, 3]), "labels": np.array(labels)}
    with pytest.raises(ValueError, match=f"3 input_ids and {len(labels)} labels; give as many, or one more"):
        am_data.collate([window, LONG])
