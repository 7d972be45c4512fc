"""attention against the reference: outputs and gradients in float64, over odd sizes and awkward memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import am_kernels
from am_kernels import reference

TOLERANCE = 1e-12
# Lengths per row: single tokens, several blocks, an empty row, exact fit, equal documents, padding inside.
ROWS = [
    [[5, 1, -2, 33, 7], [48]],
    [[-48], [1] * 48],
    [[16, 16, 16], [-3, 40, -5]],
    [[140, 139, 20, 1], [-100, 200]],
]


def ids_of(rows: list[list[int]]) -> Tensor:
    """`[B, S]` from lengths; a negative length is padding."""
    built = []
    for row in rows:
        parts = [torch.full((abs(n),), index + 1 if n > 0 else 0) for index, n in enumerate(row)]
        built.append(torch.cat(parts))
    return torch.stack(built).int()


def heads(B: int, num_heads: int, S: int, P: int, layout: str, dtype: torch.dtype = torch.float64) -> Tensor:
    if layout == "heads_first":
        x = torch.randn(B, num_heads, S, P, dtype=dtype)
    elif layout == "tokens_first":
        x = torch.randn(B, S, num_heads, P, dtype=dtype).transpose(1, 2)
    else:
        x = torch.randn(B, num_heads, S, 2 * P, dtype=dtype)[..., ::2]
    return x.requires_grad_()


def assert_same(function, inputs: tuple[Tensor, ...], kwargs: dict, tolerance: float = TOLERANCE) -> None:
    torch.manual_seed(1)
    expected = reference.attention(*inputs, **{name: value for name, value in kwargs.items() if name != "backend"})
    actual = function(*inputs, **kwargs)
    assert actual.shape == expected.shape
    assert actual.is_contiguous()
    weight = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, inputs, weight)
    actual_grads = torch.autograd.grad(actual, inputs, weight)
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)
    for got, want in zip(actual_grads, expected_grads, strict=True):
        torch.testing.assert_close(got, want, atol=tolerance, rtol=0)


@pytest.mark.parametrize("layout", ["heads_first", "tokens_first", "strided"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("backend", [None, "sdpa", "bucketed", "reference"])
def test_documents(rows: list[list[int]], layout: str, backend: str | None) -> None:
    torch.manual_seed(0)
    ids = ids_of(rows)
    B, S = ids.shape
    inputs = (heads(B, 6, S, 8, layout), heads(B, 2, S, 8, layout), heads(B, 2, S, 8, layout))
    assert_same(am_kernels.attention, inputs, {"document_ids": ids, "backend": backend})


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    "kwargs",
    [
        {"window": 1},
        {"window": 37},
        {"softcap": 2.0},
        {"causal": False},
        {"scale": 0.5},
        {"causal": False, "softcap": 5.0},
    ],
    ids=str,
)
def test_documents_combined(rows: list[list[int]], kwargs: dict) -> None:
    torch.manual_seed(0)
    ids = ids_of(rows)
    B, S = ids.shape
    inputs = (heads(B, 4, S, 8, "tokens_first"), heads(B, 4, S, 8, "heads_first"), heads(B, 4, S, 8, "tokens_first"))
    assert_same(am_kernels.attention, inputs, {"document_ids": ids, **kwargs})


def test_documents_with_sink_and_its_gradient() -> None:
    torch.manual_seed(0)
    ids = ids_of(ROWS[0])
    B, S = ids.shape
    sink = torch.randn(4, dtype=torch.float64, requires_grad=True)
    inputs = (
        heads(B, 4, S, 8, "tokens_first"),
        heads(B, 2, S, 8, "tokens_first"),
        heads(B, 2, S, 8, "tokens_first"),
        sink,
    )

    def with_sink(attention):
        return lambda q, k, v, sink, **kwargs: attention(q, k, v, sink=sink, document_ids=ids, **kwargs)

    expected = with_sink(reference.attention)(*inputs, window=9)
    actual = with_sink(am_kernels.attention)(*inputs, window=9)
    grads = [torch.autograd.grad(out.square().sum(), inputs) for out in (expected, actual)]
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)
    for want, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)
    # By hand: one key with score s and a sink w gives weight e^s / (e^s + e^w).
    q = k = v = torch.ones(1, 1, 1, 4, dtype=torch.float64)
    out = am_kernels.attention(q, k, v, sink=torch.tensor([1.0], dtype=torch.float64), scale=0.5)
    torch.testing.assert_close(out, torch.full_like(out, torch.sigmoid(torch.tensor(1.0, dtype=torch.float64)).item()))


def test_mask_and_documents_intersect() -> None:
    torch.manual_seed(0)
    ids = ids_of(ROWS[0])
    B, S = ids.shape
    inputs = tuple(heads(B, 4, S, 8, "tokens_first") for _ in range(3))
    visible = (torch.rand(B, 1, S, S) > 0.3) | torch.eye(S, dtype=torch.bool)
    assert_same(am_kernels.attention, inputs, {"document_ids": ids, "mask": visible})
    additive = torch.randn(1, 4, S, S, dtype=torch.float64)
    assert_same(am_kernels.attention, inputs, {"document_ids": ids, "mask": additive})
    assert_same(am_kernels.attention, inputs, {"mask": additive, "window": 5})


@pytest.mark.parametrize("num_queries", [1, 3, 11])
@pytest.mark.parametrize("window", [None, 4, 20])
def test_causal_is_aligned_to_the_last_key(num_queries: int, window: int | None) -> None:
    torch.manual_seed(0)
    inputs = (
        heads(2, 4, num_queries, 8, "heads_first"),
        heads(2, 2, 11, 8, "heads_first"),
        heads(2, 2, 11, 8, "heads_first"),
    )
    assert_same(am_kernels.attention, inputs, {"window": window})
    full = am_kernels.attention(
        torch.cat([inputs[0].new_zeros(2, 4, 11 - num_queries, 8), inputs[0]], dim=2), *inputs[1:], window=window
    )
    last = am_kernels.attention(*inputs, window=window)
    torch.testing.assert_close(last, full[:, -num_queries:], atol=TOLERANCE, rtol=0)


def test_value_heads_may_be_narrower() -> None:
    torch.manual_seed(0)
    ids = ids_of(ROWS[0])
    inputs = (
        heads(2, 4, 48, 12, "tokens_first"),
        heads(2, 2, 48, 12, "tokens_first"),
        heads(2, 2, 48, 8, "heads_first"),
    )
    assert_same(am_kernels.attention, inputs, {"document_ids": ids})


@pytest.mark.parametrize("backend", ["sdpa", "bucketed", "reference"])
def test_padding_neither_reads_nor_leaks(backend: str) -> None:
    torch.manual_seed(0)
    ids = ids_of([[5, -3, 20, -20], [-48]])
    padding = ids == 0
    clean = [heads(2, h, 48, 8, "tokens_first") for h in (4, 2, 2)]
    dirty = [x.detach().masked_fill(padding[:, None, :, None], float("nan")).requires_grad_() for x in clean]
    outs = [am_kernels.attention(*xs, document_ids=ids, backend=backend) for xs in (clean, dirty)]
    weight = torch.randn_like(outs[0])
    grads = [torch.autograd.grad(outs[0], clean, weight)]
    grads.append(torch.autograd.grad(outs[1], dirty, weight.masked_fill(padding[..., None, None], float("nan"))))
    assert torch.equal(outs[0], outs[1])
    assert (outs[1][padding] == 0).all()
    for want, got in zip(*grads, strict=True):
        assert torch.equal(want, got)
        assert (got.transpose(1, 2)[padding] == 0).all()


@pytest.mark.parametrize("backend", [None, "sdpa", "bucketed", "reference"])
def test_padding_alone_gives_connected_zeros(backend: str | None) -> None:
    q, k, v = (torch.full((2, 4, 3, 8), float("nan"), requires_grad=True) for _ in range(3))
    out = am_kernels.attention(q, k, v, document_ids=torch.zeros(2, 3, dtype=torch.int32), backend=backend)
    assert out.shape == (2, 3, 4, 8)
    assert (out == 0).all()
    out.sum().backward()
    for tensor in (q, k, v):
        assert tensor.grad is not None
        assert (tensor.grad == 0).all()


def test_documents_longer_than_a_bucket_join_the_short_ones() -> None:
    torch.manual_seed(0)
    ids = ids_of([[30, 1100, -5, 20]])
    inputs = (
        heads(1, 2, 1155, 4, "tokens_first"),
        heads(1, 1, 1155, 4, "tokens_first"),
        heads(1, 1, 1155, 4, "tokens_first"),
    )
    assert_same(am_kernels.attention, inputs, {"document_ids": ids, "backend": "bucketed"}, tolerance=1e-11)


def test_one_plan_serves_every_layer() -> None:
    torch.manual_seed(0)
    ids = ids_of(ROWS[0])
    documents = am_kernels.document_segments(ids)
    assert (documents.starts, documents.lengths, documents.num_padding) == ([0, 5, 8, 41, 48], [5, 1, 33, 7, 48], 2)
    for num_kv_heads, window in ((2, None), (4, None), (2, 3)):
        inputs = (
            heads(2, 4, 48, 8, "tokens_first"),
            heads(2, num_kv_heads, 48, 8, "heads_first"),
            heads(2, num_kv_heads, 48, 8, "tokens_first"),
        )
        assert_same(am_kernels.attention, inputs, {"document_ids": documents, "window": window})


def test_a_row_that_sees_nothing_gives_zeros() -> None:
    q = torch.randn(1, 2, 4, 8, requires_grad=True)
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    mask[:, :, 0] = False
    for backend in ("sdpa", "reference"):
        out = am_kernels.attention(q, q, q, mask=mask, backend=backend)
        assert (out[:, 0] == 0).all()
        assert torch.isfinite(torch.autograd.grad(out.sum(), q)[0]).all()


def test_gradcheck() -> None:
    torch.manual_seed(0)
    ids = torch.tensor([[1, 1, 1, 0, 2, 2]])
    inputs = (heads(1, 2, 6, 3, "tokens_first"), heads(1, 1, 6, 3, "tokens_first"), heads(1, 1, 6, 3, "tokens_first"))
    assert torch.autograd.gradcheck(
        lambda q, k, v: am_kernels.attention(q, k, v, document_ids=ids, backend="bucketed"), inputs
    )


@pytest.mark.parametrize("backend", ["sdpa", "bucketed"])
def test_bfloat16_error_is_that_of_rounding_the_weights(backend: str) -> None:
    torch.manual_seed(0)
    ids = ids_of([[60, 3, 137, -8, 48]])
    inputs = [heads(1, h, 256, 64, "tokens_first", torch.bfloat16) for h in (4, 2, 2)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = reference.attention(*wide, document_ids=ids)
    actual = am_kernels.attention(*inputs, document_ids=ids, backend=backend)
    weight = torch.randn(expected.shape, dtype=torch.bfloat16)
    grads = torch.autograd.grad(actual, inputs, weight), torch.autograd.grad(expected, wide, weight.double())
    for got, want in zip((actual, *grads[0]), (expected, *grads[1]), strict=True):
        # Relative to the whole tensor; bfloat16 has 8 bits: 2 ** -8 = 4e-3.
        assert got.dtype == torch.bfloat16
        assert (got.double() - want).norm() / want.norm() < 5e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("causal", [True, False])
def test_varlen_error_is_that_of_rounding(rows: list[list[int]], causal: bool) -> None:
    torch.manual_seed(0)
    ids = ids_of(rows)
    B, S = ids.shape
    inputs = [heads(B, h, S, 64, "tokens_first", torch.bfloat16).detach().cuda().requires_grad_() for h in (4, 2, 2)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = reference.attention(*wide, document_ids=ids, causal=causal, scale=0.2)
    actual = am_kernels.attention(*inputs, document_ids=ids, causal=causal, scale=0.2, backend="varlen")
    assert (actual[(ids == 0).cuda()] == 0).all()
    weight = torch.randn(expected.shape, dtype=torch.bfloat16, device="cuda")
    grads = torch.autograd.grad(actual, inputs, weight), torch.autograd.grad(expected, wide, weight.double())
    for got, want in zip((actual, *grads[0]), (expected, *grads[1]), strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.double() - want).norm() / want.norm() < 1e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "flash"}, "backend='flash' is not one of"),
        ({"backend": "sdpa", "softcap": 1.0}, "does not support softcap"),
        ({"backend": "bucketed"}, "does not support no document_ids"),
        ({"backend": "bucketed", "document_ids": torch.ones(1, 4, dtype=torch.int32), "causal": False}, "causal=False"),
        ({"backend": "varlen"}, "does not support no document_ids, .*device cpu"),
        (
            {"backend": "varlen", "window": 2, "softcap": 1.0},
            "softcap, no document_ids, window, .*device cpu, torch.float32",
        ),
        ({"window": 0}, "window=0"),
        ({"window": 3, "causal": False}, "needs causal=True"),
        ({"document_ids": torch.ones(1, 5, dtype=torch.int32)}, r"describe \[1, 5\] tokens"),
        ({"document_ids": torch.tensor([[1, 2, 1, 0]])}, "document 1 is not contiguous"),
        ({"document_ids": torch.ones(4, dtype=torch.int32)}, r"must be \[B, S\]"),
        ({"mask": torch.ones(4, 4, dtype=torch.bool)}, "mask has shape"),
        ({"k": torch.zeros(1, 3, 4, 8), "v": torch.zeros(1, 3, 4, 8)}, "2 query heads are not a multiple of 3"),
        ({"k": torch.zeros(1, 2, 4, 9)}, "do not fit"),
        ({"q": torch.zeros(1, 2, 3, 8), "document_ids": torch.ones(1, 3, dtype=torch.int32)}, "equal lengths"),
        ({"q": torch.zeros(2, 4, 8)}, "must be"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses(change: dict, message: str) -> None:
    arguments = {"q": torch.zeros(1, 2, 4, 8), "k": torch.zeros(1, 2, 4, 8), "v": torch.zeros(1, 2, 4, 8)}
    with pytest.raises(ValueError, match=message):
        am_kernels.attention(**{**arguments, **change})


def test_refuses_float_document_ids() -> None:
    with pytest.raises(TypeError, match="must be an integer tensor"):
        am_kernels.document_segments(torch.ones(1, 4))
