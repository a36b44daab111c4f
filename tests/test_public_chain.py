"""The full chain from published weights: conversion, fine-tuning, causal training, distillation, streaming.

Networks are tiny and random, in the published file layout: a sharded transformer with an index, its autoencoder, UMT5.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from scipy.io import wavfile

from avatar.commands import infer
from avatar.commands.convert import convert
from avatar.media.decode import read_video
from avatar.models import bundle
from tests.models import speech_networks
from tests.stages import FILTERS, composed, fitted

pytestmark = [pytest.mark.slow, *(pytest.mark.filterwarnings(text) for text in FILTERS)]
CHANNELS, TEXT = 4, 8
VAE = {"base_dim": 4, "z_dim": CHANNELS, "num_res_blocks": 1, "latents_mean": [0.1] * 4, "latents_std": [2.0] * 4}
SHAPE = (
    "model=wan_1_3b",
    f"model.network.channels={CHANNELS}",
    "model.network.dim=24",
    "model.network.ffn=32",
    "model.network.heads=2",
    "model.network.layers=2",
    f"model.network.text.features={TEXT}",
    "model.network.text.dim=24",
)
TINY = (
    "callbacks=base",
    "threads=1",
    "steps=2",
    "data.workers=0",
    "data.train.count=2",
    "data.train.latents=3",
    "data.dev.count=2",
    "data.dev.latents=3",
    "data.buckets.lengths=[2,3]",
    "data.buckets.max_latents_per_batch=6",
    "puppet.size=64",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=1",
    "+trainer.enable_progress_bar=false",
)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """The folder of a pipeline in diffusers' layout."""
    torch.manual_seed(4)
    folder = tmp_path_factory.mktemp("wan")
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "ffn_dim": 32, "text_dim": TEXT}
    net = WanTransformer3DModel(**sizes, in_channels=CHANNELS, out_channels=CHANNELS)
    net.save_pretrained(folder / "transformer", max_shard_size="30KB")
    assert list((folder / "transformer").glob("*.index.json"))
    AutoencoderKLWan(**VAE).save_pretrained(folder / "vae")
    speech_networks.umt5(folder)
    return folder


def test_published_weights_are_distilled_to_a_student_that_streams(published, tmp_path):
    world = ("autoencoder=wan21", f"autoencoder.weights='{published}'")
    words = ("text_encoder=umt5", f"text.weights='{published}'", "text.max_tokens=32")
    weights = f"model.weights='{published}/transformer'"
    run = (*world, *words, *TINY)

    teacher = tmp_path / "wan" / "teacher.safetensors"
    convert(composed("convert", *SHAPE, *words, weights, f"out='{teacher}'"))
    tuned = fitted("train", tmp_path / "tuned", *SHAPE, weights, tiny=run)
    made = []
    for source in (teacher, tuned):
        causal = fitted("distill", tmp_path / "causal", "objective=teacher_forcing", f"teacher='{source}'", tiny=run)
        jumps = fitted("distill", tmp_path / "jumps", "objective=consistency", f"teacher='{causal}'", tiny=run)
        last = ("objective=dmd", f"init='{jumps}'", f"teacher='{source}'", "objective.critic_steps=1")
        made.append(fitted("distill", tmp_path / f"student-{source.parent.name}", *last, tiny=run))
        for name in ("causal", "jumps"):
            (tmp_path / name).rename(tmp_path / f"{name}-{source.parent.name}")
    before, after = (bundle.read(path).weights for path in (teacher, made[0]))
    assert before.keys() == after.keys()
    assert all(weight.isfinite().all() for weight in after.values())
    moved = [name for name in before if not torch.equal(before[name].float(), after[name])]
    assert "blocks.0.attention.q.weight" in moved and "blocks.0.audio.out.weight" in moved

    wavfile.write(tmp_path / "a.wav", 16_000, np.zeros(16_000, np.int16))
    out = tmp_path / "me.mp4"
    given = (f"student='{made[0]}'", f"audio='{tmp_path}/a.wav'", f"out='{out}'", "prompt='a happy orange cat'")
    infer.infer(composed("infer", *world, "puppet.size=64", f"folder='{tmp_path}'", "threads=1", *given))
    assert read_video(out)[0].shape == (25, 64, 64, 3)
    convert(composed("convert", f"bundle='{made[0]}'", f"out='{tmp_path}/out'", "allow=['*']"))
    again = WanTransformer3DModel.from_pretrained(tmp_path / "out").state_dict()
    assert torch.equal(again["blocks.0.attn1.to_q.weight"], after["blocks.0.attention.q.weight"])
