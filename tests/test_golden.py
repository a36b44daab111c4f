"""Golden values: ten losses of each objective and a stream of the shipped weights, in float64 on the CPU.

A refactoring leaves them unchanged. Store them again by

    python -m tests.test_golden --store

only when numerics change on purpose, with the reason in CHANGELOG.md.
"""

import functools
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor

from avatar import types
from avatar.conditioning import dropout
from avatar.diffusion import guidance, packing, plan, timesteps
from avatar.media import decode
from avatar.media import frames as media_frames
from avatar.models import bundle, video_dit
from avatar.models.autoencoders import causal_conv, distilled
from avatar.nn import embeddings
from avatar.objectives import autoencoder, consistency, decoder_distillation, dmd, flow_matching, optim, weighting
from avatar.streaming import session
from avatar.training import fit
from avatar.training.callbacks import ema

ROOT = Path(__file__).parents[1]
FOLDER = Path(__file__).parent / "golden"
TOLERANCE = 1e-6  # relative; float64 rounding errors are about 1e-12
STEPS, BATCH, LATENTS, EVENTS, SIZE = 10, 2, 5, 2, 4
CHANNELS, FEATURES, AUDIO_TOKENS, IMAGE_FEATURES, MASKS = 3, 6, 2, 5, 4
PROJECTIONS = 8

Values = dict[str, list[float]]

HARMLESS = (*fit.IGNORED_WARNINGS, ".*have no `val_dataloader`")
pytestmark = [pytest.mark.filterwarnings(f"ignore:{message}") for message in HARMLESS]


@contextmanager
def float64() -> Iterator[None]:
    """Makes float64 the default dtype of the block: of weights, noise and timesteps."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# Networks


def filled(net: Any, seed: int, scale: float = 0.3) -> Any:
    """Draw every trained parameter again, zero-initialised ones included, in the order of shapes, not of names."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sorted(net.parameters(), key=lambda parameter: tuple(parameter.shape)):
            if parameter.requires_grad:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return net


def backbone(seed: int) -> video_dit.VideoDiT:
    """A tiny backbone with all input embedders."""
    net = video_dit.VideoDiT(
        channels=CHANNELS,
        dim=24,
        ffn=32,
        heads=2,
        layers=2,
        patch=2,
        audio_features=FEATURES,
        audio_tokens=AUDIO_TOKENS,
        audio_layers=2,
        extra_in_channels=MASKS + CHANNELS,
        flow_map=True,
        guidance_embedding=True,
        text=embeddings.ByteTextEncoder(24, width=8, layers=1, max_bytes=16),
        image=embeddings.ImageProjection(IMAGE_FEATURES, 24),
    )
    return filled(net, seed)


def pixel_autoencoder(seed: int, scale: float = 0.1) -> causal_conv.CausalConvAutoencoder:
    """A tiny autoencoder of pixels, with an origin like that of a trained one."""
    kind = causal_conv.CausalConvAutoencoder
    net = bundle.new({"_target_": f"{kind.__module__}.{kind.__qualname__}", "channels": 4, "widths": [6, 8]})
    net.origin = replace(net.origin, kind="autoencoder")
    return filled(net, seed, scale)


def small_decoder(teacher: causal_conv.CausalConvAutoencoder, scale: float = 0.1) -> distilled.DistilledAutoencoder:
    return filled(distilled.new_distilled(teacher, 4), 2, scale)


# Batches


def conditioning(generator: torch.Generator) -> types.Conditioning:
    """Random conditioning with all fields set."""
    b, l = BATCH, LATENTS
    randn, rand = (functools.partial(draw, generator=generator) for draw in (torch.randn, torch.rand))
    randint = functools.partial(torch.randint, generator=generator)
    return types.Conditioning(
        reference=randn(b, CHANNELS, 1, SIZE, SIZE),
        audio=randn(b, len(types.ROLES), l, AUDIO_TOKENS, FEATURES),
        audio_mask=rand(b, len(types.ROLES), l) > 0.3,
        text=randint(3, 259, (b, EVENTS, 6)),
        text_mask=rand(b, EVENTS, 6) > 0.3,
        text_event=randint(-1, EVENTS, (b, l)),
        state=randint(0, len(types.STATES), (b, l)),
        emotion=randint(0, len(types.EMOTIONS), (b, l)),
        emotion_intensity=rand(b, l),
        gesture=randint(0, len(types.GESTURES), (b, l)),
        image=randn(b, 3, IMAGE_FEATURES),
        concat_latents=randn(b, MASKS + CHANNELS, l, SIZE, SIZE),
    )


def latent_batch(seed: int) -> types.Batch:
    generator = torch.Generator().manual_seed(seed)
    return types.Batch(
        latents=torch.randn(BATCH, CHANNELS, LATENTS, SIZE, SIZE, generator=generator),
        conditioning=conditioning(generator),
        regions=torch.rand(BATCH, len(types.REGIONS), LATENTS, SIZE, SIZE, generator=generator),
        keys=["a", "b"],
    )


def pixel_batch(seed: int) -> types.Frames:
    generator = torch.Generator().manual_seed(seed)
    rand = functools.partial(torch.rand, generator=generator)
    return types.Frames(
        video=2 * rand(BATCH, 3, 9, 16, 16) - 1,
        reference=2 * rand(BATCH, 3, 1, 16, 16) - 1,
        regions=rand(BATCH, len(types.REGIONS), 9, 16, 16),
        keys=["a", "b"],
    )


# Objectives

ADAMW = functools.partial(torch.optim.AdamW, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.01)
REGION_WEIGHTS = weighting.RegionWeights(face=0.5, lips=4.0)
MIN_SNR = weighting.MinSNR(2.0)
GUIDANCE = guidance.Guidance(audio=2.0, text=1.5, labels=1.5)
PLAN = plan.Plan((1.0, 0.75), chunk=2, first_chunk=1, window=3)


def make_autoencoder() -> lightning.LightningModule:
    return autoencoder.AutoencoderTraining(
        pixel_autoencoder(1), ADAMW, noise=0.1, region_weights=REGION_WEIGHTS, schedule=optim.WarmupDecay(STEPS)
    )


def make_decoder_distillation() -> lightning.LightningModule:
    teacher = pixel_autoencoder(1)
    return decoder_distillation.DecoderDistillation(
        small_decoder(teacher),
        teacher,
        ADAMW,
        noise=0.1,
        region_weights=REGION_WEIGHTS,
        schedule=optim.WarmupDecay(STEPS),
    )


class IndependentDropout(dropout.Dropout):
    """Independent dropout of each modality, with which the losses were stored."""

    def __call__(self, cond, uniform):
        b, device = len(cond.reference), cond.reference.device
        return cond.without(**{name: uniform(b, device=device) < 0.3 for name in dropout.MODALITIES})


def make_flow_matching(pattern: packing.AttentionPattern) -> lightning.LightningModule:
    return flow_matching.FlowMatching(
        backbone(1),
        pattern,
        timesteps.LogitNormal(mean=0.2, std=1.1, shift=2.0),
        IndependentDropout(),
        ADAMW,
        region_weights=REGION_WEIGHTS,
        weighting=MIN_SNR,
        schedule=optim.WarmupDecay(STEPS),
    )


def make_consistency() -> lightning.LightningModule:
    return consistency.Consistency(
        backbone(1),
        backbone(2),
        packing.TeacherForced(PLAN),
        GUIDANCE,
        discretisation=8,
        shift=2.0,
        optimizer=ADAMW,
        region_weights=REGION_WEIGHTS,
        weighting=MIN_SNR,
        schedule=optim.WarmupDecay(STEPS),
    )


def make_dmd() -> lightning.LightningModule:
    return dmd.DistributionMatching(
        backbone(1),
        backbone(2),
        backbone(3),
        PLAN,
        GUIDANCE,
        timesteps.ShiftedUniform(shift=2.0, low=0.02, high=0.98),
        critic_steps=1,  # losses of critic and student take turns
        accumulate=1,
        clip=1.0,
        gradient="exit_step",
        optimizer=ADAMW,
        critic_optimizer=ADAMW,
        region_weights=REGION_WEIGHTS,
        critic_weighting=MIN_SNR,
        schedule=optim.Constant(),
    )


OBJECTIVES: Mapping[str, tuple[Callable[[], lightning.LightningModule], Callable[[int], object]]] = {
    "autoencoder": (make_autoencoder, pixel_batch),
    "decoder_distillation": (make_decoder_distillation, pixel_batch),
    "flow_matching": (lambda: make_flow_matching(packing.Bidirectional()), latent_batch),
    "teacher_forcing": (lambda: make_flow_matching(packing.TeacherForced(PLAN)), latent_batch),
    "consistency": (make_consistency, latent_batch),
    "dmd": (make_dmd, latent_batch),
}


def recorded(module: lightning.LightningModule) -> list[float]:
    """Replace the logger of a module by a list, which collects all logged losses; return the list."""
    losses = []

    def log(name: str, value: Tensor, **_) -> None:
        if "loss" in name:
            losses.append(value.item())

    module.log = log
    module.log_dict = lambda values, **_: [log(name, value) for name, value in values.items()]
    return losses


def losses_of(name: str) -> Values:
    """The losses of ten training steps, and the norm of the averaged weights after them."""
    make, batch = OBJECTIVES[name]
    with float64():
        module = make()
        # Replaces the initialisation from principal components, whose signs are arbitrary; `starts` tests that.
        module.on_train_start = lambda: torch.manual_seed(0)
        losses, average = recorded(module), ema.EMA(decay=0.5)
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=1,
            gradient_clip_val=1.0 if module.automatic_optimization else None,
            callbacks=[average],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        # With a generator, since otherwise the loader draws its seed from the global one.
        batches = [batch(seed) for seed in range(STEPS)]
        trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None, generator=torch.Generator()))
        norm = sum(weight.square().sum().item() for weight in average.weights.values()) ** 0.5
    return {name: losses, f"{name}: norm of the average": [norm]}


def starts() -> Values:
    """Reconstruction errors of the autoencoder and of the small decoder after their initialisation.

    Convolutions are zero: with linear maps alone, the signs of principal components don't matter.
    """
    with float64(), torch.no_grad():
        video = torch.cat([pixel_batch(seed).video for seed in range(4)])
        net = pixel_autoencoder(1, scale=0.0).eval()
        net.start_from(video)
        linear = (net.decode(net.encode(video)) - video).square().mean()
        teacher = pixel_autoencoder(1).eval()
        latents = teacher.encode(video)
        student, target = small_decoder(teacher, scale=0.0).eval(), teacher.decode(latents)
        student.start_from(latents, target)
        least_squares = (student.decode(latents) - target).square().mean()
    return {"principal components": [linear.item()], "least squares": [least_squares.item()]}


# Stream


def stream() -> Values:
    """Fixed projections of the frames of a two-second stream; the second one has an emotion and another voice."""
    with float64():
        student, pixels = (
            bundle.load(str(ROOT / "data" / "nano" / f"{name}.safetensors")).double()
            for name in ("student", "autoencoder")
        )
        origin = bundle.origin_of(student)
        image, _ = decode.read_image(ROOT / "data" / "samples" / "portrait.png", size=64)
        portrait = media_frames.from_uint8(image[None])[None].double()
        speech = torch.from_numpy(decode.read_audio(ROOT / "data" / "samples" / "hello.wav")).double()
        speech = speech[: 2 * types.SAMPLE_RATE]
        other = 0.5 * speech.flip(0)
        opened = session.Session(
            student,
            pixels,
            origin.build_encoder("audio"),
            origin.build_encoder("text"),
            plan.plan_of(origin.plan, {}),
            portrait,
            seed=1,
            prompt="a calm person is speaking",
        )
        opened.set_state("speaking")
        first, second = slice(types.SAMPLE_RATE), slice(types.SAMPLE_RATE, None)
        parts = [opened.push(speech[first])]
        opened.set_emotion("happy", 0.8)
        parts += [opened.push(speech[second], other[second]), opened.finish()]
        frames = torch.cat(parts, dim=1).transpose(0, 1).flatten(1)  # f (c h w)
        numbers = torch.arange(frames.shape[1], dtype=torch.float64)
        waves = torch.cos(torch.arange(1, PROJECTIONS + 1)[:, None] * numbers) / len(numbers) ** 0.5  # p (c h w)
        assert frames.dtype == torch.float64
        return {f"frame {i}": row.tolist() for i, row in enumerate(frames @ waves.T)}


# Comparison


def losses() -> Values:
    return {key: values for name in OBJECTIVES for key, values in losses_of(name).items()} | starts()


def stored(name: str) -> Values:
    return json.loads((FOLDER / f"{name}.json").read_text())


def store(name: str, values: Values) -> None:
    """Write golden values as JSON, one key per line."""
    rows = [f"  {json.dumps(key)}: [{', '.join(f'{value:.12g}' for value in row)}]" for key, row in values.items()]
    (FOLDER / f"{name}.json").write_text("{\n" + ",\n".join(rows) + "\n}\n")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_ten_losses_equal_the_stored_ones(name):
    golden = stored("losses")
    for key, values in losses_of(name).items():
        assert values == pytest.approx(golden[key], rel=TOLERANCE, abs=0), key


def test_initial_reconstruction_errors_equal_the_stored_ones():
    golden = stored("losses")
    for key, values in starts().items():
        assert values == pytest.approx(golden[key], rel=TOLERANCE, abs=0), key


def test_a_stream_of_the_shipped_weights_equals_the_stored_one():
    golden, frames = stored("stream"), stream()
    scale = max(abs(value) for row in golden.values() for value in row)
    assert list(frames) == list(golden)
    for key, row in frames.items():
        assert row == pytest.approx(golden[key], rel=0, abs=TOLERANCE * scale), key


if __name__ == "__main__":
    if sys.argv[1:] != ["--store"]:
        sys.exit("usage: python -m tests.test_golden --store (only when numerics change on purpose)")
    fit.silence_lightning()
    FOLDER.mkdir(exist_ok=True)
    store("losses", losses())
    store("stream", stream())
