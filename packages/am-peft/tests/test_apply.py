from __future__ import annotations

import copy

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from am_peft import LoraLinear, apply_lora, cannot_merge, initialise_lora, merge_lora, trainable_report

# peft 0.21 asks transformers 5.23 under a name that is deprecated there.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


def llama(**options):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**TINY, "tie_word_embeddings": False, **options})).eval()


def qwen2():
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**TINY, tie_word_embeddings=False)).eval()


def adapted(model):
    return {name for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def randomise(model):
    """Give every factor a value that matters, B included."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2, generator=generator)


TOKENS = torch.arange(20).view(2, 10)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["self_attn.q_proj", "model.layers.1.mlp.up_proj"]},
        {"target_modules": r".*layers\.[02]\..*(q|down)_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.1\..*"},
        {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]},
    ],
)
def test_targets_are_those_of_stock_peft(options):
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    stock = get_peft_model(llama(), LoraConfig(**options))
    expected = {
        name.removeprefix("base_model.model.")
        for name, module in stock.named_modules()
        if isinstance(module, LoraLayer)
    }
    model = apply_lora(llama(), LoraConfig(**options))
    assert adapted(model) == expected
    assert sum(row.trainable for row in trainable_report(model).rows) == sum(
        parameter.numel() for parameter in stock.parameters() if parameter.requires_grad
    )


def test_wildcards_match_full_names_and_obey_the_other_rules():
    model = apply_lora(llama(), LoraConfig(target_modules=["*.layers.1.*_proj"], exclude_modules=["*.mlp.*"]))
    assert adapted(model) == {f"model.layers.1.self_attn.{part}_proj" for part in "qkvo"}
    model = apply_lora(llama(), LoraConfig(target_modules=["*q_proj"], layers_to_transform=[2]))
    assert adapted(model) == {"model.layers.2.self_attn.q_proj"}


def test_rank_and_alpha_patterns_and_rslora():
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"layers.0.self_attn.q_proj": 2, "v_proj": 16},
        alpha_pattern={"v_proj": 4},
        use_rslora=True,
    )
    layers = dict(apply_lora(llama(), config).named_modules())
    assert layers["model.layers.0.self_attn.q_proj"].lora_A.weight.shape == (2, 32)
    assert layers["model.layers.1.self_attn.q_proj"].r == 4
    assert layers["model.layers.1.self_attn.q_proj"].scaling == 4.0
    assert layers["model.layers.1.self_attn.v_proj"].lora_B.weight.shape == (16, 16)
    assert layers["model.layers.1.self_attn.v_proj"].scaling == 1.0


def test_names_of_the_base_stay_and_only_adapters_train():
    base = qwen2()
    before = dict(base.named_parameters())
    model = apply_lora(base, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    after = dict(model.named_parameters())
    assert before.keys() <= after.keys()
    assert all(after[name] is parameter for name, parameter in before.items())
    trainable = {name for name, parameter in after.items() if parameter.requires_grad}
    prefix = "model.layers.{}.self_attn.q_proj.lora_{}.weight"
    assert trainable == {prefix.format(i, f) for i in range(3) for f in "AB"} | {"lm_head.weight"}


def test_a_new_adapter_changes_nothing_and_init_false_does():
    base = llama()
    expected = base(TOKENS).logits
    model = apply_lora(copy.deepcopy(base), LoraConfig(target_modules="all-linear"))
    assert torch.equal(model(TOKENS).logits, expected)
    model = apply_lora(copy.deepcopy(base), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    assert (model(TOKENS).logits - expected).abs().max() > 1e-2


def test_gaussian_initialisation_has_std_one_over_r():
    model = nn.Sequential(nn.Linear(4000, 5))
    apply_lora(model, LoraConfig(r=4, target_modules=["0"], init_lora_weights="gaussian"))
    # 16,000 draws: the standard error of the deviation is 0.6 %.
    assert abs(model[0].lora_A.weight.std().item() / 0.25 - 1) < 0.03


@pytest.mark.parametrize("with_bias", [True, False])
def test_layer_computes_the_formula_and_its_gradients(with_bias):
    model = nn.Sequential(nn.Linear(7, 5, bias=with_bias)).double()
    apply_lora(model, LoraConfig(r=3, lora_alpha=6, target_modules=["0"]))
    randomise(model)
    layer, x = model[0], torch.randn(2, 4, 7, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    weight = layer.weight + 2.0 * layer.lora_B.weight @ layer.lora_A.weight
    expected = nn.functional.linear(x, weight, layer.bias)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    inputs = (x, layer.lora_A.weight, layer.lora_B.weight)
    upstream = torch.randn_like(out)
    actual = torch.autograd.grad(out, inputs, upstream)
    for grad, reference in zip(actual, torch.autograd.grad(expected, inputs, upstream)):
        torch.testing.assert_close(grad, reference, rtol=1e-12, atol=1e-12)


def test_bfloat16_model_has_float32_factors_unless_told_otherwise():
    model = apply_lora(llama().bfloat16(), LoraConfig(target_modules=["q_proj"]))
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.lora_A.weight.dtype == torch.float32
    loss = model(TOKENS).logits.float().square().mean()
    loss.backward()
    assert layer.lora_B.weight.grad.dtype == torch.float32
    model = apply_lora(llama().bfloat16(), LoraConfig(target_modules=["q_proj"]), adapter_dtype=torch.bfloat16)
    assert model.model.layers[0].self_attn.q_proj.lora_A.weight.dtype == torch.bfloat16


def test_autocast_works_on_float32_weights():
    model = apply_lora(llama(), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    expected = model(TOKENS).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = model(TOKENS).logits
    assert (actual.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_dropout_acts_on_the_update_in_training_only():
    model = apply_lora(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"], lora_dropout=0.5))
    randomise(model)
    x = torch.randn(3, 8)
    model.eval()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_dropout_keeps_the_mean():
    model = apply_lora(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"], lora_dropout=0.5))
    randomise(model)
    x = torch.randn(1, 8)
    expected = model.eval()(x)
    update = expected - nn.functional.linear(x, model[0].weight, model[0].bias)
    mean = model.train()(x.expand(20000, 8)).mean(0, keepdim=True)
    # 20,000 draws: a wrong factor of 2 would be off by the whole update.
    assert (mean - expected).abs().max() < 0.1 * update.abs().max()


def test_meta_device_and_seeded_values():
    config = LoraConfig(target_modules=["q_proj", "down_proj"])
    with torch.device("meta"):
        meta = LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=False))
    apply_lora(meta, config)
    assert all(parameter.is_meta for parameter in meta.parameters())
    meta.to_empty(device="cpu")
    initialise_lora(meta, seed=5)
    # Another selection and other values before: the same names must get the same values.
    real = apply_lora(llama(), LoraConfig(target_modules="all-linear"))
    initialise_lora(real, seed=5)
    values = dict(real.named_parameters())
    lora = {name: value for name, value in meta.named_parameters() if "lora_" in name}
    assert len(lora) == 12
    assert all(torch.equal(value, values[name]) for name, value in lora.items())
    first = values["model.layers.0.self_attn.q_proj.lora_A.weight"].clone()
    assert not torch.equal(first, values["model.layers.1.self_attn.q_proj.lora_A.weight"])
    initialise_lora(real, seed=6)
    assert not torch.equal(first, values["model.layers.0.self_attn.q_proj.lora_A.weight"])


def test_the_seed_of_a_factor_is_made_of_the_seed_and_its_name():
    # Other loaders derive the same: xxh3_64("5:0.lora_A.weight") >> 1.
    generator = torch.Generator().manual_seed(7629134648244729620)
    expected = nn.init.kaiming_uniform_(torch.empty(3, 6), a=5**0.5, generator=generator)
    model = apply_lora(nn.Sequential(nn.Linear(6, 4)), LoraConfig(r=3, target_modules=["0"]))
    initialise_lora(model, seed=5)
    assert torch.equal(model[0].lora_A.weight, expected)


def test_layer_resets_from_a_generator():
    model = apply_lora(nn.Sequential(nn.Linear(6, 4)), LoraConfig(target_modules=["0"]))
    base = model[0].weight.clone()
    model[0].reset_lora_parameters(torch.Generator().manual_seed(3))
    value = model[0].lora_A.weight.clone()
    randomise(model)
    model[0].reset_lora_parameters(torch.Generator().manual_seed(3))
    assert torch.equal(model[0].lora_A.weight, value)
    assert (model[0].lora_B.weight == 0).all()
    assert torch.equal(model[0].weight, base)
    assert value.abs().max() <= 1 / 6**0.5


def test_merge_gives_plain_modules_and_the_same_logits():
    model = apply_lora(qwen2(), LoraConfig(target_modules="all-linear", lora_alpha=32))
    base = model(TOKENS).logits
    randomise(model)
    expected = model(TOKENS).logits
    assert (expected - base).abs().max() > 0.1
    names = {name for name in model.state_dict() if "lora_" not in name}
    merge_lora(model)
    assert set(model.state_dict()) == names
    assert {type(module) for module in model.modules() if isinstance(module, nn.Linear)} == {nn.Linear}
    assert (model(TOKENS).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    with pytest.raises(ValueError, match="no LoRA to merge"):
        merge_lora(model)


def test_merge_of_bfloat16_rounds_once():
    model = apply_lora(nn.Sequential(nn.Linear(16, 8)).bfloat16(), LoraConfig(target_modules=["0"], lora_alpha=16))
    randomise(model)
    layer = model[0]
    exact = layer.weight.float() + 2.0 * layer.lora_B.weight @ layer.lora_A.weight
    merge_lora(model)
    assert torch.equal(model[0].weight, exact.bfloat16())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_dora", True),
        ("inference_mode", True),
        ("bias", "all"),
        ("fan_in_fan_out", True),
        ("target_parameters", ["experts.up"]),
        ("trainable_token_indices", [1]),
        ("layer_replication", [(0, 2)]),
        ("lora_bias", True),
        ("megatron_config", {}),
        ("ensure_weight_tying", True),
        ("use_qalora", True),
    ],
)
def test_options_that_are_not_honoured_are_refused_by_name(option, value):
    config = LoraConfig(target_modules=["q_proj"])
    # Set afterwards: some combinations are refused by PEFT itself, which is not what is tested.
    setattr(config, option, value)
    with pytest.raises(ValueError, match=f"does not honour {option}="):
        apply_lora(llama(), config)


@pytest.mark.parametrize("value", ["pissa", "olora", "orthogonal"])
def test_other_initialisations_are_refused(value):
    with pytest.raises(ValueError, match=f"init_lora_weights='{value}'"):
        apply_lora(llama(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=value))


def test_other_configurations_are_refused():
    with pytest.raises(TypeError, match="AdaLoraConfig"):
        apply_lora(llama(), AdaLoraConfig(target_modules=["q_proj"], total_step=10))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_prj"]}, r"target_modules entry 'q_prj' matches no module; nearest: .*q_proj"),
        ({"target_modules": ["q_proj", "*.qq_proj"]}, r"target_modules entry '\*.qq_proj' matches no module"),
        ({"target_modules": "q_proj"}, r"target_modules='q_proj' \(a regex\) matches no module; nearest: .*q_proj"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["w_proj"]}, "exclude_modules entry 'w_proj' matches no"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_had"]}, "modules_to_save entry 'lm_had' .*lm_head"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 7]}, "no module in layer 7"),
        (
            {"target_modules": ["q_proj"], "rank_pattern": {"k_proj": 2}},
            "rank_pattern key 'k_proj' matches no targeted",
        ),
        ({"target_modules": ["q_proj"], "alpha_pattern": {"x": 2}}, "alpha_pattern key 'x' matches no targeted"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "selects no module"),
        ({}, "target_modules=None selects nothing"),
    ],
)
def test_entries_that_match_nothing_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        apply_lora(llama(), LoraConfig(**options))


def test_other_modules_than_linear_are_refused():
    with pytest.raises(TypeError, match=r"target 'model.embed_tokens' is a Embedding"):
        apply_lora(llama(), LoraConfig(target_modules=["q_proj", "embed_tokens"]))


def test_an_error_leaves_the_model_as_it_was():
    model = llama()
    with pytest.raises(TypeError):
        apply_lora(model, LoraConfig(target_modules=["q_proj", "embed_tokens"]))
    assert not adapted(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_twice_is_refused():
    model = apply_lora(llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="has LoRA already"):
        apply_lora(model, LoraConfig(target_modules=["v_proj"]))


def test_tied_weights_are_refused_where_they_would_be_wrong():
    with pytest.raises(ValueError, match=r"modules_to_save='lm_head' shares a weight with model\.embed_tokens\.weight"):
        apply_lora(llama(tie_word_embeddings=True), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model = apply_lora(llama(tie_word_embeddings=True), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="cannot merge 'lm_head': its weight is shared"):
        merge_lora(model)


def test_what_cannot_be_merged_is_known_before_there_are_values():
    with torch.device("meta"):
        tied, apart = llama(tie_word_embeddings=True), llama()
    assert cannot_merge(tied) == "the model has no LoRA to merge; apply_lora or load_adapter comes first"
    reason = cannot_merge(apply_lora(tied, LoraConfig(target_modules=["lm_head"])))
    assert reason.startswith(
        "cannot merge 'lm_head': its weight is shared as model.embed_tokens.weight, lm_head.weight;"
    )
    assert cannot_merge(apply_lora(apart, LoraConfig(target_modules=["lm_head"]))) is None


def test_a_head_that_peft_would_train_must_be_named():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.score = nn.Linear(4, 4), nn.Linear(4, 2)

    with pytest.raises(ValueError, match=r"modules_to_save=\['score'\]"):
        apply_lora(Classifier(), LoraConfig(task_type="SEQ_CLS", target_modules=["body"]))
    model = apply_lora(
        Classifier(), LoraConfig(task_type="SEQ_CLS", target_modules=["body"], modules_to_save=["classifier", "score"])
    )
    assert model.score.weight.requires_grad


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradients_under_activation_checkpointing(use_reentrant):
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5))
    apply_lora(model, LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))
    x = torch.randn(4, 6, requires_grad=True)
    inputs = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    model(x).square().sum().backward()
    expected = [tensor.grad for tensor in inputs]
    for tensor in inputs:
        tensor.grad = None
    checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
    assert len(inputs) == 5
    for tensor, grad in zip(inputs, expected):
        torch.testing.assert_close(tensor.grad, grad, rtol=1e-6, atol=1e-7)
