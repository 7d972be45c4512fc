"""What optimize leaves alone, what it reports, and what it refuses."""

from __future__ import annotations

import copy
import json
import operator

import pytest
import torch
import transformers
from tiny_models import CONFIGS, VISION_CONFIGS, assert_close, config_of, documents, linear_cross_entropy, stock

import am_models

TOKENS = torch.arange(3, 13)[None]


@pytest.mark.parametrize("family", CONFIGS)
def test_parameters_and_state_dict_stay(family):
    model = stock(family)
    parameters = list(model.named_parameters())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    am_models.optimize(model)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in parameters]
    assert all(a is b for (_, a), (_, b) in zip(model.named_parameters(), parameters, strict=True))
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", ["llama_tied", "qwen3_moe", "gemma2", "gpt2"])
def test_saved_model_opens_in_stock_transformers(family, tmp_path):
    model = stock(family).eval()
    am_models.optimize(model)
    model.save_pretrained(tmp_path)
    assert "am_" not in (tmp_path / "config.json").read_text()
    attention = stock(family).config._attn_implementation
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention).eval()
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in opened.state_dict().items())
    assert_close(model(TOKENS).logits, opened(TOKENS).logits, "logits")


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt2"])
def test_auto_class_returns_the_transformers_class(family, tmp_path):
    reference = stock(family).eval()
    reference.save_pretrained(tmp_path)
    model = am_models.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model) is type(reference)
    assert_close(model(TOKENS).logits, reference(TOKENS).logits, "logits")
    loaded, info = am_models.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.bfloat16
    )
    assert loaded.dtype == torch.bfloat16
    assert not info["missing_keys"]


def test_meta_model_computes_the_same_after_its_weights_arrive():
    for family in ("llama_tied", "qwen3_moe"):
        reference = stock(family)
        with torch.device("meta"):
            model = am_models.AutoModelForCausalLM.from_config(config_of(family))
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        model.to_empty(device="cpu")
        model.tie_weights()
        model.load_state_dict(reference.state_dict())
        # Rotary frequencies are in no state dict: whoever loads a meta model recomputes them.
        for buffer, expected in zip(model.buffers(), reference.buffers(), strict=True):
            buffer.copy_(expected)
        assert_close(model(TOKENS).logits, reference(TOKENS).logits, family)


def test_other_models_of_the_same_configuration_stay_stock():
    config = config_of("qwen3_moe")
    torch.manual_seed(0)
    reference = transformers.AutoModelForCausalLM.from_config(config)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.load_state_dict(reference.state_dict())
    am_models.optimize(model)
    assert config._attn_implementation == reference.config._attn_implementation == "sdpa"
    assert reference.config._experts_implementation == "grouped_mm"
    assert not any("forward" in vars(module) for module in reference.modules())
    assert_close(model(TOKENS).logits, reference(TOKENS).logits, "logits")


def test_optimising_twice_or_copying_changes_nothing():
    reference = stock("qwen3")
    model = copy.deepcopy(reference)
    first = am_models.optimize(model)
    assert str(am_models.optimize(model)) == str(first)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.layers[0].mlp.down_proj.weight.zero_()
        twin.model.norm.weight.zero_()
    assert twin(TOKENS).logits.abs().max() == 0
    assert_close(model(TOKENS).logits, reference(TOKENS).logits, "logits")


@pytest.mark.parametrize("before", [True, False])
def test_replaced_linear_layers_are_called(before):
    class Scaled(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 1.5 * super().forward(input)

    def adapt(model: torch.nn.Module) -> None:
        for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"):
            base = model.model.layers[1].get_submodule(name)
            layer = Scaled(base.in_features, base.out_features, bias=False)
            layer.weight = base.weight
            model.model.layers[1].set_submodule(name, layer)

    reference, model = stock("llama"), stock("llama")
    plain = model(TOKENS).logits
    adapt(reference)
    if before:
        adapt(model)
    am_models.optimize(model)
    if not before:
        adapt(model)
    assert (model(TOKENS).logits - plain).abs().max() > 1e-2
    assert_close(model(TOKENS).logits, reference(TOKENS).logits, "logits")


def test_report_names_every_part_and_why_it_stayed():
    model = stock("gemma")
    report = am_models.optimize(model)
    assert report.family == "gemma"
    assert set(report.parts) == {"attention", "norm", "rope", "activation", "experts"}
    assert report.parts["attention"].startswith("am_kernels")
    assert report.parts["norm"].startswith("stock: ")
    assert report.loss == "hidden states"
    shown = " ".join(str(report).split())
    stayed = {part: text.removeprefix("stock: ") for part, text in report.parts.items() if text.startswith("stock: ")}
    assert all(f"{part} ({why})" in shown for part, why in stayed.items())
    assert f"on our kernels: {', '.join(part for part in report.parts if part not in stayed)} stock:" in shown
    assert "loss is computed from hidden states" in shown
    assert max(map(len, str(report).splitlines())) <= 80
    unknown = am_models.optimize(stock("gpt2"))
    assert all(text.startswith("stock: ") for text in unknown.parts.values())
    assert unknown.loss.startswith("logits: ")


def test_off_swaps_nothing_and_still_installs_the_loss():
    model = stock("llama")
    report = am_models.optimize(model, kernels="off")
    assert all(text.startswith("stock") for text in report.parts.values())
    assert model.config._attn_implementation == "sdpa"
    batch = documents([6, 3])
    expected = am_models.forward_with_loss(model, linear_cross_entropy, *am_models.split_batch(model, batch))
    am_models.optimize(model)
    assert_close(model.forward_with_loss(linear_cross_entropy, *am_models.split_batch(model, batch)), expected, "loss")


def test_requests_by_part():
    model = stock("llama")
    report = am_models.optimize(model, kernels={"attention": "reference", "norm": False, "rope": True})
    assert "reference" in report.parts["attention"]
    assert report.parts["norm"] == "stock: switched off"
    assert report.parts["activation"].startswith("am_kernels")
    assert_close(model(TOKENS).logits, stock("llama")(TOKENS).logits, "logits")


def test_a_backend_for_documents_leaves_the_rest_to_the_others():
    model = stock("llama").eval()
    am_models.optimize(model, kernels={"attention": "bucketed"})
    assert_close(model(TOKENS).logits, stock("llama")(TOKENS).logits, "logits")
    batch = am_models.split_batch(model, documents([6, 3], padding=2))
    chosen = stock("llama")
    am_models.optimize(chosen)
    assert torch.equal(
        am_models.forward_with_loss(model, linear_cross_entropy, *batch),
        am_models.forward_with_loss(chosen, linear_cross_entropy, *batch),
    )
    am_models.optimize(model, kernels={"attention": "varlen"})
    assert_close(model(TOKENS).logits, stock("llama")(TOKENS).logits, "logits")
    with pytest.raises(ValueError, match=r"backend='varlen' does not support .*device cpu"):
        am_models.forward_with_loss(model, linear_cross_entropy, *batch)


def test_attention_chosen_by_the_user_is_kept_unless_ours_is_asked_for():
    model = am_models.AutoModelForCausalLM.from_config(config_of("llama"), attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    assert model(TOKENS, output_attentions=True).attentions is not None
    am_models.optimize(model, kernels={"attention": True})
    assert model.config._attn_implementation != "eager"


@pytest.mark.parametrize(
    ("family", "kernels", "message"),
    [
        ("llama", "fast", "kernels='fast'"),
        ("llama", {"attentoin": True}, "attentoin"),
        ("llama", {"norm": "triton"}, "norm"),
        ("llama", {"attention": "nonsense"}, "nonsense"),
        ("llama", {"experts": True}, "no experts"),
        ("gemma", {"norm": True}, "norm"),
        ("gpt2", {"attention": True}, "gpt2"),
    ],
)
def test_what_cannot_be_honoured_is_refused(family, kernels, message):
    model = stock(family)
    with pytest.raises(ValueError, match=message):
        am_models.optimize(model, kernels=kernels)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_foreign_forward_is_not_overwritten():
    model = stock("llama")
    norm = model.model.norm
    norm.forward = lambda hidden_states: hidden_states * 0
    assert "already replaced" in am_models.optimize(model).parts["norm"]
    assert model(TOKENS).logits.abs().max() == 0


def test_document_ids_are_refused_where_they_would_be_ignored():
    batch = documents([4, 3])
    del batch["shift_labels"]
    for family, kernels in (("gpt2", "auto"), ("llama", "off")):
        model = stock(family)
        am_models.optimize(model, kernels=kernels)
        with pytest.raises(ValueError, match="document_ids"):
            model(**batch)


@pytest.mark.parametrize("family", CONFIGS)
def test_require_no_leak_passes_and_changes_nothing(family):
    model = stock(family)
    am_models.optimize(model)
    model.get_input_embeddings().eval()
    modes = [module.training for module in model.modules()]
    am_models.require_no_leak(model, packed=True)
    am_models.require_no_leak(model, packed=False)
    assert [module.training for module in model.modules()] == modes


def test_require_no_leak_names_what_leaked():
    # An attention name without a mask function: transformers then makes no mask at all.
    transformers.AttentionInterface.register("leaky", transformers.integrations.sdpa_attention.sdpa_attention_forward)
    model = stock("llama")
    model.set_attn_implementation("leaky")
    with pytest.raises(ValueError, match=r"llama: the logits of document 2 move .* when document 1 changes"):
        am_models.require_no_leak(model, packed=True)
    am_models.require_no_leak(model, packed=False)


def test_require_no_leak_refuses_broken_weights():
    model = stock("llama")
    with torch.no_grad():
        model.lm_head.weight[3] = float("inf")
    with pytest.raises(ValueError, match=r"llama: 48 of \d+ logits .* NaN or infinite; the weights are broken"):
        am_models.require_no_leak(model, packed=True)


def test_require_no_leak_needs_weights():
    with torch.device("meta"):
        model = am_models.AutoModelForCausalLM.from_config(config_of("llama"))
    with pytest.raises(ValueError, match="meta device"):
        am_models.require_no_leak(model, packed=True)


def tensors_by_map(model: torch.nn.Module, records: list[dict]) -> dict[str, torch.Tensor]:
    """The file tensors that the records and the parameters without a record describe."""
    parameters = dict(model.named_parameters())
    tensors = {}
    for record in records:
        part = parameters[record["parameter"]][
            tuple(slice(*bounds) if bounds else slice(None) for bounds in record["slice"])
        ]
        part = part.transpose(-1, -2) if record["transpose"] else part
        tensors[record["file"]] = part.detach()
    covered = {record["parameter"] for record in records}
    return tensors | {name: tensor.detach() for name, tensor in parameters.items() if name not in covered}


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "mixtral", "llama", "llama_tied", *VISION_CONFIGS])
def test_weight_map_describes_the_files_that_stock_writes_and_reads(family, tmp_path):
    from safetensors.torch import load_file, save_file

    model = stock(family)
    records = am_models.weight_map(model)
    assert (records == []) == (family in ("llama", "llama_tied", "idefics3", "smolvlm", "qwen3_vl"))
    assert json.loads(json.dumps(records)) == records
    model.save_pretrained(tmp_path / "stock")
    written = load_file(tmp_path / "stock" / "model.safetensors")
    mapped = tensors_by_map(model, records)
    assert set(mapped) == set(written)
    assert all(torch.equal(mapped[name].reshape(tensor.shape), tensor) for name, tensor in written.items())

    # The other way: fill files by the map alone, let stock transformers read them.
    model.config.save_pretrained(tmp_path / "mapped")
    files = {name: mapped[name].reshape(tensor.shape).contiguous() for name, tensor in written.items()}
    save_file(files, tmp_path / "mapped" / "model.safetensors", metadata={"format": "pt"})
    auto = transformers.AutoModelForImageTextToText if family in VISION_CONFIGS else transformers.AutoModelForCausalLM
    opened, info = auto.from_pretrained(tmp_path / "mapped", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in opened.state_dict().items())


@pytest.mark.parametrize(
    ("family", "published"),
    [
        # Names in files on the Hub, of llava-1.5-7b-hf, Qwen2.5-VL-3B-Instruct, SmolVLM-256M, Qwen3-VL-2B-Instruct.
        ("llava_clip", "language_model.model.layers.0.mlp.up_proj.weight language_model.lm_head.weight"),
        ("llava_clip", "vision_tower.embeddings.class_embedding multi_modal_projector.linear_1.weight"),
        ("qwen2_5_vl", "model.layers.0.mlp.up_proj.weight lm_head.weight visual.blocks.0.attn.qkv.weight"),
        ("smolvlm", "model.text_model.layers.0.mlp.up_proj.weight model.vision_model.encoder.layers.0.mlp.fc1.weight"),
        ("qwen3_vl", "model.language_model.layers.0.mlp.up_proj.weight model.visual.blocks.0.attn.qkv.weight"),
    ],
)
def test_weight_map_gives_the_published_names(family, published):
    model = stock(family)
    names = set(tensors_by_map(model, am_models.weight_map(model)))
    assert not set(published.split()) - names


@pytest.mark.parametrize("family", ["llava", "llava_clip", "qwen2_5_vl", "qwen3_moe"])
def test_weight_map_reads_the_spelling_of_published_files(family, tmp_path):
    from safetensors.torch import load_file, save_file

    model = stock(family)
    model.save_pretrained(tmp_path)
    records = am_models.weight_map(model)
    by_file = operator.itemgetter("file")
    assert sorted(am_models.weight_map(model, tmp_path), key=by_file) == sorted(records, key=by_file)
    # What llava-hf's files call the parts of the tower, and what transformers 4.52 wrote: the names of the modules.
    for old, new in (
        ("vision_tower.", "vision_tower.vision_model."),
        ("language_model.model.", "model.language_model."),
    ):
        path = tmp_path / "model.safetensors"
        save_file(
            {name.replace(old, new): tensor for name, tensor in load_file(path).items()},
            path,
            metadata={"format": "pt"},
        )
    mapped = tensors_by_map(model, am_models.weight_map(model, tmp_path))
    assert set(mapped) == set(load_file(tmp_path / "model.safetensors"))
    auto = transformers.AutoModelForImageTextToText if family in VISION_CONFIGS else transformers.AutoModelForCausalLM
    opened, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    if family.startswith("llava"):
        assert any("vision_tower.vision_model." in name for name in mapped)
        assert am_models.weight_map(opened, tmp_path) == am_models.weight_map(model, tmp_path)


def test_weight_map_is_the_same_on_the_meta_device_and_after_optimising():
    model = stock("qwen3_moe")
    with torch.device("meta"):
        meta = am_models.AutoModelForCausalLM.from_config(config_of("qwen3_moe"))
    assert am_models.weight_map(meta) == am_models.weight_map(model)


def test_weight_map_refuses_computed_tensors():
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import Interleave, WeightConverter

    converter = WeightConverter("q_proj.weight", "q_proj.weight", operations=[Interleave(dim=0)])
    register_checkpoint_conversion_mapping("LlamaForCausalLM", [converter])
    try:
        with pytest.raises(ValueError, match=r"llama: .*q_proj"):
            am_models.weight_map(stock("llama"))
    finally:
        register_checkpoint_conversion_mapping("LlamaForCausalLM", [], overwrite=True)
