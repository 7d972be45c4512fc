"""Router choices and weights against the reference and hand-computed values."""

from __future__ import annotations

import pytest
import torch

import am_moe

CASES = [
    {},
    {"norm_topk_prob": False},
    {"score_function": "sigmoid", "route_scale": 2.5},
    {"num_groups": 4, "topk_groups": 2},
    {"score_function": "sigmoid", "num_groups": 4, "topk_groups": 2, "correction_bias": "negative"},
    {"score_function": "sigmoid", "correction_bias": "random"},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("num_tokens", "top_k"), [(1, 1), (37, 3), (0, 2)])
def test_route_equals_the_reference(case: dict, num_tokens: int, top_k: int) -> None:
    torch.manual_seed(0)
    case = dict(case)
    if "correction_bias" in case:
        shift = -10.0 if case["correction_bias"] == "negative" else 0.0
        case["correction_bias"] = torch.randn(16, dtype=torch.float64) + shift
    logits = torch.randn(num_tokens, 16, dtype=torch.float64, requires_grad=True)
    weights, index = am_moe.route(logits, top_k, **case)
    assert weights.shape == index.shape == (num_tokens, top_k)
    if num_tokens == 0:
        return
    want_weights, want_index = am_moe.reference.route(logits, top_k, **case)
    assert torch.equal(index, want_index)
    torch.testing.assert_close(weights, want_weights, atol=1e-14, rtol=1e-12)
    weight = torch.randn_like(weights)
    got, want = (torch.autograd.grad(w, logits, weight)[0] for w in (weights, want_weights))
    torch.testing.assert_close(got, want, atol=1e-14, rtol=1e-10)


def test_by_hand_bias_selects_but_does_not_weigh() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 2.0]])
    weights, index = am_moe.route(
        logits, 2, score_function="sigmoid", norm_topk_prob=False, correction_bias=torch.tensor([5.0, 0.0, 0.0, 0.0])
    )
    assert index.tolist() == [[0, 3]]
    # sigmoid(0) and sigmoid(2): the bias of 5 is in neither.
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.8807970]]), atol=1e-6, rtol=0)


def test_a_losing_group_cannot_win_with_negative_scores() -> None:
    # Biased scores are all negative: masking the losing group with 0 instead of -inf would make it win.
    logits = torch.tensor([[3.0, 3.0, -3.0, -3.0]])
    _, index = am_moe.route(
        logits, 2, score_function="sigmoid", num_groups=2, topk_groups=1, correction_bias=torch.full((4,), -9.0)
    )
    assert sorted(index[0].tolist()) == [0, 1]


def test_dtypes() -> None:
    hidden = torch.randn(5, 8, dtype=torch.bfloat16)
    plain = am_moe.Router(8, 4, 2).bfloat16()
    assert [x.dtype for x in plain(hidden)] == [torch.bfloat16, torch.bfloat16, torch.int64]
    exact = am_moe.Router(8, 4, 2, score_function="sigmoid", correction_bias=True, dtype_of_logits=torch.float32)
    assert [x.dtype for x in exact(hidden)] == [torch.float32, torch.float32, torch.int64]
    assert set(exact.state_dict()) == {"weight", "e_score_correction_bias"}
    assert set(plain.state_dict()) == {"weight"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 5}, "top_k=5 must be between 1 and the 4"),
        ({"num_groups": 3}, "num_groups=3 does not divide num_experts=4"),
        ({"num_groups": 2, "topk_groups": 3}, "topk_groups=3"),
        ({"num_groups": 2, "topk_groups": 1, "top_k": 3}, "the 2 experts"),
        ({"score_function": "relu"}, "score_function='relu'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        am_moe.Router(**{"hidden_size": 8, "num_experts": 4, "top_k": 2, **change})
