"""Low-rank adapters (LoRA, arXiv:2106.09685) of linear layers, by peft, and merging them into the weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from avatar.models.transforms.apply import blocks_of


@dataclass(frozen=True)
class LoRA:
    """Transform: add low-rank adapters to linear layers and freeze all other parameters (arXiv:2106.09685).

    Args:
        rank: rank of the update B A of each layer.
        alpha: the update is scaled by alpha / rank.
        targets: suffixes of the names of the adapted layers.
        learned: prefixes of the names of parameters that are trained in full, such as layers that Wan lacks.

    Raises:
        UserError: the network has no blocks.
    """

    rank: int
    alpha: int
    targets: Sequence[str] = ("q", "k", "v", "out", "ffn.0", "ffn.2")
    learned: Sequence[str] = ()

    def __call__(self, net: nn.Module) -> None:
        from peft import LoraConfig, inject_adapter_in_model  # the import takes seconds

        blocks_of(net)  # raises for anything but a backbone
        config = LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=list(self.targets))
        inject_adapter_in_model(config, net)
        for name, parameter in net.named_parameters():
            if name.startswith(tuple(self.learned)):
                parameter.requires_grad_(True)


def merged(net: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights with every adapter added to its layer: W + alpha / rank B A, under the names of a network without LoRA.

    Args:
        net: the network, with or without adapters.
        weights: its state dict, or an average of its state dicts.
    """
    adapted: dict[str, Any] = {name: layer for name, layer in net.named_modules() if hasattr(layer, "lora_A")}
    plain = {name: weight for name, weight in weights.items() if not _inside_any(name, adapted)}
    for name, layer in adapted.items():
        for part in ("weight", "bias"):
            if (base := weights.get(f"{name}.base_layer.{part}")) is not None:
                plain[f"{name}.{part}"] = base
        for adapter, scaling in layer.scaling.items():
            a, b = (weights[f"{name}.lora_{letter}.{adapter}.weight"] for letter in "AB")
            plain[f"{name}.weight"] = plain[f"{name}.weight"] + scaling * (b @ a)
    return plain


def _inside_any(name: str, layers: Mapping[str, Any]) -> bool:
    return any(name.startswith(f"{layer}.") for layer in layers)
