"""Decoder refinement: only the decoder changes, its bundle keeps the latents, frames belong to their latents."""

from dataclasses import replace

import hydra
import pytest
import torch

from avatar.data.bucketing import BatchShard
from avatar.models import bundle
from avatar.training import fit
from tests.stages import FILTERS, QUIET, composed, random_autoencoder, random_bundle

pytestmark = [pytest.mark.filterwarnings(text) for text in FILTERS]
TINY = (
    *QUIET,
    "objective=decoder_refinement",
    "latent.channels=4",
    "data.train.count=2",
    "data.train.latents=4",
    "data.dev.count=2",
    "data.dev.latents=4",
    "data.buckets.lengths=[3]",
    "data.buckets.weights=[1.0]",
    "data.buckets.max_latents_per_batch=6",
    "steps=2",
    "name=test",
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The config of a tiny run, and its folder."""
    folder = tmp_path_factory.mktemp("refinement")
    autoencoder = random_autoencoder(folder / "autoencoder.safetensors")
    components = {"autoencoder": bundle.load(str(autoencoder)).origin.fingerprint}
    pixels = (f"autoencoder.path='{autoencoder}'", "latent.channels=4")
    teacher = random_bundle(folder / "teacher.safetensors", "teacher", *pixels, components=components)
    places = (f"folder='{folder / 'run'}'", f"cache='{folder / 'cache'}'", f"teacher='{teacher}'")
    return composed("train", *TINY, *pixels, *places), folder


def validation_batches(cfg):
    data = hydra.utils.instantiate(cfg.data)
    data.prepare_data()
    data.setup("fit")
    return data.val_dataloader()


def test_only_the_decoder_changes_and_its_bundle_keeps_the_latents(parts):
    cfg, folder = parts
    fit.fit(cfg)
    before, after = bundle.load(cfg.autoencoder.path), bundle.load(str(folder / "run" / "autoencoder.safetensors"))
    own = after.state_dict()
    changed = {name for name, weight in before.state_dict().items() if not torch.equal(weight, own[name])}
    assert changed and all(name.startswith(("decoder.", "linear_out.")) for name in changed)
    assert after.origin.fingerprint == before.origin.fingerprint
    bundle.check_latents(bundle.load(cfg.teacher), after)


def test_batches_contain_the_frames_of_their_latents(parts):
    cfg, _ = parts
    data = hydra.utils.instantiate(cfg.data)
    data.prepare_data()
    data.setup("fit")
    autoencoder = data.autoencoder
    clips = data.sets["train"]
    batch = data.batches("train", 1, 0, 1, BatchShard())[0]
    for key, video, latents, regions in zip(batch.keys, batch.video, batch.latents, batch.video_regions, strict=True):
        which, start = map(int, key.split("@"))
        whole = data.batches("train", 1, 0, 1, BatchShard()).frames
        clip = clips.make(which, whole.frames, whole.speech_cache)
        with torch.no_grad():
            full = data.world.video(clip, 0, 1 + 4 * clips.latents)
            encoded = autoencoder.encode(full[None])[0, :, 1 + start : 4 + start]
        assert torch.equal(video, full[:, 1 + 4 * start : 1 + 4 * (start + 3)])
        torch.testing.assert_close(latents, encoded, atol=5e-3, rtol=5e-3)  # stored in half precision
        assert regions.shape[1:] == video.shape[1:] and regions.max() > 0.9


def test_an_exact_teacher_gives_the_true_latents(parts, monkeypatch):
    cfg, _ = parts
    module = hydra.utils.instantiate(cfg.objective)
    data = hydra.utils.instantiate(cfg.data)
    data.prepare_data()
    data.setup("fit")
    batch = data.batches("train", 1, 0, 1, BatchShard())[0]
    pattern = type(module.pattern)
    monkeypatch.setattr(pattern, "velocity", lambda self, net, x, t, cond, x0: (x - x0) / t[:, None, :, None, None])
    torch.testing.assert_close(module._estimates(batch), batch.latents, atol=1e-4, rtol=1e-4)


def test_an_untrained_autoencoder_and_other_latents_are_rejected(parts):
    cfg, _ = parts
    module = hydra.utils.instantiate(cfg.objective)
    arguments = {
        name: getattr(module, name)
        for name in ("teacher", "pattern", "timesteps", "optimizer", "region_weights", "schedule")
    }
    build = type(module)
    with pytest.raises(ValueError, match="expected a trained one"):
        build(bundle.new(module.net.origin.network), **arguments)
    with pytest.raises(ValueError, match="batches without frames"):
        module._loss(replace(next(iter(validation_batches(cfg))), video=None), torch.zeros(1, 4, 3, 8, 8))
    other = bundle.load(cfg.autoencoder.path)
    other.origin = replace(other.origin, fingerprint="0" * 16)
    with pytest.raises(ValueError, match="latents of autoencoder"):
        build(other, **arguments)
