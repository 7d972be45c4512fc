"""Models of images and text: language model on our kernels, tower stock, batches with some or no images."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from tiny_models import (
    GRID_FAMILIES,
    IMAGE,
    SMALL,
    VISION_CONFIGS,
    assert_close,
    config_of,
    documents,
    image_rows,
    joined,
    linear_cross_entropy,
    stock,
)

import am_models
from am_testing import run_distributed

NUMBERS = [2, 0, 1]


def pair(family: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    reference = stock(family)
    model = copy.deepcopy(reference)
    am_models.optimize(model)
    return reference, model


def stock_inputs(family: str, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a user gives stock transformers, which then finds the positions of the axes itself."""
    inputs = {name: batch[name] for name in batch if name not in ("shift_labels", "document_ids", "position_ids")}
    inputs["attention_mask"] = (batch["document_ids"] > 0).long()
    if family in GRID_FAMILIES:
        inputs["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).int()
    return inputs


def stock_loss_per_row(family: str, reference: torch.nn.Module, rows: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    loss = torch.zeros(())
    for row in rows:
        logits = reference(**stock_inputs(family, row)).logits
        loss = loss + torch.nn.functional.cross_entropy(
            logits[0], row["shift_labels"][0], ignore_index=-100, reduction="sum"
        )
    return loss


def is_vision(name: str) -> bool:
    return not name.startswith(("model.text_model.", "model.language_model.", "lm_head."))


def assert_same_gradients(model: torch.nn.Module, reference: torch.nn.Module) -> None:
    """A parameter that stock never reaches may have a gradient of zeros."""
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        actual, other = (torch.zeros(1) if grad is None else grad for grad in (parameter.grad, expected[name].grad))
        # The same number added to all scores of a softmax changes nothing: this gradient is rounding errors.
        if name.endswith("k_proj.bias") and is_vision(name):
            assert max(actual.abs().max(), other.abs().max()) < 1e-5
        else:
            assert_close(actual, other, f"gradient of {name}")


@pytest.mark.parametrize("family", VISION_CONFIGS)
def test_logits_of_a_mixed_batch_equal_stock(family):
    reference, model = pair(family)
    batch = joined(family, image_rows(family, NUMBERS))
    real = batch["document_ids"] > 0
    expected = reference(**stock_inputs(family, batch)).logits[real]
    assert_close(model(**stock_inputs(family, batch)).logits[real], expected, "with a padding mask")
    del batch["shift_labels"]
    assert_close(model(**batch).logits[real], expected, "with document ids")
    batch["pixel_values"] = batch["pixel_values"].flip(-1)
    assert (model(**batch).logits[real] - expected).abs().max() > 1e-3


@pytest.mark.parametrize("family", VISION_CONFIGS)
@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_loss_and_gradients_of_a_mixed_batch_equal_each_row_alone(family, kernels):
    reference = stock(family)
    model = copy.deepcopy(reference)
    am_models.optimize(model, kernels=kernels)
    rows = image_rows(family, NUMBERS)
    expected = stock_loss_per_row(family, reference, rows)
    actual = am_models.forward_with_loss(
        model, linear_cross_entropy, *am_models.split_batch(model, joined(family, rows))
    )
    assert_close(actual, expected, "loss")
    expected.backward()
    actual.backward()
    assert_same_gradients(model, reference)
    assert all(parameter.grad.any() for name, parameter in model.named_parameters() if "connector" in name)


@pytest.mark.parametrize("family", VISION_CONFIGS)
def test_a_batch_without_images_runs_the_tower_and_changes_nothing(family):
    reference, model = pair(family)
    rows = image_rows(family, [0, 0])
    batch = joined(family, rows)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "document_ids")}
    plain = linear_cross_entropy(
        model.base_model(**inputs).last_hidden_state, model.lm_head.weight, batch["shift_labels"]
    )
    calls = []
    model.base_model.get_input_embeddings().register_forward_hook(lambda *_: calls.append("text"))
    towers = [module for name, module in model.named_modules() if name.endswith(("vision_model", "visual", "tower"))]
    assert towers
    towers[0].register_forward_hook(lambda *_: calls.append("tower"))
    loss = am_models.forward_with_loss(model, linear_cross_entropy, *am_models.split_batch(model, batch))
    assert calls == ["text", "tower"]
    assert torch.equal(loss, plain)
    loss.backward()
    stock_loss_per_row(family, reference, rows).backward()
    assert_same_gradients(model, reference)
    vision = [(name, parameter.grad) for name, parameter in model.named_parameters() if is_vision(name)]
    assert vision
    # The last layer of CLIP's tower and what follows it take no part in LLaVA's features: no gradient there.
    used = [grad for _, grad in vision if grad is not None]
    assert used
    assert not any(grad.any() for grad in used)


def test_the_tower_without_images_has_the_gradients_that_it_has_with_them():
    for family in VISION_CONFIGS:
        present = []
        for numbers in ([0, 0], [1, 2]):
            _, model = pair(family)
            am_models.forward_with_loss(
                model, linear_cross_entropy, *am_models.split_batch(model, joined(family, image_rows(family, numbers)))
            ).backward()
            present.append({name for name, parameter in model.named_parameters() if parameter.grad is not None})
        assert present[0] == present[1], family


@pytest.mark.parametrize("family", VISION_CONFIGS)
def test_the_tower_keeps_stock_attention(family):
    model = stock(family)
    report = am_models.optimize(model)
    assert report.parts["attention"].startswith("am_kernels")
    assert report.loss == "hidden states"
    assert model.config._attn_implementation == model.config.vision_config._attn_implementation == "sdpa"
    assert model.config.text_config._attn_implementation == "am_kernels"
    swapped = [name for name, module in model.named_modules() if "forward" in vars(module)]
    assert swapped
    assert not any(is_vision(name) for name in swapped)


@pytest.mark.parametrize("family", GRID_FAMILIES)
def test_positions_equal_what_the_model_finds(family):
    model, seen = stock(family), []
    model.base_model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    batch = joined(family, image_rows(family, NUMBERS))
    model(**stock_inputs(family, batch))
    real = batch["document_ids"] > 0
    assert torch.equal(batch["position_ids"][:, real], seen[0][:, real])
    text = torch.arange(3, 9)[None]
    assert torch.equal(am_models.multi_axis_positions(model.config, text), torch.arange(6).expand(3, 1, 6))


def test_positions_refuse_grids_that_do_not_fit_the_placeholders():
    config = config_of("qwen3_vl")
    ids = torch.tensor([[5, IMAGE, IMAGE, 6, IMAGE, IMAGE]])
    two = torch.tensor([[1, 2, 4], [1, 4, 2]])
    assert am_models.multi_axis_positions(config, ids, image_grid_thw=two).shape == (3, 1, 6)
    for grids in (None, two[:1], torch.tensor([[1, 2, 4], [1, 4, 4]]), torch.tensor([[1, 4, 4]])):
        with pytest.raises(ValueError, match=r"input_ids hold runs of \[2, 2\] placeholders"):
            am_models.multi_axis_positions(config, ids, image_grid_thw=grids)
    with pytest.raises(ValueError, match="llava has one position axis"):
        am_models.multi_axis_positions(config_of("llava"), ids)


@pytest.mark.parametrize("family", GRID_FAMILIES)
@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_packed_documents_with_images_equal_each_alone(family, kernels):
    reference = stock(family)
    model = copy.deepcopy(reference)
    am_models.optimize(model, kernels=kernels)
    rows = image_rows(family, NUMBERS)
    alone = [joined(family, [row]) for row in rows]
    batch = {name: torch.cat([row[name] for row in alone], dim=-1) for name in ("input_ids", "shift_labels")}
    batch["position_ids"] = torch.cat([row["position_ids"] for row in alone], dim=-1)
    batch["document_ids"] = torch.cat([row["document_ids"] * number for number, row in enumerate(alone, 1)], dim=-1)
    for name in ("pixel_values", "image_grid_thw"):
        batch[name] = torch.cat([row[name] for row in rows if name in row])
    assert_close(
        am_models.forward_with_loss(model, linear_cross_entropy, *am_models.split_batch(model, batch)),
        stock_loss_per_row(family, reference, rows),
        "loss",
    )


def test_batches_that_would_be_misread_are_refused():
    _, model = pair("idefics3")
    batch = joined("idefics3", image_rows("idefics3", [1]))
    inputs, targets = am_models.split_batch(model, batch)
    with pytest.raises(ValueError, match=r"idefics3 does not take the inputs \['image_sizes'\].*pixel_attention_mask"):
        am_models.forward_with_loss(model, linear_cross_entropy, {**inputs, "image_sizes": torch.ones(1)}, targets)
    del batch["pixel_values"]
    with pytest.raises(ValueError, match="pixel_values"):
        am_models.forward_with_loss(model, linear_cross_entropy, *am_models.split_batch(model, batch))
    _, model = pair("qwen3_vl")
    batch = joined("qwen3_vl", image_rows("qwen3_vl", [1, 0]))
    for positions in (None, batch["position_ids"][0]):
        with pytest.raises(ValueError, match=r"position_ids \[3, B, S\].*multi_axis_positions"):
            am_models.forward_with_loss(
                model, linear_cross_entropy, *am_models.split_batch(model, {**batch, "position_ids": positions})
            )


@pytest.mark.parametrize("family", VISION_CONFIGS)
def test_generation_from_images_equals_stock(family):
    reference, model = (model.eval() for model in pair(family))
    inputs = stock_inputs(family, joined(family, image_rows(family, [2])))
    expected = reference.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), expected)


@pytest.mark.parametrize("family", VISION_CONFIGS)
def test_require_no_leak_passes(family):
    _, model = pair(family)
    am_models.require_no_leak(model, packed=True)
    am_models.require_no_leak(model, packed=False)


def test_auto_class_returns_the_transformers_class(tmp_path):
    reference = stock("smolvlm").eval()
    reference.save_pretrained(tmp_path)
    model, info = am_models.AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert type(model) is type(reference)
    assert not info["missing_keys"]
    assert model.config.text_config._attn_implementation == "am_kernels"
    with torch.device("meta"):
        meta = am_models.AutoModelForImageTextToText.from_config(config_of("smolvlm"))
    assert {parameter.device.type for parameter in meta.parameters()} == {"meta"}


def test_text_and_images_are_not_mistaken_for_each_other(tmp_path):
    text, images = config_of("llama"), config_of("qwen3_vl")
    with pytest.raises(ValueError, match=r"llama .*text-only.*use AutoModelForCausalLM"):
        am_models.AutoModelForImageTextToText.from_config(text)
    # transformers' own class would build Gemma 3 with its tower, and refuse Qwen3-VL with a list of all its classes.
    for config in (images, transformers.Gemma3Config()):
        with pytest.raises(ValueError, match=r"images and text.*use AutoModelForImageTextToText"):
            am_models.AutoModelForCausalLM.from_config(config)
    images.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use AutoModelForImageTextToText"):
        am_models.AutoModelForCausalLM.from_pretrained(tmp_path)
    text.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use AutoModelForCausalLM"):
        am_models.AutoModelForImageTextToText.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use AutoModelForImageTextToText"):
        am_models.AutoModelForCausalLM.from_pretrained(tmp_path, config=images)


def test_an_undeclared_family_is_left_alone_and_takes_no_images():
    text = {**SMALL, "head_dim": 8}
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text, vision_config={**tower, "image_size": 8, "patch_size": 2}, mm_tokens_per_image=4
    )
    model = transformers.AutoModelForImageTextToText.from_config(config)
    report = am_models.optimize(model)
    assert all(part.startswith("stock: gemma3 is not a declared family") for part in report.parts.values())
    inputs, targets = am_models.split_batch(model, documents([4]))
    image = {"pixel_values": torch.zeros(1, 3, 8, 8)}
    with pytest.raises(ValueError, match="pixel_values"):
        am_models.forward_with_loss(model, linear_cross_entropy, {**inputs, **image}, targets)
    with pytest.raises(ValueError, match=r"further targets \['pixel_values'\] reach no loss function"):
        am_models.forward_with_loss(model, linear_cross_entropy, inputs, {**targets, **image})


def _gradients_of_shards(family, frozen_tower):
    """Rank 0 has two rows with images, rank 1 one row of text."""
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    model, rank = stock(family), torch.distributed.get_rank()
    am_models.optimize(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (frozen_tower and is_tower(name)))
    for module in list(model.modules()):
        if isinstance(module, torch.nn.ModuleList):
            for block in module:
                fully_shard(block)
    fully_shard(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "forward_with_loss")
    am_models.require_no_leak(model, packed=True)
    batch = joined(family, image_rows(family, [2, 1] if rank == 0 else [0]))
    am_models.forward_with_loss(model, linear_cross_entropy, *am_models.split_batch(model, batch)).backward()
    named = model.named_parameters()
    return {name: parameter.grad.full_tensor() for name, parameter in named if parameter.grad is not None}


def is_tower(name: str) -> bool:
    return name.startswith(("model.vision_model.", "model.vision_tower.", "model.visual.blocks."))


def test_ranks_with_and_without_images_give_the_gradients_of_one_process():
    for family, frozen_tower in (("idefics3", False), ("idefics3", True), ("llava", True), ("qwen3_vl", False)):
        results = run_distributed(_gradients_of_shards, 2, family, frozen_tower)
        model = stock(family)
        am_models.optimize(model)
        for numbers in ([2, 1], [0]):
            batch = joined(family, image_rows(family, numbers))
            am_models.forward_with_loss(model, linear_cross_entropy, *am_models.split_batch(model, batch)).backward()
        for name, parameter in model.named_parameters():
            if frozen_tower and is_tower(name):
                assert name not in results[0]
            elif parameter.grad is not None and not (name.endswith("k_proj.bias") and is_tower(name)):
                assert_close(results[0][name], parameter.grad, f"{family}: gradient of {name}")


@pytest.mark.parametrize("family", sorted(VISION_CONFIGS))
def test_vision_parts_name_all_there_is(family):
    model = stock(family)
    parts = am_models.vision_parts(model)
    for name in (parts.tower, *parts.projector, parts.language_model):
        assert list(model.get_submodule(name).parameters())
    prefixes = tuple(f"{name}." for name in (parts.tower, *parts.projector, parts.language_model, "lm_head"))
    assert [name for name, _ in model.named_parameters() if not name.startswith(prefixes)] == []
    assert model.get_submodule(parts.language_model) is model.get_decoder()
    assert am_models.num_position_axes(model.config) == (3 if family in GRID_FAMILIES else 1)


def test_vision_parts_of_a_text_model():
    with pytest.raises(ValueError, match="llama is no declared family with images; choose among idefics3"):
        am_models.vision_parts(stock("llama"))
