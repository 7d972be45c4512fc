"""What the leak check says of every causal family of transformers: those it lets through, and why not the others."""

from __future__ import annotations

import pytest
import torch
import transformers
from all_families import FAMILIES, config_of

import am_models

# As they are configured by default, these attend in both directions; cpmant, xlm and xlnet whatever they are told.
BOTH_DIRECTIONS = """bert bert-generation big_bird camembert cpmant data2vec-text electra ernie megatron-bert rembert
roberta roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xlnet xmod"""
NEVER_CAUSAL = ("cpmant", "xlm", "xlnet")
# Of those, as decoders: they count positions from pad_token_id + 1, the others from 0.
FROM_PAD = ("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod")
# These do not tell packed documents apart: states that run through, relative positions of the row, own attention.
NO_PACKING = """afmoe bailing_hybrid bamba bart bigbird_pegasus biogpt blenderbot blenderbot-small bloom falcon
falcon_h1 falcon_mamba gpt_oss granitemoehybrid inkling2_text inkling_text jamba lfm2_moe lfm3 mamba
mamba2 marian mbart minimax mpt mvp nemotron_h olmo_hybrid openai-gpt opt pegasus plbart prophetnet
qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp_text recurrent_gemma reformer rwkv trocr xglm
xlstm zaya"""
CHOSEN = ("bert", "roberta", "xlnet", "prophetnet", "llama", "gpt2", "mamba", "gpt_oss", "deepseek_v3", "opt", "bloom")


def model_of(family: str, **changes: object) -> transformers.PreTrainedModel:
    """A model whose weights are large enough that attention matters to the logits."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of(family, **changes))
    words = ("proj", "att", "embed", "query", "key", "value")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and any(word in name for word in words):
                parameter.normal_(std=0.2)
    am_models.optimize(model)
    return model


def said(model: transformers.PreTrainedModel, *, packed: bool) -> str:
    try:
        am_models.require_no_leak(model, packed=packed)
    except ValueError as error:
        return str(error)
    return ""


# Modelling files of some families, in older transformers, decorate with it when they are imported.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in CHOSEN else pytest.mark.slow) for name in FAMILIES]
)
def test_every_family_passes_or_is_refused_for_a_reason(family):
    model = model_of(family)
    padded, packed = said(model, packed=False), said(model, packed=True)
    if family in BOTH_DIRECTIONS.split():
        assert padded.startswith(f"{model.config.model_type}: the logits of earlier tokens move by")
        assert "when later ones change" in padded
        assert "set is_decoder to true" in padded
    elif family == "prophetnet":
        assert "the logits of a document move" in padded
        assert "when the padding behind it changes" in padded
    else:
        assert padded == ""
        assert ("when document 1 changes" in packed) == (family in NO_PACKING.split())
        assert bool(packed) == (family in NO_PACKING.split())


@pytest.mark.parametrize("family", ["bert", "roberta", "xlnet", "electra", "xmod"])
def test_an_encoder_as_decoder(family):
    text = said(model_of(family, is_decoder=True), packed=False)
    if family in NEVER_CAUSAL:
        assert "when later ones change" in text
    elif family in FROM_PAD:
        assert "when its positions are given, counted from 0" in text
        assert "choose a model that counts from 0" in text
    else:
        assert text == ""
