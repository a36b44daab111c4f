"""wav2vec 2.0 (arXiv:2006.11477) and HuBERT (arXiv:2106.07447), which have the same architecture.

The convolutions have a receptive field of `field` samples and a stride of `step`: 400 and 320. Windows are padded by
half of the difference at each end, so that a frame of 640 samples has exactly two states, centred on its halves;
without the padding, f frames would have 2 f - 1 states.
"""

import json
import math

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import HubertModel, Wav2Vec2FeatureExtractor, Wav2Vec2Model

from avatar.errors import UserError
from avatar.models import hub
from avatar.types import SAMPLE_RATE, SAMPLES_PER_FRAME

NETWORKS = {"wav2vec2": Wav2Vec2Model, "hubert": HubertModel}


class Wav2Vec2(hub.FrozenNetwork):
    """A speech network (see `windowed`): the states of all layers of a wav2vec 2.0 or a HuBERT.

    Args:
        weights: a folder, or a repository's name in the Hugging Face cache.

    Raises:
        MissingFileError: no weights.
        UserError: weights of another kind of network, or states that do not fit frames of 640 samples.
    """

    def __init__(self, weights: str):
        super().__init__()
        path = hub.folder(weights, "facebook/wav2vec2-base-960h")
        hub.file(path / "preprocessor_config.json", weights)
        kind = json.loads(hub.file(path / "config.json", weights).read_text()).get("model_type")
        if kind not in NETWORKS:
            raise UserError(f"{weights} is a {kind}; expected a {' or '.join(NETWORKS)}: pass weights of one")
        self.net, self.kind = hub.load(NETWORKS[kind], path), kind
        self.extractor = Wav2Vec2FeatureExtractor.from_pretrained(path, local_files_only=True)
        config = self.net.config
        self.width, self.depth = config.hidden_size, config.num_hidden_layers + 1
        step = math.prod(config.conv_stride)
        strides = [math.prod(config.conv_stride[:layer]) for layer in range(len(config.conv_stride))]
        field = 1 + sum((size - 1) * stride for size, stride in zip(config.conv_kernel, strides, strict=True))
        if SAMPLES_PER_FRAME % step or self.extractor.sampling_rate != SAMPLE_RATE:
            raise UserError(
                f"{weights} has a stride of {step} samples at {self.extractor.sampling_rate} Hz; expected a divisor of "
                f"{SAMPLES_PER_FRAME}, the samples of a frame at {SAMPLE_RATE} Hz: pass other weights"
            )
        self.margins = ((field - step) // 2, math.ceil((field - step) / 2))

    def check(self, frames: int) -> None:
        """Accept windows of any length."""

    def forward(self, windows: Float[Tensor, "n s"]) -> Float[Tensor, "n y t d"]:
        """States of windows that include their margins; each window is normalised by itself, as in training."""
        rows = list(windows.cpu().numpy())
        samples = self.extractor(rows, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_values
        return torch.stack(self.net(samples.to(windows), output_hidden_states=True).hidden_states, dim=1)

    @property
    def fingerprint(self) -> str:
        """The weights and settings that features depend on."""
        return f"{self.kind}({self.weights_hash},normalise={self.extractor.do_normalize})"
