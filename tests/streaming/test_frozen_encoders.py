"""Frozen speech and text networks: preprocessed, training and streamed features are equal."""

from pathlib import Path

import numpy as np
import pytest
import torch

from avatar.data.batch_schedule import UNIFORM
from avatar.data.bucketing import LengthBuckets
from avatar.data.preprocess.encoding import Encoders
from avatar.data.shard_index import Filters
from avatar.data.shards import ShardClips
from avatar.diffusion.plan import Plan
from avatar.diffusion.rollout import Noise, generate
from avatar.models.audio_encoders.wav2vec2 import Wav2Vec2
from avatar.models.audio_encoders.windowed import WindowedEncoder
from avatar.models.autoencoders.causal_conv import CausalConvAutoencoder
from avatar.models.bundle import Origin
from avatar.models.text_encoders.bytes import ByteTokenizer
from avatar.models.text_encoders.umt5 import UMT5
from avatar.nn.masks import MaskSpec, mask_view
from avatar.streaming.audio_window import AudioWindow
from avatar.streaming.session import Session
from avatar.types import SAMPLES_PER_FRAME, Batch, Conditioning, join
from tests.conftest import make_net
from tests.data.shard_sets import autoencoder, flac, sample, write_set
from tests.models import speech_networks

STRIDE, FRAMES = 4, 33
LATENT = STRIDE * SAMPLES_PER_FRAME


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> WindowedEncoder:
    torch.manual_seed(1)
    weights = speech_networks.wav2vec2(tmp_path_factory.mktemp("wav2vec2"))
    return WindowedEncoder(Wav2Vec2(weights), past=6, future=1, hop_frames=4, left_context=2)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> UMT5:
    torch.manual_seed(1)
    return UMT5(speech_networks.umt5(tmp_path_factory.mktemp("umt5")), max_tokens=6)


def net_for(encoder: WindowedEncoder, **changes):
    sizes = {"audio_features": encoder.dim, "audio_tokens": encoder.tokens(STRIDE), "audio_layers": 3}
    return make_net(patch=1, **sizes, **changes)


@torch.no_grad()
def test_a_session_gives_the_same_frames_for_every_cut(encoder):
    net, plan, speech = net_for(encoder, channels=4), Plan((1.0,), chunk=2, first_chunk=1, window=4), torch.randn(4800)
    decoder = CausalConvAutoencoder(channels=4, widths=(8, 8)).eval()
    decoder.origin = Origin({})  # as loaded ones have
    portrait = torch.rand(1, 3, 1, 16, 16)

    def stream_clip(packet: int) -> torch.Tensor:
        session = Session(net, decoder, encoder, ByteTokenizer(16), plan, portrait, seed=3)
        return torch.cat([*(session.push(part) for part in speech.split(packet)), session.finish()], dim=1)

    full = stream_clip(len(speech))
    assert full.shape[1] == 8 and torch.equal(stream_clip(700), full)
    windows = AudioWindow(encoder, STRIDE)
    streamed = torch.cat([windows.push(speech), windows.push(torch.zeros(windows.samples_needed(3) - len(speech)))])
    cond = conditioning(decoder.encode(portrait), streamed)
    made = generate(net, cond, plan, Noise((3,))).latents
    expected = decoder.decode(torch.cat([cond.reference, made], dim=2))[0, :, 1:]
    torch.testing.assert_close(full, expected[:, :8], rtol=1e-4, atol=1e-4)


def conditioning(reference: torch.Tensor, own: torch.Tensor) -> Conditioning:
    ids, mask = ByteTokenizer(16).encode([""])
    unspecified = torch.zeros(1, len(own), dtype=torch.long)
    return Conditioning(
        reference=reference,
        audio=torch.stack([own, own * 0])[None],
        audio_mask=torch.tensor([[True], [False]]).expand(2, len(own))[None],
        text=ids[None],
        text_mask=mask[None],
        text_event=unspecified,
        state=unspecified,
        emotion=unspecified,
        emotion_intensity=unspecified.float(),
        gesture=unspecified,
    )


def speech(key: str) -> np.ndarray:
    """Noise after a silent first frame, which precedes the timeline, as silence precedes a stream."""
    samples = np.random.default_rng(len(key)).integers(-3000, 3000, FRAMES * SAMPLES_PER_FRAME).astype(np.int16)
    samples[:SAMPLES_PER_FRAME] = 0
    return samples


def batch_of(folder: Path, audio, text) -> Batch:
    """A batch of one complete clip."""
    module = ShardClips(
        [str(folder)],
        "train",
        "dev",
        Filters(None, "keep"),
        None,
        autoencoder(),
        audio,
        text,
        None,
        2,
        {"face": 0.0, "lips": 0.0},
        LengthBuckets((8,), (1.0,), 8),
        UNIFORM,
        "raise",
        1,
        1,
        0,
    )
    module.setup("fit")
    return next(iter(module.train_dataloader()))


@pytest.mark.parametrize("preprocessed", [False, True])
def test_training_features_equal_streamed_ones_and_the_mix_is_trained(encoder, text, tmp_path, preprocessed):
    def make(key, *of):
        files = sample(key, *of) | {"audio.flac": flac(speech(key)), "txt": "a happy cat"}
        if preprocessed:  # surrounded by silent frames of the source
            around = np.pad(speech(key).astype(np.float32) / 2**15, 20 * SAMPLES_PER_FRAME)
            Encoders(audio=encoder, text=text).write(
                tmp_path / key, None, tmp_path, around, slice(20, 20 + FRAMES), "a happy cat"
            )
            files |= {f"{name}.npy": np.load(tmp_path / f"{key}.{name}.npy") for name in ("afeat", "text")}
            files["meta.json"] |= {"audio_features": encoder.fingerprint, "text_features": text.fingerprint}
        return files

    folder = write_set(tmp_path / "set", {"train": 1, "dev": 1}, frames=(FRAMES,), shards=1, make=make)
    batch = batch_of(folder, encoder, text)
    cond, key = batch.conditioning, batch.keys[0].split("@")[0]
    windows = AudioWindow(encoder, STRIDE)
    streamed = windows.push(torch.from_numpy(speech(key).astype(np.float32) / 2**15)[SAMPLES_PER_FRAME:])
    known = cond.audio_mask[0, 0]
    assert known.tolist() == [True] * 7 + [preprocessed]  # the last latent needs a frame after the end of the clip
    # In a clip, the silent frame before the timeline has features of its own, which depend on the audio after it.
    past = encoder.left_context
    torch.testing.assert_close(cond.audio[0, 0, :7, past:], streamed[:7, past:], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(cond.audio[0, 0, 1:7], streamed[1:7], rtol=2e-3, atol=2e-3)
    features, mask = text.encode(["a happy cat"])
    torch.testing.assert_close(cond.text[0], features, rtol=2e-3, atol=2e-3)
    assert torch.equal(cond.text_mask[0], mask)

    net = net_for(encoder, channels=batch.latents.shape[1])
    ids, mask = ByteTokenizer(16).encode(["a cat"])
    cond.text, cond.text_mask = ids[None], mask[None]
    x = torch.cat([cond.reference, batch.latents], dim=2)
    view = mask_view(MaskSpec((8,)), net.tokens(1, 1), torch.device("cpu"))
    net(x, torch.rand(1, 9), join([cond.blank(1), cond], "l"), view).square().mean().backward()
    assert net.audio.mix.weights.grad.abs().min() > 0
