"""The contract of a loss: what it is given, what it may take by name, and what is refused before the model runs."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import pytest
import torch
from tiny_models import assert_close, documents, image_rows, joined, linear_cross_entropy, stock

import am_kernels
import am_models
from am_testing import run_distributed


def optimised(family: str) -> torch.nn.Module:
    model = stock(family)
    am_models.optimize(model)
    return model


def weighted_loss(hidden, weight, labels, *, bias, softcap, scale, shift_weights):
    """A user's loss: one weight per target."""
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return (losses * shift_weights.flatten()).sum()


def weighted_batch() -> dict[str, torch.Tensor]:
    batch = documents([5, 4])
    return batch | {"shift_weights": torch.arange(9.0)[None] / 3}


def test_split_batch_gives_the_loss_what_the_family_does_not_declare():
    image = {"pixel_values": torch.zeros(1), "image_grid_thw": torch.zeros(1)}
    batch = weighted_batch() | image
    inputs, targets = am_models.split_batch(stock("qwen3_vl"), batch)
    assert set(inputs) == {"input_ids", "position_ids", "document_ids", *image}
    assert set(targets) == {"shift_labels", "shift_weights"}
    assert set(am_models.split_batch(optimised("llama"), batch)[1]) == {"shift_labels", "shift_weights", *image}


def test_documents_are_read_on_the_host_before_the_forward():
    model, seen = optimised("llama"), []
    inputs, targets = am_models.split_batch(model, weighted_batch(), device=torch.device("meta"))
    devices = {name: tensor.device.type for name, tensor in (inputs | targets).items()}
    assert devices.pop("document_ids") == "cpu"
    assert set(devices.values()) == {"meta"}
    # In front of the hook that finds documents in a tensor.
    model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["document_ids"]), prepend=True, with_kwargs=True
    )
    am_models.forward_with_loss(model, weighted_loss, *am_models.split_batch(model, weighted_batch()))
    assert isinstance(seen[0], am_kernels.Documents)
    assert seen[0].lengths == [5, 4]


def test_further_targets_reach_the_loss_by_name():
    model = optimised("llama")
    batch = weighted_batch()
    inputs, targets = am_models.split_batch(model, batch)
    expected = weighted_loss(
        model.base_model(**inputs).last_hidden_state,
        model.lm_head.weight,
        batch["shift_labels"],
        bias=None,
        softcap=None,
        scale=None,
        shift_weights=batch["shift_weights"],
    )
    seen = {}

    def takes_all(hidden, weight, labels, *, bias, softcap, scale, **further):
        seen.update(further)
        return weighted_loss(hidden, weight, labels, bias=bias, softcap=softcap, scale=scale, **further)

    for loss_fn in (weighted_loss, takes_all, lambda *args, **kwargs: weighted_loss(*args, **kwargs)):
        assert torch.equal(am_models.forward_with_loss(model, loss_fn, inputs, targets), expected)
        assert torch.equal(model.forward_with_loss(loss_fn, inputs, targets), expected)
    assert list(seen) == ["shift_weights"]
    bound = partial(weighted_loss, shift_weights=targets.pop("shift_weights"))
    assert torch.equal(am_models.forward_with_loss(model, bound, inputs, targets), expected)


def test_a_loss_says_which_targets_it_needs():
    def by_position(hidden, weight, labels, shift_weights, bias, softcap, scale, shift_scores=None, **further):
        return weighted_loss(
            hidden, weight, labels, bias=bias, softcap=softcap, scale=scale, shift_weights=shift_weights
        )

    class Weighted:
        def __call__(self, hidden, weight, labels, /, *, shift_weights, shift_scores, **head):
            return weighted_loss(hidden, weight, labels, shift_weights=shift_weights, **head) + shift_scores.sum()

    assert am_models.further_targets(linear_cross_entropy) == ()
    assert am_models.further_targets(lambda *args, **kwargs: weighted_loss(*args, **kwargs)) == ()
    assert am_models.further_targets(partial(weighted_loss, shift_weights=torch.ones(()))) == ()
    model = optimised("llama")
    inputs, targets = am_models.split_batch(model, weighted_batch())
    targets["shift_scores"] = torch.ones(1, 9)
    expected = {weighted_loss: ["shift_weights"], by_position: ["shift_weights"]}
    for loss_fn, names in {**expected, Weighted(): ["shift_weights", "shift_scores"]}.items():
        assert am_models.further_targets(loss_fn) == tuple(names)
        needed = {name: targets[name] for name in ("shift_labels", *names)}
        am_models.forward_with_loss(model, loss_fn, inputs, needed)
        for name in names:
            rest = {key: tensor for key, tensor in needed.items() if key != name}
            with pytest.raises(ValueError, match=rf"needs the targets \['{name}'\]"):
                am_models.forward_with_loss(model, loss_fn, inputs, rest)


def test_the_result_of_the_loss_is_handed_on():
    class Parts(NamedTuple):
        loss: torch.Tensor
        hidden: torch.Tensor

    def parts(hidden, weight, labels, *, bias, softcap, scale):
        return Parts(linear_cross_entropy(hidden, weight, labels, bias=bias), hidden.sum())

    model = optimised("llama")
    inputs, targets = am_models.split_batch(model, documents([5, 4]))
    result = am_models.forward_with_loss(model, parts, inputs, targets)
    assert isinstance(result, Parts)
    assert_close(
        result.loss, am_models.forward_with_loss(model, linear_cross_entropy, inputs, targets), "loss in parts"
    )


def test_keys_that_nobody_takes_are_refused_before_the_model_runs():
    model = optimised("idefics3")
    model.base_model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    batch = joined("idefics3", image_rows("idefics3", [1]))
    # A misspelt image tensor is no declared input: it lands in the targets.
    batch["pixel_value"] = batch.pop("pixel_values")
    del batch["pixel_attention_mask"]
    inputs, targets = am_models.split_batch(model, batch)
    message = r"linear_cross_entropy does not take the targets \['pixel_value'\].*inputs of idefics3 .*'pixel_values'"
    for loss_fn in (linear_cross_entropy, partial(linear_cross_entropy, scale=2.0)):
        with pytest.raises(ValueError, match=message):
            am_models.forward_with_loss(model, loss_fn, inputs, targets)
    del targets["pixel_value"]
    with pytest.raises(ValueError, match=r"weighted_loss needs the targets \['shift_weights'\]"):
        am_models.forward_with_loss(model, weighted_loss, inputs, targets)
    with pytest.raises(ValueError, match=r"the targets \['extra'\]; its own keyword arguments are \['shift_weights'\]"):
        am_models.forward_with_loss(model, weighted_loss, inputs, {**targets, "extra": torch.ones(())})
    with pytest.raises(ValueError, match=r"does not take the targets \['softcap'\]"):
        am_models.forward_with_loss(model, linear_cross_entropy, inputs, {**targets, "softcap": torch.ones(())})
    with pytest.raises(ValueError, match=r"does not take the inputs \['attention_mask'\].*declared inputs"):
        am_models.forward_with_loss(
            model, linear_cross_entropy, {**inputs, "attention_mask": torch.ones(1, 3)}, targets
        )
    with pytest.raises(ValueError, match="targets have no shift_labels"):
        am_models.forward_with_loss(model, linear_cross_entropy, inputs, {})
    with pytest.raises(ValueError, match="inputs have no input_ids"):
        am_models.forward_with_loss(model, linear_cross_entropy, {}, targets)


def test_materialised_logits_take_no_further_targets():
    model = optimised("gpt2")
    inputs, targets = am_models.split_batch(model, weighted_batch())
    with pytest.raises(ValueError, match=r"\['shift_weights'\] reach no loss function: that of gpt2 is the cross-entr"):
        am_models.forward_with_loss(model, weighted_loss, inputs, targets)
    del targets["shift_weights"]
    assert am_models.forward_with_loss(model, weighted_loss, inputs, targets) > 0


def _dtypes_of_shards():
    """On shards that compute in bfloat16: the dtype of what the loss is given, and the weights it sees."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    model, seen = optimised("llama"), []
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    register_fsdp_forward_method(model, "forward_with_loss")

    def loss_fn(hidden, weight, labels, *, bias, softcap, scale, shift_weights):
        seen.append((hidden.dtype, weight.dtype, shift_weights))
        return weighted_loss(
            hidden, weight, labels, bias=bias, softcap=softcap, scale=scale, shift_weights=shift_weights
        )

    am_models.forward_with_loss(model, loss_fn, *am_models.split_batch(model, weighted_batch())).backward()
    return seen[0]


def test_shards_do_not_round_the_targets():
    for hidden, weight, shift_weights in run_distributed(_dtypes_of_shards, 2):
        assert hidden == weight == torch.bfloat16
        assert torch.equal(shift_weights, weighted_batch()["shift_weights"])
