"""Activation checkpointing: recompute the activations inside blocks in the backward pass instead of storing them."""

import functools
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from avatar.models.transforms.apply import blocks_of

# `selective` checkpointing stores the outputs of these operations: attention is the most expensive to recompute, and
# its output is no larger than other activations.
STORED = ("aten._scaled_dot_product",)


@dataclass(frozen=True)
class ActivationCheckpointing:
    """Transform: store only the inputs of each block, and recompute its activations in the backward pass.

    Args:
        selective: whether to store the outputs of attention too.

    Raises:
        UserError: the network has no blocks.
    """

    selective: bool = False

    def __call__(self, net: nn.Module) -> None:
        contexts = {"context_fn": functools.partial(create_selective_checkpoint_contexts, _store_attention)}
        for block in blocks_of(net):
            # Blocks draw no random numbers, so there is no RNG state to restore.
            block.forward = functools.partial(
                checkpoint,
                block.forward,
                use_reentrant=False,
                preserve_rng_state=False,
                **(contexts if self.selective else {}),
            )


def _store_attention(context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if str(operation).startswith(STORED) else CheckpointPolicy.PREFER_RECOMPUTE
