"""What is done to a network before it is trained, in place: adapters, recomputed activations, compiled blocks.

    python train.py transforms.net.lora='{_target_: avatar.models.transforms.LoRA, rank: 64, alpha: 64}'

A preparation is a callable that takes the network; names of weights stay what they are, but for the adapters', which
`merged` takes away again. Sharding comes after all of them (`avatar.objectives.sharding`).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from avatar.errors import UserError
from avatar.nn.masks import FullView, MaskView
from avatar.nn.rope import Rotation
from avatar.protocols import View

Preparation = Callable[[nn.Module], None]

# What `selective` checkpointing keeps: attention costs most to do again, and its result is as small as any other.
KEPT = ("aten._scaled_dot_product",)

GRAPHS = 64  # that may be compiled; beyond torch's own bound, 8, it would go on without a compiler, and hardly say so


def apply_transforms(networks: nn.Module, by: Mapping[str, Mapping[str, Preparation | None] | None]) -> None:
    """Prepare the named networks among a module's children, each by its preparations in their order; None is none.

    Raises:
        UserError: there is no such network.
    """
    children = dict(networks.named_children())
    for name, preparations in by.items():
        chosen = [preparation for preparation in (preparations or {}).values() if preparation is not None]
        if chosen and name not in children:
            raise UserError(f"transforms.{name}: the networks here are {', '.join(children)}; name one of them")
        for preparation in chosen:
            preparation(children[name])


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters of linear layers, by peft; everything else is frozen (arXiv:2106.09685).

    Args:
        rank: of the update B A of each layer.
        alpha: the update counts alpha / rank.
        targets: ends of the names of the layers.
        learned: beginnings of the names of what is trained whole beside them: what public weights lack.
    """

    rank: int
    alpha: int
    targets: Sequence[str] = ("q", "k", "v", "out", "ffn.0", "ffn.2")
    learned: Sequence[str] = ()

    def __call__(self, net: nn.Module) -> None:
        from peft import LoraConfig, inject_adapter_in_model  # takes seconds to import

        _blocks(net)  # which refuses what is no backbone
        config = LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=list(self.targets))
        inject_adapter_in_model(config, net)
        for name, parameter in net.named_parameters():
            if name.startswith(tuple(self.learned)):
                parameter.requires_grad_(True)


@dataclass(frozen=True)
class ActivationCheckpointing:
    """Activations inside blocks are computed again in the backward pass instead of being kept.

    Args:
        selective: keep what attention gave, and do the rest again.
        every: of so many blocks, one is checkpointed.
    """

    selective: bool = False
    every: int = 1

    def __call__(self, net: nn.Module) -> None:
        contexts = {"context_fn": functools.partial(create_selective_checkpoint_contexts, _keep_attention)}
        for block in _blocks(net)[:: self.every]:
            # Blocks draw no random numbers whose state would have to be kept.
            block.forward = functools.partial(
                checkpoint,
                block.forward,
                use_reentrant=False,
                preserve_rng_state=False,
                **(contexts if self.selective else {}),
            )


@dataclass(frozen=True)
class Compiled:
    """Each block compiled by itself, for passes over whole clips: what one costs to compile serves all.

    A rollout's passes stay as they are: what they cache differs from block to block and chunk to chunk, and each would
    be compiled anew. Weights keep their names.

    The arguments are those of torch.compile.
    """

    mode: str | None = None
    dynamic: bool | None = None
    backend: str = "inductor"

    def __call__(self, net: nn.Module) -> None:
        # All blocks are one code to torch, and each length and size of clips, with gradients or without, is a graph.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
        for block in _blocks(net):
            # Not block.compile(), which finds a recomputed forward beneath it and leaves that as it is.
            fast = torch.compile(block.forward, mode=self.mode, dynamic=self.dynamic, backend=self.backend)
            block.forward = _on_whole_clips(fast, block.forward)


def merged(net: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a network, or an average of them, with its adapters added to the layers that they adapt."""
    adapted: dict[str, Any] = {name: layer for name, layer in net.named_modules() if hasattr(layer, "lora_A")}
    plain = {name: weight for name, weight in weights.items() if not _of_any(name, adapted)}
    for name, layer in adapted.items():
        for part in ("weight", "bias"):
            if (own := weights.get(f"{name}.base_layer.{part}")) is not None:
                plain[f"{name}.{part}"] = own
        for adapter, scaling in layer.scaling.items():
            a, b = (weights[f"{name}.lora_{letter}.{adapter}.weight"] for letter in "AB")
            plain[f"{name}.weight"] = plain[f"{name}.weight"] + scaling * (b @ a)
    return plain


def _on_whole_clips(fast: Callable[..., Tensor], plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(x: Tensor, time: Tensor, text: Any, audio: Any, view: View, rotation: Rotation) -> Tensor:
        chosen = fast if isinstance(view, MaskView | FullView) else plain
        return chosen(x, time, text, audio, view, rotation)

    return forward


def _blocks(net: nn.Module) -> nn.ModuleList:
    blocks = getattr(net, "blocks", None)
    if not isinstance(blocks, nn.ModuleList):
        raise UserError(f"a {type(net).__name__} has no blocks to transform, as backbones have; leave out transforms=")
    return blocks


def _of_any(name: str, layers: Mapping[str, Any]) -> bool:
    return any(name.startswith(f"{layer}.") for layer in layers)


def _keep_attention(context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if str(operation).startswith(KEPT) else CheckpointPolicy.PREFER_RECOMPUTE
