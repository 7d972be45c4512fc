"""Muon for hidden matrices and AdamW for all else, as one optimizer, right on sharded parameters.

Muon (K. Jordan, https://kellerjordan.github.io/posts/muon/) steps along the orthogonalised momentum of a matrix, which
needs the whole matrix. `torch.optim.Muon` runs its bfloat16 Newton-Schulz iteration on the shards themselves: measured
on FSDP2 (torch 2.15, 2 gloo ranks, 3 steps) the weights end up to 1.1e-2 of their maximum away from those of one
process, after 15 collectives a matrix and step; with an empty shard (3 rows on 4 ranks) it raises. Here each matrix's
update is gathered once and torch's own Muon orthogonalises it whole, on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


class MuonWithAdamW(torch.optim.Optimizer):
    """The groups of a `torch.optim.Muon` and of a `torch.optim.AdamW` in one `param_groups`, one `state`.

    `group["algorithm"]` is "muon" or "adamw"; the other options and the state of a parameter (`momentum_buffer`;
    `step, exp_avg, exp_avg_sq`) are those of the torch class, sharded as the parameter is. `defaults["lr"]` is
    Muon's rate. The update is that of the torch classes on one process: of Muon within float32 rounding.
    It is the same for any layout given the same gradients. Gradients summed in another order are not the same: as they
    are rounded to bfloat16, noise of 1e-7 in them moves single entries by 1e-2 of the step (torch's Muon too, measured
    on a 512 x 1024 matrix after 3 steps), which is 7e-4 of the largest weight.

    Every rank of a parameter's mesh calls `step`, with the same parameters having a gradient: a sharded matrix takes
    one all-gather in bfloat16, one matrix at a time; the orthogonalisation runs on each rank that holds a part.

    Args:
        muon: gives its groups, and is not needed afterwards; 2-D parameters, plain or DTensors of any placements.
        adamw: None where all parameters are Muon's.
    """

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW | None) -> None:
        for group in muon.param_groups:
            group["algorithm"] = "muon"
        others = [] if adamw is None else adamw.param_groups
        for group in others:
            group["algorithm"] = "adamw"
        super().__init__([*muon.param_groups, *others], {"lr": muon.defaults["lr"]})
        self.adamw = adamw

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; `closure`, if given, is called first and its loss returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["algorithm"] == "muon":
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        _muon_step(parameter, self.state[parameter], group)
        if self.adamw is not None:
            # Linked at every step: load_state_dict replaces both the groups and the state.
            self.adamw.param_groups = [group for group in self.param_groups if group["algorithm"] == "adamw"]
            self.adamw.state = self.state
            self.adamw.step()
        return loss


def _muon_step(parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    grad, momentum = parameter.grad, group["momentum"]
    assert grad is not None
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
    buffer = state["momentum_buffer"]
    buffer.lerp_(grad, 1 - momentum)
    update = grad.lerp(buffer, momentum) if group["nesterov"] else buffer
    # Newton-Schulz starts by rounding to bfloat16; rounding before the gather gives the same bits for half the bytes.
    update = update.bfloat16()
    if isinstance(parameter, DTensor):
        assert isinstance(update, DTensor)
        mesh, whole = parameter.device_mesh, [Replicate()] * parameter.device_mesh.ndim
        change = _orthogonal_step(update.full_tensor(), group)
        change = DTensor.from_local(change, mesh, whole, run_check=False).redistribute(mesh, parameter.placements)
    else:
        change = _orthogonal_step(update, group)
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    parameter.add_(change)


def _orthogonal_step(update: Tensor, group: dict[str, Any]) -> Tensor:
    """What torch's Muon adds to a matrix whose momentum update is `update [rows, columns]`; float32.

    A step without momentum or decay from zero weights is that: no private function of torch, nor a copy of one.
    """
    change = torch.nn.Parameter(torch.zeros_like(update, dtype=torch.float32))
    change.grad = update.float()
    options = {name: group[name] for name in ("lr", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")}
    torch.optim.Muon([change], momentum=0.0, nesterov=False, weight_decay=0.0, **options).step()
    return change.detach()
