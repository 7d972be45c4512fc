"""Write checkpoints of a tiny Llama 3 with torchtitan's own CheckpointManager, on two CPU processes.

In an environment with torchtitan 0.3.0: `torchrun --nproc-per-node 2 torchtitan.py FOLDER` (under another name, so
that the script does not hide the package).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchtitan.components.checkpointer.dcp import CheckpointManager
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.llama3 import (
    _EMBEDDING_INIT,
    _NORM_INIT,
    Llama3Model,
    Llama3StateDictAdapter,
    _build_llama3_layers,
    _output_linear_init,
)
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, WIDTH, HIDDEN, LAYERS, HEADS, KEY_HEADS = 32, 16, 24, 1, 4, 2

out = Path(sys.argv[1]).absolute()
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
config = Llama3Model.Config(
    dim=WIDTH,
    vocab_size=VOCABULARY,
    tok_embeddings=Embedding.Config(num_embeddings=VOCABULARY, embedding_dim=WIDTH, param_init=_EMBEDDING_INIT),
    norm=RMSNorm.Config(normalized_shape=WIDTH, param_init=_NORM_INIT),
    lm_head=Linear.Config(in_features=WIDTH, out_features=VOCABULARY, param_init=_output_linear_init(WIDTH)),
    layers=_build_llama3_layers(
        n_layers=LAYERS,
        dim=WIDTH,
        n_heads=HEADS,
        n_kv_heads=KEY_HEADS,
        hidden_dim=HIDDEN,
        rope=ComplexRoPE.Config(dim=WIDTH // HEADS, max_seq_len=32, theta=10000.0),
        attn_backend="flex",
    ),
)
model = config.build()
model.init_weights(buffer_device=torch.device("cpu"))
published = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=WIDTH,
    intermediate_size=HIDDEN,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=KEY_HEADS,
    max_position_embeddings=32,
)
if dist.get_rank() == 0:
    # torchtitan writes files as the index of the model says.
    LlamaForCausalLM(published).save_pretrained(out / "assets", max_shard_size="3KB")
dist.barrier()
adapter = Llama3StateDictAdapter(config, str(out / "assets"))
expected = {name: tensor.clone().contiguous() for name, tensor in adapter.to_hf(model.state_dict()).items()}
for layer in model.layers.values():
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
for parameter in model.parameters():
    parameter.grad = torch.ones_like(parameter)
optimizer.step()


class State:
    """What has state, as torchtitan's trainer hands it over."""

    def __init__(self, get):
        self.state_dict = get

    def load_state_dict(self, state):
        raise NotImplementedError


flat = StateDictOptions(flatten_optimizer_state_dict=True)
for folder, last in (("native", False), ("hugging_face", True)):
    manager = CheckpointManager(
        CheckpointManager.Config(
            enable=True,
            folder=folder,
            interval=1,
            last_save_model_only=last,
            last_save_in_hf=last,
            keep_latest_k=0,
        ),
        dataloader=None,
        model_parts=[model],
        optimizers=State(lambda: get_optimizer_state_dict(model, optimizer, options=flat)),
        lr_schedulers=State(lambda: {"last_epoch": 1}),
        states={"train_state": State(lambda: {"step": torch.tensor(1), "ntokens_seen": torch.tensor(16)})},
        sd_adapter=adapter,
        base_folder=str(out),
    )
    manager.save(1, last_step=last)
    manager.close()
if dist.get_rank() == 0:
    save_file(expected, out / "expected.safetensors")
dist.destroy_process_group()
