"""The same result however it is split: every cell against one process, and the faults that the check must catch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import am_models
from am_testing import Pool, run_distributed
from integration_tests import compatibility
from integration_tests.cells import CHOICES, EIGHT_RANKS, FEW_RANKS, PAIRS, Cell
from integration_tests.equivalence import COMMON, FAMILIES, Case, Layout, compare, train

Folders = Callable[[Case], dict[str, str]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Student and teacher of a case: seeded models as Hugging Face folders, written by stock transformers."""

    @functools.cache
    def made(family: str, tied: bool, seed: int) -> str:
        torch.manual_seed(seed)
        config = AutoConfig.for_model(**COMMON, **FAMILIES[family], tie_word_embeddings=tied)
        folder: Path = tmp_path_factory.mktemp(family)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        return str(folder)

    return lambda case: {
        who: made(case.family, case.tied, seed) for seed, who in enumerate(("student", "teacher")[: 1 + case.kd])
    }


@pytest.fixture(scope="module")
def reference(folders: Folders) -> Callable[[Case], dict[str, Any]]:
    """The result of one process."""
    return functools.cache(lambda case: run_distributed(train, 1, folders(case), case, Layout())[0])


@pytest.fixture(scope="module")
def eight() -> Iterator[Callable[[Layout], Pool]]:
    """Eight ranks that have seen no other mesh: torch keeps the results of DTensor's rules with the mesh of an earlier
    job, which is equal and whose process groups are gone.
    """
    pools: dict[tuple[object, ...], Pool] = {}

    def pool(layout: Layout) -> Pool:
        key = (layout.dims(), layout.strategy)
        if key not in pools:
            while pools:
                pools.popitem()[1].close()
            pools[key] = Pool(8)
        return pools[key]

    yield pool
    while pools:
        pools.popitem()[1].close()


def _name(cell: Cell) -> str:
    return "-".join(map(str, cell))


@pytest.mark.parametrize("cell", [*FEW_RANKS, *PAIRS], ids=_name)
def test_layouts_agree(cell: Cell, folders: Folders, reference: Callable[[Case], dict[str, Any]]) -> None:
    case, layout = cell
    for result in run_distributed(train, layout.world_size, folders(case), case, layout):
        compare(result, reference(case))


@pytest.mark.slow
@pytest.mark.parametrize("cell", EIGHT_RANKS, ids=_name)
def test_layouts_of_three_axes_agree(
    cell: Cell, folders: Folders, reference: Callable[[Case], dict[str, Any]], eight: Callable[[Layout], Pool]
) -> None:
    case, layout = cell
    for result in eight(layout).run(train, layout.world_size, folders(case), case, layout):
        compare(result, reference(case))


def test_every_pair_of_choices_is_in_a_cell() -> None:
    assert len(PAIRS) <= 60
    for key, values in CHOICES.items():
        for other, others in CHOICES.items():
            if key < other:
                found = {(_choice(cell, key), _choice(cell, other)) for cell in PAIRS}
                assert len(found) == len(values) * len(others), f"{key} x {other}"


def _choice(cell: Cell, key: str) -> Any:
    facts = vars(cell[0]) | vars(cell[1])
    others = {name: facts[name] for name in ("world_size", "strategy", "dp_replicate", "tp", "sequence_parallel", "cp")}
    return facts[key] if key != "split" else (*others.values(), facts["zigzag"])


@pytest.mark.parametrize(
    ("fault", "layout", "found"),
    [
        ("local divisor", Layout(2), "loss: differs"),
        ("dropped rank", Layout(2, strategy="ddp"), "loss: differs"),
        ("unshifted labels", Layout(packed=True), "loss: differs"),
        ("one document", Layout(packed=True), "loss: differs"),
        ("norm left out", Layout(2, tp=2), "q_norm.weight: differs"),
        ("gradient not reduced", Layout(2, tp=2), "q_norm.weight: differs"),
        ("tie lost", Layout(2, tp=2), "norm: differs"),
        ("no attention over ranks", Layout(2, cp=2), "loss: differs"),
        ("positions of the piece", Layout(2, cp=2), "loss: differs"),
        ("drift", Layout(2), "gradients drift"),
    ],
)
def test_faults_are_caught(
    fault: str, layout: Layout, found: str, folders: Folders, reference: Callable[[Case], dict[str, Any]]
) -> None:
    case = Case()
    faulty = dataclasses.replace(layout, fault=fault)
    result = run_distributed(train, layout.world_size, folders(case), case, faulty)[0]
    with pytest.raises(AssertionError, match=found):
        compare(result, reference(case))


def test_a_leaked_document_is_refused(folders: Folders) -> None:
    model = am_models.AutoModelForCausalLM.from_pretrained(folders(Case())["student"], dtype=torch.float32)
    am_models.require_no_leak(model, packed=True)
    # An attention without a mask function gets no mask, silently: two documents in a row see each other.
    AttentionInterface.register("maskless", ALL_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation("maskless")
    with pytest.raises(ValueError, match=r"document 2 move by .* when document 1 changes"):
        am_models.require_no_leak(model, packed=True)


def test_the_table_of_compatibility_is_that_of_the_cells() -> None:
    fix = "run python -m integration_tests.compatibility"
    assert compatibility.DATA.read_text() == compatibility.data(), fix
    assert compatibility.PAGE.read_text() == compatibility.page(), fix
