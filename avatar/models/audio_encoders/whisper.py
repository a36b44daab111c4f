"""Whisper's encoder (arXiv:2212.04356).

Spectra are normalised over the full input of fixed length: 30 s, two spectra per position. A window is padded with
silence to that length, as in training. With `positions`, only the first positions are used: the cost falls in
proportion, but the input differs from training.

State t is centred on sample 320 t. Windows begin 160 samples after the start of their first frame, so that a frame has
exactly two states, centred on its halves.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import WhisperFeatureExtractor, WhisperModel

from avatar.errors import UserError
from avatar.models import hub
from avatar.types import SAMPLE_RATE, SAMPLES_PER_FRAME

STEP = 320  # samples per state
RATE = SAMPLES_PER_FRAME // STEP  # states per frame


class Whisper(hub.FrozenNetwork):
    """A speech network (see `windowed`): the states of all layers of a Whisper encoder.

    Args:
        weights: a folder, or a repository's name in the Hugging Face cache.
        positions: number of positions to use, at least two per frame of a window; None: all (1,500), as in training.

    Raises:
        MissingFileError: no weights.
        UserError: more positions than the network has, or a preprocessor config that does not fit the network.
    """

    margins = (-STEP // 2, STEP // 2)

    def __init__(self, weights: str, positions: int | None = None):
        super().__init__()
        path = hub.folder(weights, "openai/whisper-tiny")
        hub.file(path / "preprocessor_config.json", weights)
        self.net = hub.load(WhisperModel, path).encoder
        self.extractor = WhisperFeatureExtractor.from_pretrained(path, local_files_only=True)
        config = self.net.config
        limit = config.max_source_positions
        if positions is not None:
            if not 1 <= positions <= limit:
                raise UserError(f"got positions={positions} for {weights}; expected 1 to {limit}: change it")
            self.net.embed_positions = nn.Embedding.from_pretrained(self.net.embed_positions.weight[:positions])
            config.max_source_positions = positions
        self.positions = positions or limit
        self.width, self.depth = config.d_model, config.encoder_layers + 1
        if self.extractor.feature_size != config.num_mel_bins or self.extractor.sampling_rate != SAMPLE_RATE:
            raise UserError(
                f"{weights} computes {self.extractor.feature_size} mel bands at {self.extractor.sampling_rate} Hz; "
                f"expected {config.num_mel_bins} at {SAMPLE_RATE} Hz: download its preprocessor_config.json again"
            )

    def check(self, frames: int) -> None:
        """Raise UserError for windows longer than the positions."""
        if frames * RATE > self.positions:
            raise UserError(
                f"got windows of {frames} frames (past, hop and future); expected at most {self.positions // RATE} for "
                f"{self.positions} positions: shorten the past or raise positions"
            )

    def forward(self, windows: Float[Tensor, "n s"]) -> Float[Tensor, "n y t d"]:
        """States of windows that are shifted by the margins, without the states of the padding."""
        rows = list(windows.cpu().numpy())
        spectra = self.extractor(
            rows,
            sampling_rate=SAMPLE_RATE,
            max_length=self.positions * STEP,
            device=str(windows.device),
            return_tensors="pt",
        ).input_features
        states = self.net(spectra.to(windows), output_hidden_states=True).hidden_states
        return torch.stack(states, dim=1)[:, :, : windows.shape[1] // STEP]

    @property
    def fingerprint(self) -> str:
        """The weights and settings that features depend on."""
        return f"whisper({self.weights_hash},positions={self.positions})"
