"""Norms, rotary embedding and gated activation against the reference, outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import am_kernels
from am_kernels import reference

SHAPES = [(1, 1, 8), (2, 7, 33), (3, 5, 64), (0, 4, 16)]


def assert_same(got_function, want_function, inputs: list[Tensor], *, tolerance: float) -> None:
    outputs = []
    for function in (got_function, want_function):
        out = function(*inputs)
        outs = out if isinstance(out, tuple) else (out,)
        torch.manual_seed(3)
        weights = [torch.randn(o.shape, dtype=torch.float64).to(o.dtype) for o in outs]
        outputs.append([*outs, *torch.autograd.grad(outs, inputs, weights)])
    for got, want in zip(*outputs, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def random(*shape: int, dtype: torch.dtype = torch.float64, strided: bool = False) -> Tensor:
    x = torch.randn(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2] if strided else torch.randn(*shape, dtype=dtype)
    return x.requires_grad_()


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_norms(shape: tuple[int, ...], strided: bool, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    x, residual = (random(*shape, dtype=dtype, strided=strided) for _ in range(2))
    weight = random(shape[-1], dtype=dtype)
    assert_same(am_kernels.rms_norm, reference.rms_norm, [x, weight], tolerance=tolerance)
    assert_same(am_kernels.add_rms_norm, reference.add_rms_norm, [x, residual, weight], tolerance=tolerance)


def test_norm_outputs_are_those_of_transformers_formula() -> None:
    torch.manual_seed(0)
    x, weight = 3 * torch.randn(64, 128), torch.randn(128)
    normed = x.to(torch.float32)
    expected = weight * (normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
    torch.testing.assert_close(am_kernels.rms_norm(x, weight), expected, atol=1e-6, rtol=1e-6)
    # Rounded to the dtype of x before the weight: bit-equal up to one rounding of the norm.
    low, low_weight = x.bfloat16(), weight.bfloat16()
    got = am_kernels.rms_norm(low, low_weight)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, reference.rms_norm(low, low_weight), atol=0, rtol=2**-7)
    assert am_kernels.rms_norm(low, weight).dtype == torch.float32


def test_only_the_residual_output_is_used() -> None:
    x, residual = random(2, 3, 4), random(2, 3, 4)
    weight = random(4)
    _, total = am_kernels.add_rms_norm(x, residual, weight)
    d_x, d_weight = torch.autograd.grad(total.sum(), [x, weight])
    assert (d_x == 1).all()
    assert (d_weight == 0).all()


@pytest.mark.parametrize("tokens_first", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
def test_rope(tokens_first: bool, rows: int) -> None:
    torch.manual_seed(0)
    q, k = random(2, 6, 7, 10), random(2, 3, 7, 10)
    if tokens_first:
        q, k = (x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k))
    # Different halves: the gradient must not assume that cos repeats.
    cos, sin = torch.randn(rows, 7, 10, dtype=torch.float64), torch.randn(rows, 7, 10, dtype=torch.float64)
    assert_same(
        lambda q, k: am_kernels.rope(q, k, cos, sin),
        lambda q, k: reference.rope(q, k, cos, sin),
        [q, k],
        tolerance=1e-12,
    )
    assert am_kernels.rope(q, k, cos, sin)[0].stride() == q.stride()


def test_rope_gives_gradients_of_its_angles_too() -> None:
    torch.manual_seed(0)
    inputs = [random(1, 2, 3, 4), random(1, 2, 3, 4), random(1, 3, 4), random(1, 3, 4)]
    assert_same(am_kernels.rope, reference.rope, inputs, tolerance=1e-12)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu(shape: tuple[int, ...], strided: bool) -> None:
    torch.manual_seed(0)
    inputs = [random(*shape, strided=strided) for _ in range(2)]
    assert_same(am_kernels.swiglu, reference.swiglu, inputs, tolerance=1e-12)


def test_gradcheck() -> None:
    torch.manual_seed(0)
    x, residual, weight = random(2, 3, 4), random(2, 3, 4), random(4)
    assert torch.autograd.gradcheck(am_kernels.add_rms_norm, (x, residual, weight))
    assert torch.autograd.gradcheck(am_kernels.swiglu, (x, residual))


def test_refuses_shapes_that_do_not_fit() -> None:
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"needs \(4,\)"):
        am_kernels.rms_norm(x, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="one shape and dtype"):
        am_kernels.add_rms_norm(x, torch.zeros(1, 4), torch.zeros(4))
    with pytest.raises(ValueError, match="one shape and dtype"):
        am_kernels.swiglu(x, x.double())
    with pytest.raises(ValueError, match="only the rotated part"):
        am_kernels.rope(torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 2, 8), torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))
