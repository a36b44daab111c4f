"""Networks whose weights, gradients and optimiser states are shared out among the ranks (FSDP2).

Each network is a root of its own and each of its blocks a unit, so that student, critic and teacher gather one block at
a time. Blocks are gathered for their pass and freed after it.
"""

import lightning
from torch.distributed.fsdp import FSDPModule, fully_shard


def shard_networks(module: lightning.LightningModule) -> None:
    """Shard the networks of a training module under a strategy that has a mesh of ranks; under another do nothing.

    For `configure_model`, which may be called twice.
    """
    if module.device_mesh is None:
        return
    mesh = module.device_mesh["data_parallel"]
    for net in module.children():
        if isinstance(net, FSDPModule):
            continue
        for block in net.blocks:  # pyright: ignore[reportGeneralTypeIssues]
            fully_shard(block, mesh=mesh)
        fully_shard(net, mesh=mesh)
