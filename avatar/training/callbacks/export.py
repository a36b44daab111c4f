"""Export of a bundle at the end of a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch

from avatar.errors import UserError
from avatar.models import bundle, registry
from avatar.models.transforms.lora import merged
from avatar.objectives.distributed import gather_state_dict
from avatar.training.callbacks.ema import EMA
from avatar.types import Bundle

PRECISIONS = {"float32": torch.float32, "float16": torch.float16}


class Export(lightning.Callback):
    """Writes `module.net` as a bundle at the end of a run, with EMA weights if there are any.

    Args:
        path: the .safetensors file to write.
        kind: the kind of bundle, one of `bundle.KINDS`.
        config: the configs of the encoders that the network is used with (`audio`, `text`, `image`).
        plan: the rollout plan that the network was trained for, or None.
        precision: the dtype of trained weights, float32 or float16 (half the size).

    Raises:
        UserError: an unknown precision, or an encoder without a registered name; before the run starts.
    """

    def __init__(self, path: str, kind: str, config: Mapping[str, Any], plan: Mapping[str, Any] | None, precision: str):
        if precision not in PRECISIONS:
            raise UserError(f"precision={precision}; expected one of {', '.join(PRECISIONS)}")
        self.path, self.kind = Path(path), kind
        self.config, self.plan = registry.registered(config), bundle.plain_plan(plan)
        self.precision = PRECISIONS[precision]

    def on_fit_end(self, trainer: Any, module: Any) -> None:
        averages = [
            callback.weights for callback in trainer.callbacks if isinstance(callback, EMA) and callback.weights
        ]
        own = gather_state_dict(averages[0] if averages else module.net.state_dict())
        if not trainer.is_global_zero:
            return
        weights = merged(module.net, own)
        # Buffers and frozen weights keep their dtype: statistics may overflow float16, fingerprints must not change.
        learned = {name for name, parameter in module.net.named_parameters() if parameter.requires_grad}
        learned |= weights.keys() - own.keys()
        weights = {name: w.to(self.precision) if name in learned else w for name, w in weights.items()}
        components = bundle.origin_of(module.net).components
        if self.kind != "autoencoder":
            data = trainer.datamodule
            components = {"autoencoder": bundle.origin_of(data.autoencoder).fingerprint}
            components |= bundle.encoder_fingerprints({part: getattr(data, part) for part in bundle.ENCODERS})
        config = {**self.config, "network": bundle.origin_of(module.net).network}
        bundle.write(Bundle(self.kind, weights, config, components, self.plan), self.path)
