from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from am_peft import Adapter, LoraLinear, adapter_files, adapter_state_dict, apply_lora, load_adapter, save_adapter

# peft 0.21 asks transformers 5.23 under a name that is deprecated there.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "tie_word_embeddings": False,
}
TOKENS = torch.arange(20).view(2, 10)
OPTIONS = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": "all-linear", "exclude_modules": ["down_proj"], "task_type": "CAUSAL_LM"},
    {
        "target_modules": ["q_proj", "o_proj"],
        "r": 4,
        "lora_alpha": 10,
        "rank_pattern": {"layers.1.self_attn.q_proj": 7, "o_proj": 3},
        "alpha_pattern": {"^model.layers.2.self_attn.o_proj": 40},
        "use_rslora": True,
        "modules_to_save": ["lm_head", "norm"],
    },
    {"target_modules": r".*\.(up|down)_proj", "lora_dropout": 0.1},
    {"target_modules": ["k_proj", "gate_proj"], "layers_to_transform": [1]},
]


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY)).eval()


def randomise(model):
    """Give all that trains a value that matters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3, generator=generator)


def assert_same_logits(actual, expected):
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    "options", [*OPTIONS, {"target_modules": ["*.layers.1.*q_proj"], "modules_to_save": ["*head"]}]
)
def test_stock_peft_loads_ours(options, tmp_path):
    base_logits = llama()(TOKENS).logits
    model = apply_lora(llama(), LoraConfig(**options))
    randomise(model)
    expected = model(TOKENS).logits
    assert (expected - base_logits).abs().max() > 0.1
    save_adapter(model, tmp_path, base_model_name_or_path="org/base")
    stock = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert_same_logits(stock(TOKENS).logits, expected)
    assert stock.peft_config["default"].base_model_name_or_path == "org/base"


@pytest.mark.parametrize("options", OPTIONS)
def test_ours_loads_stock_peft(options, tmp_path):
    stock = get_peft_model(llama(), LoraConfig(**options)).eval()
    randomise(stock)
    expected = stock(TOKENS).logits
    stock.save_pretrained(tmp_path)
    model = load_adapter(llama(), tmp_path)
    assert_same_logits(model(TOKENS).logits, expected)
    assert adapter_state_dict(model).keys() == load_file(tmp_path / "adapter_model.safetensors").keys()


@pytest.mark.parametrize("direction", ["ours to stock", "stock to ours"])
def test_sequence_classification_head_travels(direction, tmp_path):
    def base():
        torch.manual_seed(0)
        return LlamaForSequenceClassification(LlamaConfig(**TINY, num_labels=3, pad_token_id=0)).eval()

    config = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], modules_to_save=["score"])
    if direction == "ours to stock":
        model = apply_lora(base(), config)
        randomise(model)
        save_adapter(model, tmp_path)
        other = PeftModel.from_pretrained(base(), tmp_path).eval()
    else:
        model = get_peft_model(base(), config).eval()
        randomise(model)
        model.save_pretrained(tmp_path)
        other = load_adapter(base(), tmp_path)
    assert_same_logits(other(TOKENS).logits, model(TOKENS).logits)


def test_wildcards_are_written_as_names_peft_knows():
    model = apply_lora(llama(), LoraConfig(target_modules=["*.layers.1.*q_proj"]))
    assert json.loads(adapter_files(model)["adapter_config.json"])["target_modules"] == [
        "model.layers.1.self_attn.q_proj"
    ]
    model = apply_lora(llama(), LoraConfig(target_modules="all-linear"))
    assert json.loads(adapter_files(model)["adapter_config.json"])["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


def test_adapter_is_a_state_with_file_names():
    model = apply_lora(llama(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    randomise(model)
    adapter = Adapter(model)
    state = {name: value.clone() for name, value in adapter.state_dict().items()}
    named = dict(adapter.named_parameters())
    assert state.keys() == named.keys()
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in state
    assert "base_model.model.lm_head.weight" in state
    assert {id(parameter) for parameter in named.values()} == {
        id(parameter) for parameter in model.parameters() if parameter.requires_grad
    }
    other = apply_lora(llama(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    Adapter(other).load_state_dict(state)
    assert torch.equal(other(TOKENS).logits, model(TOKENS).logits)
    state.pop("base_model.model.lm_head.weight")
    with pytest.raises(ValueError, match="1 missing"):
        Adapter(other).load_state_dict(state)


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        load_adapter(llama(), tmp_path)
    save_adapter(apply_lora(llama(), LoraConfig(target_modules=["q_proj"])), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(iter(tensors))
    save_file({**tensors, "base_model.model.extra": torch.zeros(1)}, weights)
    with pytest.raises(ValueError, match=r"1 unexpected \['base_model.model.extra'\]"):
        load_adapter(llama(), tmp_path)
    save_file({**tensors, name: torch.zeros(3, 3)}, weights)
    with pytest.raises(ValueError, match=r"has shape \(3, 3\) in the adapter"):
        load_adapter(llama(), tmp_path)

    def rewrite(**changes):
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **changes}))

    rewrite(from_the_future=True)
    with pytest.raises(ValueError, match="sets from_the_future"):
        load_adapter(llama(), tmp_path)
    rewrite(from_the_future=None, use_dora=True)
    with pytest.raises(ValueError, match="does not honour use_dora=True"):
        load_adapter(llama(), tmp_path)
    rewrite(peft_type="IA3")
    with pytest.raises(ValueError, match="peft_type='IA3'"):
        load_adapter(llama(), tmp_path)


def test_a_model_without_lora_has_no_adapter(tmp_path):
    for function in (adapter_state_dict, Adapter, adapter_files):
        with pytest.raises(ValueError, match="has no LoRA"):
            function(llama())


def test_names_ignore_compile_and_checkpoint_wrappers():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = apply_lora(llama(), LoraConfig(target_modules=["q_proj"]))
    expected = adapter_state_dict(model).keys()
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = checkpoint_wrapper(layer)
    # Nothing runs, and importing the default backend warns in torch 2.11.
    assert adapter_state_dict(torch.compile(model, backend="eager")).keys() == expected
    assert isinstance(model.get_submodule("model.layers.0._checkpoint_wrapped_module.self_attn.q_proj"), LoraLinear)


def test_files_have_the_permissions_that_the_umask_gives(tmp_path):
    save_adapter(apply_lora(llama(), LoraConfig(target_modules=["q_proj"])), tmp_path / "adapter")
    (tmp_path / "plain").touch()
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "adapter").iterdir()}
    assert modes == dict.fromkeys(
        ("adapter_config.json", "adapter_model.safetensors"), (tmp_path / "plain").stat().st_mode
    )
