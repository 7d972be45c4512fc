"""Write checkpoints of a tiny Llama with NeMo AutoModel's own Checkpointer, on two CPU processes.

In an environment with nemo-automodel 0.7.0: `torchrun --nproc-per-node 2 nemo_automodel.py FOLDER`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from nemo_automodel.components.checkpoint.checkpointing import Checkpointer
from nemo_automodel.components.checkpoint.config import CheckpointingConfig
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

out = Path(sys.argv[1])
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
)
model = LlamaForCausalLM(config).to(torch.bfloat16)
expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
for save_format in ("safetensors", "torch_save"):
    checkpointer = Checkpointer(
        CheckpointingConfig(
            checkpoint_dir=out, model_save_format=save_format, save_consolidated="false", model_repo_id="none"
        ),
        dp_rank=dist.get_rank(),
        tp_rank=0,
        pp_rank=0,
    )
    folder = out / save_format / "epoch_0_step_1"
    folder.mkdir(parents=True, exist_ok=True)
    checkpointer.save_model(model, str(folder))
    checkpointer.close()
if dist.get_rank() == 0:
    save_file(expected, out / "expected.safetensors")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(out / "model")
dist.destroy_process_group()
