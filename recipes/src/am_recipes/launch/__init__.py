"""Starting a run: on this machine, on several, or through a scheduler that is told what to start.

`local` runs ranks through torchrun. A scheduler (`LAUNCHERS`, by the section of the config that asks for it) turns a
`Job` into files and a command of its own; what it starts on each machine is `local` again.
"""

from __future__ import annotations

from am_recipes.launch.local import as_worker, run, torchrun_arguments, worst_status
from am_recipes.launch.nodes import PREEMPTED, Nodes
from am_recipes.launch.nodes import parse as parse_nodes

__all__ = ["PREEMPTED", "Nodes", "as_worker", "parse_nodes", "run", "torchrun_arguments", "worst_status"]
