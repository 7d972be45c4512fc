"""Device mesh, process group, FSDP2/HSDP/DDP and gradient norms for PyTorch training."""

from am_mesh._context import SequenceShard, context_attention, shard_sequence
from am_mesh._dims import ParallelDims
from am_mesh._norm import clip_grad_norm_, grad_norm
from am_mesh._parallelize import parallelize
from am_mesh._process_group import process_group
from am_mesh._recompute import recompute
from am_mesh._reduce import sum_over
from am_mesh._shard import fully_shard, gradient_sync, replicate
from am_mesh._step import forward_backward
from am_mesh._tensor import TensorReport, tensor_parallel

__version__ = "0.1.0"

__all__ = [
    "ParallelDims",
    "SequenceShard",
    "TensorReport",
    "clip_grad_norm_",
    "context_attention",
    "forward_backward",
    "fully_shard",
    "grad_norm",
    "gradient_sync",
    "parallelize",
    "process_group",
    "recompute",
    "replicate",
    "shard_sequence",
    "sum_over",
    "tensor_parallel",
]
