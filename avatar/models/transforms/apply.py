"""In-place model transforms applied before training: LoRA, activation checkpointing, torch.compile.

    python train.py transforms.net.lora='{_target_: avatar.models.transforms.lora.LoRA, rank: 64, alpha: 64}'

A transform is a callable that changes a network in place. Parameter names stay the same, except those of LoRA layers,
which `lora.merged` removes again. Sharding comes after all transforms (`avatar.objectives.sharding`).
"""

from collections.abc import Callable, Mapping

from torch import nn

from avatar.errors import UserError

Transform = Callable[[nn.Module], None]


def apply_transforms(module: nn.Module, transforms: Mapping[str, Mapping[str, Transform | None] | None]) -> None:
    """Apply transforms in place to the named children of a module, in the given order.

    Args:
        module: a training module; its children are the networks, such as `net` or `critic`.
        transforms: child name → transforms, named freely. None in place of either is skipped.

    Raises:
        UserError: there is no such child, or a transform doesn't support it.
    """
    children = dict(module.named_children())
    for name, by_name in transforms.items():
        chosen = [transform for transform in (by_name or {}).values() if transform is not None]
        if chosen and name not in children:
            raise UserError(
                f"got transforms.{name}; expected one of the networks {', '.join(children)}: rename or remove it"
            )
        for transform in chosen:
            transform(children[name])


def blocks_of(net: nn.Module) -> nn.ModuleList:
    """The transformer blocks of a backbone. Raises UserError for a network without blocks."""
    blocks = getattr(net, "blocks", None)
    if not isinstance(blocks, nn.ModuleList):
        raise UserError(
            f"a {type(net).__name__} has no blocks to transform; expected a backbone (VideoDiT): leave out transforms="
        )
    return blocks
