"""Types of elements, each a row of one table: what safetensors, torch and numpy call it, and what its bits mean.

Without torch. Sub-byte types are left out: a tensor of them cannot be cut at an element.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy


@dataclass(frozen=True, slots=True)
class DType:
    """A type: `torch.<torch>`, in old files of `torch.save` the storage `torch.<storage>`.

    `numpy`: the type of the same values, where numpy has one. `not_finite`: a value is NaN or infinite where its bits
    under the first number are the second; of a complex number those of either part.
    """

    item_bytes: int
    torch: str
    storage: str | None
    numpy: str | None
    not_finite: tuple[int, int] | None = None


# By the names of safetensors.
DTYPES = {
    "BOOL": DType(1, "bool", "BoolStorage", "u1"),
    "U8": DType(1, "uint8", "ByteStorage", "u1"),
    "I8": DType(1, "int8", "CharStorage", "i1"),
    "F8_E5M2": DType(1, "float8_e5m2", None, None, (0x7C, 0x7C)),
    "F8_E4M3": DType(1, "float8_e4m3fn", None, None, (0x7F, 0x7F)),
    "F8_E8M0": DType(1, "float8_e8m0fnu", None, None, (0xFF, 0xFF)),
    "F8_E4M3FNUZ": DType(1, "float8_e4m3fnuz", None, None, (0xFF, 0x80)),
    "F8_E5M2FNUZ": DType(1, "float8_e5m2fnuz", None, None, (0xFF, 0x80)),
    "I16": DType(2, "int16", "ShortStorage", "i2"),
    "U16": DType(2, "uint16", None, "u2"),
    "F16": DType(2, "float16", "HalfStorage", "f2", (0x7C00, 0x7C00)),
    "BF16": DType(2, "bfloat16", "BFloat16Storage", None, (0x7F80, 0x7F80)),
    "I32": DType(4, "int32", "IntStorage", "i4"),
    "U32": DType(4, "uint32", None, "u4"),
    "F32": DType(4, "float32", "FloatStorage", "f4", (0x7F800000, 0x7F800000)),
    "C64": DType(8, "complex64", "ComplexFloatStorage", "c8", (0x7F800000, 0x7F800000)),
    "F64": DType(8, "float64", "DoubleStorage", "f8", (0x7FF0000000000000, 0x7FF0000000000000)),
    "I64": DType(8, "int64", "LongStorage", "i8"),
    "U64": DType(8, "uint64", None, "u8"),
}
ITEM_BYTES = {name: dtype.item_bytes for name, dtype in DTYPES.items()}
# Names in pickles and configs to those of safetensors.
FROM_TORCH = {dtype.torch: name for name, dtype in DTYPES.items()}
FROM_STORAGE = {dtype.storage: name for name, dtype in DTYPES.items() if dtype.storage is not None}
# What a merge may cast from, and to.
CASTABLE = frozenset({"F16", "BF16", "F32", "F64"})
CAST_TO = {DTYPES[name].torch: name for name in ("F32", "BF16", "F16")}


def numbers(bits: numpy.ndarray, dtype: str) -> numpy.ndarray:
    """The numbers that unsigned integers `bits` stand for as elements of `dtype`."""
    kind = DTYPES[dtype].numpy
    if kind is not None:
        return bits.view(kind)
    if dtype == "BF16":
        return (bits.astype(numpy.uint32) << 16).view(numpy.float32)
    return _float8(dtype)[bits]


@functools.cache
def _float8(dtype: str) -> numpy.ndarray:
    """The numbers of all 256 codes of an 8-bit type, float64."""
    codes = numpy.arange(256)
    if dtype == "F8_E5M2":
        return (codes << 8).astype(numpy.uint16).view(numpy.float16).astype(numpy.float64)
    if dtype == "F8_E8M0":
        values = numpy.ldexp(1.0, codes - 127)
    else:
        fraction_bits, bias = {"F8_E4M3": (3, 7), "F8_E4M3FNUZ": (3, 8), "F8_E5M2FNUZ": (2, 16)}[dtype]
        exponent = (codes & 0x7F) >> fraction_bits
        fraction = codes & (2**fraction_bits - 1)
        # Without the leading one where the exponent is zero.
        whole = numpy.where(exponent == 0, fraction, fraction + 2**fraction_bits)
        values = numpy.ldexp(whole.astype(numpy.float64), numpy.maximum(exponent, 1) - bias - fraction_bits)
        values = numpy.where(codes >= 0x80, -values, values)
    mask, pattern = DTYPES[dtype].not_finite or (0, 1)
    values[(codes & mask) == pattern] = numpy.nan
    return values
