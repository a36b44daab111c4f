"""Fully sharded data parallelism (FSDP2) of the networks of a training module.

Each network is an FSDP root and each of its blocks a unit, so that student, critic and teacher gather one block at a
time and free it after its pass.
"""

import lightning
from torch.distributed.fsdp import FSDPModule, fully_shard


def shard_networks(module: lightning.LightningModule) -> None:
    """Shard the networks of a training module under a strategy with a device mesh; under others do nothing.

    Called by `configure_model`, possibly twice.
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
