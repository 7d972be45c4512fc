"""The table of dtypes, which needs no torch, against torch."""

from __future__ import annotations

import numpy
import pytest
import torch

from am_ckpt._dtypes import DTYPES, FROM_STORAGE, numbers


@pytest.mark.parametrize("name", DTYPES)
def test_a_type_is_what_torch_says(name: str) -> None:
    dtype = DTYPES[name]
    theirs = getattr(torch, dtype.torch)
    assert theirs.itemsize == dtype.item_bytes
    bits = numpy.random.default_rng(0).integers(0, 256, 2**17, numpy.uint8).view(f"u{dtype.item_bytes}")
    if dtype.item_bytes <= 2:
        # All of them.
        bits = numpy.arange(2 ** (8 * dtype.item_bytes)).astype(bits.dtype)
    if name == "BOOL":
        bits = bits[:2]
    # numpy has no bfloat16 and no 8-bit floats, but every value of theirs is a float32.
    values = torch.from_numpy(bits.copy()).view(theirs)
    wide = values.float() if dtype.numpy is None else values
    numpy.testing.assert_array_equal(numbers(bits, name), wide.numpy())
    if dtype.not_finite is not None:
        mask, pattern = dtype.not_finite
        parts = bits.view(numpy.uint32).reshape(-1, 2) if name == "C64" else bits[:, None]
        bad = ((parts & parts.dtype.type(mask)) == parts.dtype.type(pattern)).any(1)
        numpy.testing.assert_array_equal(bad, ~torch.isfinite(wide).numpy())


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_storages_are_those_of_torch() -> None:
    for storage, name in FROM_STORAGE.items():
        assert getattr(torch, storage)().dtype == getattr(torch, DTYPES[name].torch)
