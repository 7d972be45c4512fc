"""Write checkpoints of a tiny model with torch_checkpointing's own CheckpointManager, on four CPU processes.

In an environment with torch_checkpointing 0.1.1: `torchrun --nproc-per-node 4 torch_checkpointing.py FOLDER` (under
another name, so that the script does not hide the package).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch_checkpointing import CheckpointManager, DefaultMetadataManager, ItemSpec
from torch_checkpointing.checkpoint_layout import JsonSerialization, LayoutInfo, SafetensorsSerialization
from torch_checkpointing.default_resharder import DefaultResharder
from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig


def gather(self, data, process_group=None):
    """The package gathers through tensors on CUDA alone; what is gathered is the same."""
    gathered = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(gathered, data, group=process_group)
    return dict(enumerate(gathered))


DefaultMetadataManager._all_gather_pickled_data = gather

out = Path(sys.argv[1]).absolute()
dist.init_process_group("gloo")
torch.manual_seed(0)
model = nn.Module()
model.embed = nn.Embedding(11, 6)
model.up = nn.Linear(6, 9)
model.down = nn.Linear(9, 6, bias=False)
model.scale = nn.Parameter(torch.randn(()))
model.register_buffer("count", torch.tensor(7))
# Tensor parallel inside of FSDP: `up` and `embed` are cut twice on one dim, `down` on two.
mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
for module, dim in ((model.embed, 0), (model.up, 0), (model.down, 1)):
    for name, value in list(module.named_parameters()):
        cut = distribute_tensor(value.detach(), mesh["tp"], [Shard(min(dim, value.dim() - 1))])
        setattr(module, name, nn.Parameter(cut))
fully_shard(model, mesh=mesh["dp"], ignored_params={model.scale})
optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False)
for parameter in model.parameters():
    parameter.grad = parameter.detach() * 0 + 0.5
optimizer.step()

weights = model.state_dict()
state = {"model": weights, "optimizer": get_optimizer_state_dict(model, optimizer), "step": 3}
for kind in ("torch_save", "safetensors"):
    layout = LayoutInfo("rank_{rank}/model.safetensors", SafetensorsSerialization()) if kind == "safetensors" else None
    config = CheckpointManager.Config.with_sync_save()
    config.items = {
        "model": ItemSpec(layout=layout, resharder=DefaultResharder()),
        "optimizer": ItemSpec(resharder=DefaultResharder()),
        "step": ItemSpec(layout=LayoutInfo("step_{rank}.json", JsonSerialization())),
    }
    config.storage_config = LocalFileSystemStorageConfig(use_direct_io=False)
    manager = config.build()
    manager.save(str(out / kind), state)
    manager.close()
whole = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in weights.items()}
if dist.get_rank() == 0:
    save_file({name: value.contiguous() for name, value in whole.items()}, out / "expected.safetensors")
dist.destroy_process_group()
