"""An image-to-video network: training of a teacher, distillation, streaming and evaluation."""

import json
from pathlib import Path

import pytest
import torch

from avatar.commands import infer
from avatar.commands.evaluate import evaluate
from avatar.conditioning import image_to_video
from avatar.diffusion.rollout import Noise, generate
from avatar.models import bundle
from avatar.training import fit
from avatar.types import SAMPLES_PER_FRAME, join
from tests.models import speech_networks
from tests.stages import ANY_DATA, FILTERS, SMALL_NET, composed, fitted, random_autoencoder

pytestmark = [pytest.mark.filterwarnings(text) for text in FILTERS]
NETWORK = (
    *SMALL_NET,
    "model.network.extra_in_channels=8",
    "+model.network.image={_target_: avatar.nn.embeddings.ImageProjection, features: 16, dim: 24}",
)
PUPPETS = (
    *(override for override in ANY_DATA if not override.startswith(("autoencoder=", "model="))),
    *(f"data.{part}.{size}" for part in ("train", "dev") for size in ("count=2", "latents=3")),
    "data.buckets.lengths=[3]",
    "data.buckets.weights=[1.0]",
    "data.buckets.max_latents_per_batch=6",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def world(folder) -> tuple[str, str]:
    path = random_autoencoder(folder / "autoencoder.safetensors")
    return "latent.channels=4", f"autoencoder.path='{path}'"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> tuple[str, str]:
    torch.manual_seed(1)
    return "image_encoder=clip", f"image.weights='{speech_networks.clip(tmp_path_factory.mktemp('clip'))}'"


@pytest.fixture(scope="module")
def stages(folder, world, encoder) -> dict[str, Path]:
    """Bundles of a teacher, trained with sample videos, and of a causal teacher distilled from it."""
    common = (*NETWORK, *world, *encoder, "steps=1", "trainer.gradient_clip_val=null")
    video = ("callbacks=default", "+sampler.steps=1")
    teacher = fitted("train", folder / "teacher", *common, *video, tiny=[o for o in PUPPETS if o != "callbacks=base"])
    causal = ("objective=teacher_forcing", f"teacher='{teacher}'")
    return {"teacher": teacher, "causal": fitted("distill", folder / "causal", *common, *causal, tiny=PUPPETS)}


def test_a_trained_bundle_records_its_image_encoder(stages, encoder, folder):
    origin = bundle.origin_of(bundle.load(str(stages["teacher"])))
    assert f"image.weights='{origin.config['image']['weights']}'" == encoder[1]
    assert origin.build_encoder("image").dim == 16 and list((folder / "teacher" / "samples").glob("*.mp4"))


@torch.no_grad()
def test_a_stream_equals_the_rollout(stages, world, folder):
    cfg = composed("infer", *world, f"student='{stages['causal']}'", f"folder='{folder}'")
    session = infer.open_session(cfg, torch.rand(1, 3, 1, 64, 64))
    conds, chunk = [], session.rollout.chunk
    session.rollout.chunk = lambda cond: (conds.append(cond), chunk(cond))[1]
    frames = torch.cat([session.push(torch.randn(10 * SAMPLES_PER_FRAME)), session.finish()], dim=1)
    cond = image_to_video.with_image_conditioning(join(conds, "l"), session.autoencoder, session.image)
    torch.testing.assert_close(cond.concat_latents, torch.cat([part.concat_latents for part in conds], dim=2))
    latents = generate(session.net, cond, session.plan, Noise((cfg.seed,))).latents
    expected = session.autoencoder.decode(torch.cat([cond.reference, latents], dim=2))[0, :, 1:]
    torch.testing.assert_close(frames, expected[:, :10], rtol=1e-4, atol=1e-4)


@pytest.mark.slow  # a full evaluation with all plots
def test_student_and_teacher_are_evaluated(stages, world, folder):
    small = ("clips=2", "reference_motion=0", "control=0", "latents=2", "stream_frames=12", "threads=1", "workers=0")
    nets = (f"student='{stages['causal']}'", f"teacher='{stages['teacher']}'", "teacher_sampler.steps=1")
    place = (f"folder='{folder / 'scores'}'", f"cache='{folder / 'cache'}'")
    evaluate(composed("evaluate", *world, *small, *nets, *place))
    report = json.loads((folder / "scores" / "report.json").read_text())
    assert report["teacher"]["clips"] == report["student"]["clips"] == 2 and report["stream"]["frames"] == 12


@pytest.mark.parametrize(
    "network, encoded, message",
    [
        (
            NETWORK,
            False,
            "width 0 and 0 extra channels for a network that takes 16 and 8; image-to-video networks need",
        ),
        (
            SMALL_NET,
            True,
            "width 16 and 8 extra channels for a network that takes 0 and 0; image-to-video networks need",
        ),
    ],
)
def test_a_missing_or_surplus_image_encoder_is_rejected_before_training(
    network, encoded, message, world, encoder, folder, tmp_path
):
    given = encoder if encoded else ()
    place = (f"folder='{tmp_path}'", f"cache='{folder / 'cache'}'", "name=test", "steps=1")
    with pytest.raises(ValueError, match=message):
        fit.fit(composed("train", *PUPPETS, *network, *world, *given, *place))
    assert not list(tmp_path.rglob("*.ckpt"))


def test_another_image_encoder_than_the_teachers_is_rejected(stages, world, encoder, folder, tmp_path):
    place = (f"folder='{tmp_path}'", f"cache='{folder / 'cache'}'", "name=test", "steps=1")
    stage = ("objective=teacher_forcing", f"teacher='{stages['teacher']}'", "image_encoder=clip")
    other = speech_networks.clip(tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"trained with the image encoder .* pass the weights that it was trained with"
    ):
        fit.fit(composed("distill", *PUPPETS, *NETWORK, *world, *stage, f"image.weights='{other}'", *place))
