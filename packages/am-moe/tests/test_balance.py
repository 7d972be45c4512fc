"""Router losses and load statistics against the formulas, token by token in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import am_moe
from am_testing import run_distributed

E, A, COEFFICIENT = 6, 2, 0.01
# Two packed rows and one padded row: ids start over in each, 0 is padding.
DOCUMENTS = torch.tensor(
    [[1, 1, 1, 2, 2, 2, 2, 3], [1, 1, 1, 1, 1, 1, 1, 2], [1, 1, 1, 0, 0, 0, 0, 0], [1, 2, 2, 2, 3, 3, 0, 0]],
    dtype=torch.int32,
)


def logits_of(documents: Tensor, num_layers: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    layers = [torch.randn(documents.numel(), E, generator=generator, dtype=torch.float64) for _ in range(num_layers)]
    return [layer.to(dtype).requires_grad_() for layer in layers]


def reference(layers: list[Tensor], documents: Tensor, z_loss: float) -> Tensor:
    """DeepSeek-V3's eq. 17-20 of each document times its tokens, and ST-MoE's z-loss, one token at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for layer in layers:
        by_row = layer.view(*documents.shape, E)
        for row, ids in enumerate(documents.tolist()):
            for document in set(ids) - {0}:
                tokens = [by_row[row, position].double() for position, found in enumerate(ids) if found == document]
                length = len(tokens)
                best = [sorted(range(E), key=lambda e, t=t: -float(t[e].detach()))[:A] for t in tokens]
                scores = [t.exp() / t.exp().sum() for t in tokens]
                for expert in range(E):
                    f = E / (A * length) * sum(expert in chosen for chosen in best)
                    mean_score = sum(s[expert] for s in scores) / length
                    total = total + COEFFICIENT * length * f * mean_score
                total = total + z_loss * sum(t.exp().sum().log() ** 2 for t in tokens)
    return total


@pytest.mark.parametrize("z_loss", [0.0, 0.003])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)], ids=str
)
def test_loss_and_gradient_equal_the_formula(z_loss: float, dtype: torch.dtype, tolerance: float) -> None:
    layers = logits_of(DOCUMENTS, dtype=dtype)
    loss = am_moe.balance_loss(layers, DOCUMENTS, num_experts_per_token=A, coefficient=COEFFICIENT, z_loss=z_loss)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = [layer.detach().double().requires_grad_() for layer in layers]
    want = reference(exact, DOCUMENTS, z_loss)
    torch.testing.assert_close(loss.double(), want, rtol=tolerance, atol=0)
    for got, expected in zip(torch.autograd.grad(loss, layers), torch.autograd.grad(want, exact), strict=True):
        # A gradient is returned in the dtype of the logits: 8 bits of bfloat16.
        allowed = 2**-8 if dtype == torch.bfloat16 else tolerance
        assert (got.double() - expected).abs().max() <= allowed * expected.abs().max()
        assert expected.abs().max() > 1e-4


def loss_and_gradients(rows: list[list[int]]) -> tuple[Tensor, list[Tensor], Tensor]:
    """The sums over micro-batches, each of the given rows of the one batch."""
    layers = logits_of(DOCUMENTS)
    total, counts = torch.zeros((), dtype=torch.float64), torch.zeros(2, E, dtype=torch.int64)
    for chosen in rows:
        part = [layer.view(*DOCUMENTS.shape, E)[chosen].reshape(-1, E) for layer in layers]
        ids = DOCUMENTS[chosen]
        loss = am_moe.balance_loss(part, ids, num_experts_per_token=A, coefficient=COEFFICIENT, z_loss=0.003)
        loss.backward()
        total += loss.detach()
        counts += am_moe.expert_counts(part, ids, A)
    return total, [layer.grad for layer in layers], counts


def my_share() -> tuple[Tensor, list[Tensor], Tensor]:
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    total, gradients, counts = loss_and_gradients([[row] for row in range(rank, len(DOCUMENTS), size)])
    for tensor in (total, *gradients, counts):
        torch.distributed.all_reduce(tensor)
    return total, gradients, counts


def assert_same(got: tuple[Tensor, list[Tensor], Tensor], want: tuple[Tensor, list[Tensor], Tensor]) -> None:
    torch.testing.assert_close(got[0], want[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(got[1], want[1], rtol=1e-10, atol=1e-15)
    assert torch.equal(got[2], want[2])


@pytest.mark.parametrize("split", [[[0], [1], [2], [3]], [[3, 1], [0, 2]]], ids=str)
def test_micro_batches_add_up(split: list[list[int]]) -> None:
    assert_same(loss_and_gradients(split), loss_and_gradients([[0, 1, 2, 3]]))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_add_up(world_size: int) -> None:
    for got in run_distributed(my_share, world_size):
        assert_same(got, loss_and_gradients([[0, 1, 2, 3]]))


def test_packed_equals_one_document_a_row() -> None:
    packed = torch.tensor([[1, 1, 1, 2, 2, 0]])
    alone = torch.tensor([[1, 1, 1], [1, 1, 0]])
    logits = logits_of(packed, num_layers=1)[0].detach()
    rows = torch.cat([logits[:5], torch.full((1, E), 7.0, dtype=torch.float64)])
    losses = [
        am_moe.balance_loss([given], ids, num_experts_per_token=A, coefficient=1.0, z_loss=0.1)
        for given, ids in ((logits, packed), (rows, alone))
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
    # Not one document of five tokens: the loss is that of each sequence.
    merged = am_moe.balance_loss([logits], packed.clamp(max=1), num_experts_per_token=A, coefficient=1.0, z_loss=0.1)
    assert abs(merged - losses[0]) > 1e-3


def test_padding_counts_nowhere() -> None:
    layers = logits_of(DOCUMENTS)
    padding = (DOCUMENTS == 0).view(-1)
    with torch.no_grad():
        layers[0][padding] = float("nan")
    loss = am_moe.balance_loss(layers, DOCUMENTS, num_experts_per_token=A, coefficient=COEFFICIENT, z_loss=0.003)
    loss.backward()
    assert loss.isfinite()
    assert torch.equal(layers[0].grad[padding], torch.zeros(int(padding.sum()), E, dtype=torch.float64))
    counts = am_moe.expert_counts(layers, DOCUMENTS, A)
    assert counts.dtype == torch.int64
    assert counts.sum(dim=1).tolist() == [A * int((DOCUMENTS > 0).sum())] * 2


def test_a_batch_of_padding_is_a_zero_with_a_graph() -> None:
    documents = torch.zeros(2, 3, dtype=torch.int32)
    layers = logits_of(documents)
    loss = am_moe.balance_loss(layers, documents, num_experts_per_token=A, coefficient=COEFFICIENT, z_loss=0.003)
    assert loss.item() == 0
    assert [float(g.abs().sum()) for g in torch.autograd.grad(loss, layers)] == [0.0, 0.0]
    assert am_moe.expert_counts(layers, documents, A).tolist() == [[0] * E] * 2


def test_even_loads_are_the_least_and_collapse_the_most() -> None:
    documents = torch.ones(1, E, dtype=torch.int32)
    # Token t prefers experts t and t + 1: every expert is chosen A times, and every score is 1 / E on average.
    even = torch.eye(E) + torch.eye(E).roll(1, dims=1)
    collapsed = torch.zeros(E, E)
    collapsed[:, :A] = 50.0
    arguments = {"num_experts_per_token": A, "coefficient": 1.0}
    assert am_moe.balance_loss([even], documents, **arguments).item() / E == pytest.approx(1.0, abs=1e-6)
    assert am_moe.balance_loss([collapsed], documents, **arguments).item() / E == pytest.approx(E / A, abs=1e-6)
    random = [am_moe.balance_loss([layer.detach()], DOCUMENTS, **arguments) for layer in logits_of(DOCUMENTS)]
    tokens = int((DOCUMENTS > 0).sum())
    assert all(1 < loss.item() / tokens < E / A for loss in random)


def test_descending_the_loss_evens_the_load() -> None:
    documents = torch.ones(1, 64, dtype=torch.int32)
    torch.manual_seed(0)
    hidden = torch.randn(64, 8)
    weight = torch.randn(E, 8, requires_grad=True)
    bias = torch.tensor([3.0] + [0.0] * (E - 1), requires_grad=True)
    violations = []
    for _ in range(60):
        logits = hidden @ weight.T + bias
        violations.append(am_moe.load_metrics(am_moe.expert_counts([logits], documents, A))["max_violation"])
        loss = am_moe.balance_loss([logits], documents, num_experts_per_token=A, coefficient=1.0) / 64
        gradients = torch.autograd.grad(loss, (weight, bias))
        with torch.no_grad():
            for parameter, gradient in zip((weight, bias), gradients, strict=True):
                parameter -= 2.0 * gradient
    assert violations[0] > 1.0
    assert violations[-1] < 0.3


def test_counts_by_hand() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0], [0.0, 5.0, 4.0], [9.0, 8.0, 7.0]])
    assert am_moe.expert_counts([logits], torch.tensor([[1, 1, 0]]), 2).tolist() == [[1, 2, 1]]


def test_metrics_by_hand() -> None:
    even = am_moe.load_metrics(torch.full((3, 4), 5))
    assert even == pytest.approx({"max_violation": 0.0, "entropy": 1.0, "idle_experts": 0.0}, abs=1e-12)
    collapsed = am_moe.load_metrics(torch.tensor([[8, 0, 0, 0]]))
    assert collapsed == pytest.approx({"max_violation": 3.0, "entropy": 0.0, "idle_experts": 0.75}, abs=1e-12)
    # The worst layer's violation, the mean entropy, the share of all experts.
    mixed = am_moe.load_metrics(torch.tensor([[2, 2, 2, 2], [6, 2, 0, 0]]))
    second = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    assert mixed == pytest.approx({"max_violation": 2.0, "entropy": (1 + second) / 2, "idle_experts": 0.25}, abs=1e-12)


@pytest.mark.parametrize(
    ("layers", "documents", "k", "message"),
    [
        ([torch.zeros(4, 3)], torch.ones(2, 2), 4, "num_experts_per_token=4 must be between 1 and the 3 experts"),
        ([torch.zeros(4, 3)], torch.ones(2, 2), 0, "num_experts_per_token=0"),
        ([torch.zeros(4, 3), torch.zeros(5, 3)], torch.ones(2, 2), 1, r"router_logits\[1\] \(5, 3\).*T = 4"),
        ([torch.zeros(2, 2, 3)], torch.ones(2, 2), 1, r"router_logits\[0\] \(2, 2, 3\)"),
        ([torch.zeros(4, 3)], torch.ones(4), 1, r"document_ids \(4,\) must be \[B, S\]"),
        ([], torch.ones(2, 2), 1, "router_logits is empty"),
    ],
)
def test_refusals(layers: list[Tensor], documents: Tensor, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        am_moe.balance_loss(layers, documents.int(), num_experts_per_token=k, coefficient=1.0)
    with pytest.raises(ValueError, match=message):
        am_moe.expert_counts(layers, documents.int(), k)


def test_unknown_documents_are_refused() -> None:
    with pytest.raises(ValueError, match="document_ids is None"):
        am_moe.balance_loss([torch.zeros(4, 3)], None, num_experts_per_token=1, coefficient=1.0)
    with pytest.raises(ValueError, match="document_ids is None"):
        am_moe.expert_counts([torch.zeros(4, 3)], None, 1)


def test_metrics_refuse_what_has_no_load() -> None:
    with pytest.raises(ValueError, match=r"layers \[1\] are all 0"):
        am_moe.load_metrics(torch.tensor([[1, 2], [0, 0]]))
    with pytest.raises(ValueError, match=r"counts \(3,\) must be \[L, E\]"):
        am_moe.load_metrics(torch.tensor([1, 2, 3]))
