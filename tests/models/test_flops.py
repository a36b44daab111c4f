"""Operations and parameters of every backbone's config, against torch's counter on the meta device."""

from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch.utils.flop_counter import FlopCounterMode

from avatar.cli import CONFIGS
from avatar.commands.summarize import clip_of, lines
from avatar.diffusion.packing import Bidirectional
from avatar.models import flops, wan_weights
from avatar.nn.embeddings import TextProjection
from avatar.types import Conditioning
from tests.conftest import make_net

AUTOENCODERS = ("causal_conv", "small_decoder")
BACKBONES = [path.stem for path in Path(CONFIGS, "model").glob("*.yaml") if path.stem not in AUTOENCODERS]
# Of those of Wan the part that is as published, of the last all.
BILLIONS = {"wan_1_3b": 1.42, "wan_5b": 5.0, "wan_14b": 14.29, "wan_i2v_14b": 16.4, "dit_20b": 20.4}


def on_meta(name: str, *overrides: str):
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        cfg = compose("train", overrides=["folder=/tmp/run", "name=test", f"model={name}", *overrides])
    with torch.device("meta"):
        return instantiate(cfg.model)


def counted(net, clip: flops.ClipShape) -> int:
    """What torch counts in a bidirectional pass over such a clip."""
    b, l, tokens = 1, clip.latents, clip.text_tokens
    features = isinstance(net.text, TextProjection)
    with torch.device("meta"):
        nothing = torch.zeros(b, l, dtype=torch.long)
        cond = Conditioning(
            reference=torch.zeros(b, net.channels, 1, clip.height, clip.width),
            audio=torch.zeros(b, 2, l, net.audio.tokens, net.audio.features),
            audio_mask=torch.ones(b, 2, l, dtype=torch.bool),
            text=torch.zeros(b, 1, tokens, net.text.features) if features else nothing.new_zeros(b, 1, tokens),
            text_mask=torch.ones(b, 1, tokens, dtype=torch.bool),
            text_event=nothing,
            state=nothing,
            emotion=nothing,
            emotion_intensity=torch.zeros(b, l),
            gesture=nothing,
            image=net.image and torch.zeros(b, clip.image_tokens, net.image.features),
            concat_latents=torch.zeros(b, net.extra_in_channels, l, clip.height, clip.width)
            if net.extra_in_channels
            else None,
        )
        x = torch.zeros(b, net.channels, l, clip.height, clip.width)
        with FlopCounterMode(display=False) as counter:
            Bidirectional().velocity(net, x, torch.zeros(b, l), cond, x)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", BACKBONES)
def test_operations_are_those_that_torch_counts(name):
    clip = flops.ClipShape(latents=3, height=8, width=12, text_tokens=96, image_tokens=17)
    net = on_meta(name, "model.network.layers=2")  # more are more of the same, and would hide what is around them
    assert flops.forward_flops(net, clip) == pytest.approx(counted(net, clip), rel=1e-4)


@pytest.mark.parametrize("change", ["audio_injection=addition", "reference_channels=false"])
def test_options_are_counted_too(change):
    clip = flops.ClipShape(latents=2, height=4, width=4, text_tokens=16, image_tokens=5)
    small = ("wan_1_3b", "model.network.layers=2")
    net = on_meta(*small, f"model.network.{change}")
    assert flops.forward_flops(net, clip) == pytest.approx(counted(net, clip), rel=1e-4)
    assert flops.forward_flops(net, clip) != flops.forward_flops(on_meta(*small), clip)


@pytest.mark.parametrize("name, billions", BILLIONS.items())
def test_sizes_are_what_their_names_say(name, billions):
    net = on_meta(name)
    names = wan_weights.names_of(net)
    wan = sum(p.numel() for n, p in net.named_parameters() if n in names)
    assert (flops.parameters(net) if name == "dit_20b" else wan) / 1e9 == pytest.approx(billions, rel=0.01)
    assert {p.device.type for p in net.parameters()} == {"meta"}


def test_the_image_to_video_network_has_the_published_tensors():
    published = {  # transformer/config.json of Wan-AI/Wan2.1-I2V-14B-480P-Diffusers
        "patch_size": [1, 2, 2],
        "num_attention_heads": 40,
        "attention_head_dim": 128,
        "in_channels": 36,
        "out_channels": 16,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": 13824,
        "num_layers": 40,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "image_dim": 1280,
        "added_kv_proj_dim": 5120,
        "rope_max_seq_len": 1024,
    }
    with torch.device("meta"):
        theirs = WanTransformer3DModel(**published).state_dict()
    net = on_meta("wan_i2v_14b")
    ours, names = net.state_dict(), wan_weights.names_of(net)
    assert {names[name]: ours[name].numel() for name in names} == {name: x.numel() for name, x in theirs.items()}


def test_parameters_are_counted_once_each():
    net = make_net()
    assert flops.parameters(net) == sum(len(p.flatten()) for p in net.state_dict().values())
    assert flops.training_bytes(net) == 16 * flops.parameters(net)


def test_the_report_fits_a_terminal_and_refuses_no_clip():
    message = lines(on_meta("dit_20b"), flops.ClipShape(20, 60, 104, 512, 257))
    assert dict(message)["parameters"].startswith("20.4 G")
    assert max(len(value) for _, value in message) < 60
    with pytest.raises(ValueError, match="at least 1"):
        flops.ClipShape(0, 60, 104, 512, 257)


@pytest.mark.parametrize(
    "name, world, latents",
    [
        ("wan_1_3b", "nano", (20, 60, 104)),
        ("wan_5b", "ltx", (20, 30, 52)),  # those of its own autoencoder, in whatever world
        ("nano", "wan22", (20, 30, 52)),
    ],
)
def test_a_clip_of_pixels_has_the_latents_that_its_model_is_made_for(name, world, latents):
    cfg, net = dry(world), on_meta(name, f"autoencoder={world}", "model.network.layers=1")
    assert clip_of(net, **cfg.clip) == flops.ClipShape(*latents, text_tokens=512, image_tokens=257)
    with pytest.raises(ValueError, match="80 frames of 480×840 pixels"):  # no whole patches
        clip_of(net, **{**cfg.clip, "width": 840})


def test_a_clip_that_patches_do_not_divide_is_refused():
    cfg, net = dry("ltx"), on_meta("nano", "autoencoder=ltx", "model.network.layers=1")
    with pytest.raises(ValueError, match="patches of 64×64 pixels"):  # 480 pixels are 15 latent pixels
        clip_of(net, **cfg.clip)
    with pytest.raises(ValueError, match=r"give model\.network\.strides"):
        clip_of(on_meta("wan_5b", "model.network.strides=null", "model.network.layers=1"), **cfg.clip)


def dry(world: str):
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        return compose("summarize", overrides=[f"autoencoder={world}"])
