"""Wan's and LTX-Video's autoencoders: parity with diffusers in full and in pieces, and strict loading.

The networks are tiny and have random weights.
"""

import json
import shutil
from functools import cache
from pathlib import Path

import diffusers
import huggingface_hub
import hydra
import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file

from avatar.models import bundle
from avatar.models.autoencoders.ltx import LTXAutoencoder
from avatar.models.autoencoders.wan import WanAutoencoder
from avatar.protocols import VideoAutoencoder
from avatar.types import Bundle

CONFIGS = str(Path(__file__).parents[2] / "configs")
MEAN, STD = [0.1, 0.2, -0.3, 0.4], [2.0, 1.0, 0.5, 3.0]
WAN = {"base_dim": 4, "z_dim": 4, "num_res_blocks": 1, "latents_mean": MEAN, "latents_std": STD}
LTX = {
    "latent_channels": 4,
    "block_out_channels": (8, 8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8, 8),
    "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1, 1),
    "scaling_factor": 0.5,
}
CONFIG = {
    "wan21": WAN,
    "wan22": WAN
    | {
        "is_residual": True,
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
        "decoder_base_dim": 8,
        "scale_factor_spatial": 16,
    },
    "ltx": LTX | {"decoder_causal": True},
    "ltx095": LTX
    | {
        "decoder_causal": True,
        "block_out_channels": (8, 8, 16, 16, 16),
        "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
        "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
        "spatio_temporal_scaling": (True,) * 4,
        "decoder_block_out_channels": (8, 16, 32),
        "decoder_layers_per_block": (1,) * 4,
        "decoder_spatio_temporal_scaling": (True,) * 3,
        "decoder_inject_noise": (False,) * 4,
        "upsample_residual": (True,) * 3,
        "upsample_factor": (2,) * 3,
        "timestep_conditioning": True,
        "spatial_compression_ratio": 32,
        "temporal_compression_ratio": 8,
    },
    "ltx_ahead": LTX,
}
STRIDES = {"wan21": (4, 8), "wan22": (4, 16), "ltx": (8, 32), "ltx095": (8, 32), "ltx_ahead": (8, 32)}
STREAMING = pytest.mark.parametrize("kind", ["wan21", "wan22", "ltx", "ltx095"])
ALL = pytest.mark.parametrize("kind", CONFIG)


def wrapper(kind: str):
    return WanAutoencoder if kind.startswith("wan") else LTXAutoencoder


@cache
def reference(kind: str):
    """diffusers' network, with statistics that are not trivial."""
    torch.manual_seed(0)
    name = "AutoencoderKLWan" if kind.startswith("wan") else "AutoencoderKLLTXVideo"
    net = getattr(diffusers, name)(**CONFIG[kind]).eval()
    if not kind.startswith("wan"):
        net.latents_mean.copy_(torch.tensor(MEAN))
        net.latents_std.copy_(torch.tensor(STD) * CONFIG[kind]["scaling_factor"])
    return net


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """kind → a folder of a pipeline that has the reference as its `vae`."""
    root = tmp_path_factory.mktemp("saved")

    def folder(kind: str):
        if not (root / kind).exists():
            reference(kind).save_pretrained(root / kind / "vae")
        return root / kind

    return folder


def video_for(kind: str, latents: int) -> torch.Tensor:
    temporal, spatial = STRIDES[kind]
    return torch.randn(1, 3, 1 + temporal * (latents - 1), spatial, 2 * spatial)


def channelwise(values: list[float]) -> torch.Tensor:
    return torch.tensor(values).view(1, -1, 1, 1, 1)


@cache
@torch.no_grad()
def sample(kind: str, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A clip, its normalised latents and its decoded frames, by diffusers' own methods."""
    torch.manual_seed(seed)
    net, video = reference(kind), video_for(kind, 3)
    z = net.encode(video).latent_dist.mode()
    time = (torch.zeros(len(z)),) if kind == "ltx095" else ()
    return video, (z - channelwise(MEAN)) / channelwise(STD), net.decode(z, *time).sample


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@ALL
@torch.no_grad()
def test_full_clips_equal_diffusers(kind, saved):
    net = wrapper(kind).pretrained(str(saved(kind)))
    assert isinstance(net, VideoAutoencoder) and not net.training
    assert (net.temporal_stride, net.spatial_stride, net.channels) == (*STRIDES[kind], 4)
    videos, latents, frames = (torch.cat(parts) for parts in zip(sample(kind, 0), sample(kind, 1), strict=True))
    close(net.encode(videos), latents)
    close(net.decode(latents), frames)
    assert frames.shape == videos.shape and frames.std() > 0.01
    close(net.encode(videos[:, :, :1]), latents[:, :, :1])


@STREAMING
@torch.no_grad()
def test_interleaved_streams_equal_full_clips(kind, saved):
    """Two encoding and two decoding streams on one network do not share their caches."""
    net, stride = wrapper(kind).pretrained(str(saved(kind))), STRIDES[kind][0]
    clips = [sample(kind, seed) for seed in range(2)]
    cuts = ((1, 2), (2, 1))  # in latents
    encoders, decoders = ([make() for _ in clips] for make in (net.encoder_stream, net.decoder_stream))
    pieces = ([], []), ([], [])
    for turn in range(2):
        for i, (video, z, _) in enumerate(clips):
            frames = [1 + stride * (cuts[i][0] - 1), stride * cuts[i][1]]
            pieces[i][0].append(encoders[i].push(video.split(frames, dim=2)[turn]))
            pieces[i][1].append(decoders[i].push(z.split(list(cuts[i]), dim=2)[turn]))
    for (latents, frames), (_, z, x) in zip(pieces, clips, strict=True):
        close(torch.cat(latents, dim=2), z)
        close(torch.cat(frames, dim=2), x)


@STREAMING
@torch.no_grad()
def test_a_restored_stream_repeats_its_output(kind, saved):
    net = wrapper(kind).pretrained(str(saved(kind)))
    z, stream = torch.randn(1, 4, 3, 1, 1), net.decoder_stream()
    stream.push(z[:, :, :1])
    snapshot = stream.snapshot()
    pieces = [stream.push(z[:, :, i : i + 1]) for i in (1, 2)]
    stream.restore(snapshot)
    assert all(torch.equal(stream.push(z[:, :, i : i + 1]), piece) for i, piece in zip((1, 2), pieces, strict=True))


@STREAMING
def test_encoders_and_decoders_are_causal(kind, saved):
    net, stride = wrapper(kind).pretrained(str(saved(kind))), STRIDES[kind][0]
    video = sample(kind, 0)[0].clone().requires_grad_()
    z = net.encode(video)
    z[:, :, :2].square().sum().backward()
    assert video.grad[:, :, : 1 + stride].abs().sum() > 0 and video.grad[:, :, 1 + stride :].abs().sum() == 0
    z = z.detach().requires_grad_()
    net.decode(z)[:, :, : 1 + stride].sum().backward()
    assert z.grad[:, :, :2].abs().sum() > 0 and z.grad[:, :, 2:].abs().sum() == 0


@STREAMING
def test_incomplete_latents_are_rejected(kind, saved):
    net, (stride, spatial) = wrapper(kind).pretrained(str(saved(kind))), STRIDES[kind]
    for frames in (0, stride, 2 * stride + 2):
        with pytest.raises(ValueError, match=rf"{frames} frames of .* takes 1 \+ {stride}k frames"):
            net.encode(torch.zeros(1, 3, frames, spatial, spatial))
    with pytest.raises(ValueError, match=f"multiples of {spatial}"):
        net.encode(torch.zeros(1, 3, 1, spatial, spatial + 8 if spatial > 8 else 12))
    stream = net.encoder_stream()
    stream.push(torch.zeros(1, 3, 1, spatial, spatial))
    with pytest.raises(ValueError, match=f"takes {stride}k frames after the first piece"):
        stream.push(torch.zeros(1, 3, 1 + stride, spatial, spatial))


def test_a_non_causal_decoder_is_rejected_for_streams_only(saved):
    """Its encoder is causal: networks can be trained on its latents, and streamed with another decoder."""
    with pytest.raises(ValueError, match=r"is not causal.*decoder_distillation"):
        LTXAutoencoder.pretrained(str(saved("ltx_ahead"))).decoder_stream()
    noisy = LTXAutoencoder(CONFIG["ltx"] | {"decoder_inject_noise": (True, False, False, False, False)})
    with pytest.raises(ValueError, match="draws noise"):
        noisy.decoder_stream()
    with pytest.raises(ValueError, match="choose a causal encoder"):
        LTXAutoencoder(CONFIG["ltx"] | {"encoder_causal": False})


def test_statistics_of_other_channels_are_rejected():
    with pytest.raises(ValueError, match="16 means and standard deviations for 4 channels"):
        WanAutoencoder({"base_dim": 4, "z_dim": 4, "num_res_blocks": 1})


def test_fingerprints_cover_weights_and_statistics(saved, tmp_path):
    """Loading a folder twice gives one hash; another weight or another normalisation gives another."""
    names = {WanAutoencoder.pretrained(str(saved("wan21"))).origin.fingerprint for _ in range(2)}
    assert len(names) == 1
    other = shutil.copytree(saved("wan21"), tmp_path / "weights")
    change_weights(other / "vae", lambda w: w | {"quant_conv.bias": w["quant_conv.bias"] + 1e-3})
    names.add(WanAutoencoder.pretrained(str(other)).origin.fingerprint)
    other = shutil.copytree(saved("wan21"), tmp_path / "statistics")
    change_config(other / "vae", latents_std=[2.0, 1.0, 0.5, 3.1])
    names.add(WanAutoencoder.pretrained(str(other)).origin.fingerprint)
    assert len(names) == 3


def test_a_network_for_latents_of_another_autoencoder_is_rejected(saved, tmp_path):
    ours = WanAutoencoder.pretrained(str(saved("wan21")))
    network = {
        "_target_": "avatar.models.autoencoders.causal_conv.CausalConvAutoencoder",
        "channels": 4,
        "widths": [4, 4],
    }
    weights = bundle.new(network).state_dict()
    components = {"autoencoder": ours.origin.fingerprint}
    bundle.write(Bundle("teacher", weights, {"network": network}, components), tmp_path / "a.safetensors")
    net = bundle.load(str(tmp_path / "a.safetensors"))
    bundle.check_latents(net, ours)
    with pytest.raises(ValueError, match="trained on latents of autoencoder"):
        bundle.check_latents(net, WanAutoencoder.pretrained(str(saved("wan22"))))


@pytest.mark.parametrize("kind", ["wan22", "ltx095"])
@torch.no_grad()
def test_a_wrapped_network_can_be_stored_as_a_bundle(kind, saved, tmp_path):
    net, path = wrapper(kind).pretrained(str(saved(kind))), tmp_path / "a.safetensors"
    bundle.write(Bundle("autoencoder", net.state_dict(), net.origin.config), path)
    loaded = bundle.load(str(path), ["autoencoder"])
    assert loaded.origin.fingerprint == net.origin.fingerprint
    video = video_for(kind, 2)
    assert torch.equal(loaded.decode(loaded.encode(video)), net.decode(net.encode(video)))


def change_weights(folder, change) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file(change(load_file(file)), file)


def change_config(folder, **values) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def truncate(file) -> None:
    file.write_bytes(file.read_bytes()[:-100])


NAME = "decoder.conv_in.weight"
MISMATCHES = {
    f"missing {NAME}": lambda f: change_weights(f, lambda w: {k: v for k, v in w.items() if k != NAME}),
    "unknown surplus": lambda f: change_weights(f, lambda w: w | {"surplus": torch.zeros(1)}),
    f"{NAME} is \\(2, 2\\), expected \\(16, 4, 3, 3, 3\\)": lambda f: change_weights(
        f, lambda w: w | {NAME: torch.zeros(2, 2)}
    ),
    "is damaged .* download it again": lambda f: truncate(f / "diffusion_pytorch_model.safetensors"),
    "is not valid JSON": lambda f: (f / "config.json").write_text("{"),
    "config of AutoencoderKLMagvit; expected AutoencoderKLWan": lambda f: change_config(
        f, _class_name="AutoencoderKLMagvit"
    ),
    "has novelty, unknown to the installed version of diffusers": lambda f: change_config(f, novelty=1),
}


@pytest.mark.parametrize("message", MISMATCHES)
def test_a_mismatched_folder_is_rejected(message, saved, tmp_path):
    folder = shutil.copytree(saved("wan21"), tmp_path / "changed")
    MISMATCHES[message](folder / "vae")
    with pytest.raises(ValueError, match=message):
        WanAutoencoder.pretrained(str(folder))


def test_only_safetensors_are_read(saved, tmp_path):
    folder = shutil.copytree(saved("wan21"), tmp_path / "pickled") / "vae"
    file = folder / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(OSError, match=r"has no diffusion_pytorch_model\.safetensors"):
        WanAutoencoder.pretrained(str(folder), subfolder=None)


@pytest.mark.parametrize("name", ["wan21", "wan22", "ltx"])
def test_configs_build_it_and_errors_name_the_download_command(name, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        cfg = compose("train", [f"autoencoder={name}", "folder=/tmp/run", "name=test"])
    with pytest.raises(hydra.errors.InstantiationException) as caught:
        hydra.utils.instantiate(cfg.autoencoder)
    cause = caught.value.__cause__
    assert isinstance(cause, OSError)
    assert f"hf download {cfg.autoencoder.weights} --include 'vae/*'" in str(cause)
    net = hydra.utils.instantiate(cfg.autoencoder, weights=str(saved(name)))
    assert cfg.puppet.size % net.spatial_stride == 0
