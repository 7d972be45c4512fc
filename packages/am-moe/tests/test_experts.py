"""permute, grouped_mm, experts and the block against the reference, outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import am_moe
from am_moe import reference


def assert_same(got_function, want_function, inputs: list[Tensor], tolerance: float) -> None:
    got, want = got_function(*inputs), want_function(*inputs)
    torch.manual_seed(5)
    weight = torch.randn(want.shape, dtype=torch.float64).to(want.dtype)
    results = zip(
        (got, *torch.autograd.grad(got, inputs, weight)),
        (want, *torch.autograd.grad(want, inputs, weight)),
        strict=True,
    )
    for mine, theirs in results:
        assert mine.dtype == theirs.dtype
        scale = max(1.0, float(theirs.detach().abs().max()) if theirs.numel() else 0.0)
        torch.testing.assert_close(mine, theirs, atol=tolerance * scale, rtol=0)


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def choices(kind: str, T: int, A: int, E: int) -> Tensor:
    if kind == "random":
        return torch.stack([torch.randperm(E)[:A] for _ in range(T)]) if T else torch.zeros(0, A, dtype=torch.int64)
    if kind == "one expert":
        return torch.full((T, A), E - 1)
    if kind == "duplicates":
        return torch.randint(0, 2, (T, 1)).expand(T, A)
    dropped = torch.randint(0, E, (T, A))
    dropped[::3, 0] = -1
    dropped[::2, -1] = E
    return dropped


@pytest.mark.parametrize("kind", ["random", "one expert", "duplicates", "dropped"])
@pytest.mark.parametrize(("T", "A", "E", "D", "F"), [(1, 1, 1, 3, 5), (29, 3, 5, 8, 7), (0, 2, 4, 8, 8)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_experts_forward(
    kind: str, T: int, A: int, E: int, D: int, F: int, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    index = choices(kind, T, A, E)
    inputs = [
        random(T, D, dtype=dtype),
        random(T, A, dtype=dtype),
        random(E, 2 * F, D, dtype=dtype),
        random(E, D, F, dtype=dtype),
    ]

    def through(function):
        return lambda hidden, weights, gate_up, down: function(hidden, index, weights, gate_up, down)

    assert_same(through(am_moe.experts_forward), through(reference.experts_forward), inputs, tolerance)


@pytest.mark.parametrize(("K", "N"), [(16, 32), (20, 24), (16, 12)])
def test_bfloat16_with_and_without_aligned_strides(K: int, N: int) -> None:
    torch.manual_seed(0)
    offsets = torch.tensor([5, 5, 12, 20], dtype=torch.int32)
    rows, weight = random(23, K, dtype=torch.bfloat16), random(4, N, K, dtype=torch.bfloat16)
    wide = [x.detach().double().requires_grad_() for x in (rows, weight)]
    got, want = am_moe.grouped_mm(rows, weight, offsets), reference.grouped_mm(*wide, offsets)
    seed = torch.randn(23, N, dtype=torch.bfloat16)
    grads = torch.autograd.grad(got, (rows, weight), seed), torch.autograd.grad(want, wide, seed.double())
    for mine, theirs in zip((got, *grads[0]), (want, *grads[1]), strict=True):
        # One rounding of the result: 2 ** -9 relative to its size.
        torch.testing.assert_close(mine.double(), theirs, atol=1e-2, rtol=2**-8)
    assert (grads[0][1][1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_past_the_last_offset_never_leak(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    offsets = torch.tensor([3, 3, 6], dtype=torch.int32)
    rows, weight = random(10, 16, dtype=dtype), random(3, 8, 16, dtype=dtype)
    with torch.no_grad():
        rows[6:] = float("nan")
    out = am_moe.grouped_mm(rows, weight, offsets)
    assert (out[6:] == 0).all()
    seed = torch.randn_like(out)
    seed[6:] = float("nan")
    d_rows, d_weight = torch.autograd.grad(out, (rows, weight), seed)
    assert (d_rows[6:] == 0).all()
    assert torch.isfinite(d_rows).all()
    assert torch.isfinite(d_weight).all()
    assert (d_weight[1] == 0).all()
    assert d_weight[0].abs().max() > 0


def test_non_contiguous_inputs() -> None:
    torch.manual_seed(0)
    offsets = torch.tensor([4, 9], dtype=torch.int32)
    rows, weight = random(9, 12)[:, ::2], random(2, 6, 5).transpose(1, 2)
    assert_same(
        lambda r, w: am_moe.grouped_mm(r, w, offsets),
        lambda r, w: reference.grouped_mm(r, w, offsets),
        [rows, weight],
        1e-12,
    )


def test_unpermute_undoes_permute() -> None:
    torch.manual_seed(0)
    hidden, index = random(17, 4), choices("random", 17, 3, 6)
    rows, permutation = am_moe.permute(hidden, index, 6)
    assert torch.equal(rows, hidden[permutation.order // 3])
    expert = index.view(-1)[permutation.order]
    assert torch.equal(expert, expert.sort().values)
    assert torch.equal(permutation.offsets, torch.bincount(index.view(-1), minlength=6).cumsum(0).int())
    weights = torch.full((17, 3), 1 / 3, dtype=torch.float64)
    back = am_moe.unpermute(rows, weights, permutation)
    torch.testing.assert_close(back, hidden, atol=1e-14, rtol=0)
    torch.testing.assert_close(torch.autograd.grad(back.sum(), hidden)[0], torch.ones_like(hidden), atol=1e-14, rtol=0)


def test_dropped_choices_are_ignored_whatever_their_rows_hold() -> None:
    index = torch.tensor([[0, 2], [-1, 1]])
    rows, permutation = am_moe.permute(torch.ones(2, 4), index, 2)
    rows = rows.detach().clone()
    rows[int(permutation.offsets[-1]) :] = float("nan")
    rows.requires_grad_()
    weights = torch.ones(2, 2, requires_grad=True)
    out = am_moe.unpermute(rows, weights, permutation)
    assert (out == 1).all()
    d_rows, d_weights = torch.autograd.grad(out.sum(), (rows, weights))
    assert (d_rows[2:] == 0).all()
    assert d_weights.tolist() == [[4.0, 0.0], [0.0, 4.0]]


def test_combine_sums_in_float32() -> None:
    # 256 + 1 is not a bfloat16: summed one by one in bfloat16 the four ones are lost.
    hidden = torch.tensor([[256.0], [1.0]], dtype=torch.bfloat16)
    rows, permutation = am_moe.permute(hidden[:1], torch.tensor([[0, 1, 2, 3, 4]]), 5)
    rows = torch.tensor([[256.0], [1.0], [1.0], [1.0], [1.0]], dtype=torch.bfloat16)
    assert am_moe.unpermute(rows, torch.ones(1, 5, dtype=torch.bfloat16), permutation).item() == 260.0


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_block_equals_qwen3_moe(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    block = am_moe.MoE(am_moe.Router(16, 8, 2), am_moe.GroupedExperts(8, 16, 12)).to(dtype)
    assert set(block.state_dict()) == {"gate.weight", "experts.gate_up_proj", "experts.down_proj"}
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    hidden = random(2, 9, 16, dtype=dtype)
    inputs = [hidden, *block.parameters()]
    names = [name for name, _ in block.named_parameters()]

    def stock(hidden: Tensor, *parameters: Tensor) -> Tensor:
        by_name = dict(zip(names, parameters, strict=True))
        tokens = hidden.view(-1, 16)
        out = reference.moe(
            tokens, by_name["gate.weight"], by_name["experts.gate_up_proj"], by_name["experts.down_proj"], 2
        )
        return out.view(hidden.shape)

    assert_same(lambda hidden, *_: block(hidden), stock, inputs, tolerance)


def test_shared_experts_see_every_token() -> None:
    torch.manual_seed(0)
    shared = torch.nn.Linear(16, 16)
    router, experts = am_moe.Router(16, 4, 2), am_moe.GroupedExperts(4, 16, 8)
    hidden = torch.randn(3, 16)
    torch.testing.assert_close(
        am_moe.MoE(router, experts, shared)(hidden), am_moe.MoE(router, experts)(hidden) + shared(hidden)
    )


def test_gradcheck() -> None:
    torch.manual_seed(0)
    index = choices("dropped", 4, 2, 3)
    inputs = (random(4, 3), random(4, 2), random(3, 4, 3), random(3, 3, 2))
    assert torch.autograd.gradcheck(lambda h, w, g, d: am_moe.experts_forward(h, index, w, g, d), inputs)


def test_refuses() -> None:
    offsets = torch.tensor([1, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match="do not fit"):
        am_moe.grouped_mm(torch.zeros(2, 3), torch.zeros(2, 4, 5), offsets)
    with pytest.raises(TypeError, match="one dtype"):
        am_moe.grouped_mm(torch.zeros(2, 3), torch.zeros(2, 4, 3).double(), offsets)
    with pytest.raises(TypeError, match=r"must be torch\.int32"):
        am_moe.grouped_mm(torch.zeros(2, 3), torch.zeros(2, 4, 3), offsets.long())
    with pytest.raises(ValueError, match="3 tokens"):
        am_moe.permute(torch.zeros(3, 4), torch.zeros(2, 1, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match="the router has 4 experts"):
        am_moe.MoE(am_moe.Router(8, 4, 2), am_moe.GroupedExperts(3, 8, 8))
    _, permutation = am_moe.permute(torch.zeros(2, 4), torch.zeros(2, 1, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match="do not fit a permutation"):
        am_moe.unpermute(torch.zeros(4, 4), torch.zeros(2, 2), permutation)
