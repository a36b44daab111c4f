"""FLOPs and parameters of the backbone of every config, against a closed form and published sizes."""

from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from avatar.cli import CONFIGS
from avatar.commands.summarize import clip_of, lines
from avatar.models import flops, wan_weights
from avatar.nn.attention import CrossAttention
from avatar.nn.embeddings import TextProjection
from avatar.types import ROLES
from tests.conftest import make_net

OTHERS = ("causal_conv", "small_decoder", "bundle", "adapted")
BACKBONES = [path.stem for path in Path(CONFIGS, "model").glob("*.yaml") if path.stem not in OTHERS]
# Parameters: of the Wan configs, those of the published networks; of the last config, all.
BILLIONS = {"wan_1_3b": 1.42, "wan_5b": 5.0, "wan_14b": 14.29, "wan_i2v_14b": 16.4, "dit_20b": 20.4}


def on_meta(name: str, *overrides: str):
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        cfg = compose("train", overrides=["folder=/tmp/run", "name=test", f"model={name}", *overrides])
    with torch.device("meta"):
        return instantiate(cfg.model)


def closed_form(net, clip: flops.ClipShape) -> int:
    """FLOPs of a bidirectional pass over [sink | clip], from the sizes of the layers."""
    per_latent, latents = net.tokens(clip.height, clip.width), 1 + clip.latents
    return net.layers * block_flops(net, latents, per_latent, clip) + outer_flops(net, latents, per_latent, clip)


def block_flops(net, latents: int, per_latent: int, clip: flops.ClipShape) -> int:
    """Self-attention, text and image, audio, and feed-forward of one block."""
    d, tokens = net.dim, latents * per_latent
    # The sink attends to itself only, all other tokens attend to everything.
    pairs = per_latent * per_latent + (tokens - per_latent) * tokens
    attention = matmul(tokens, d, 4 * d) + 2 * matmul(pairs, d, 1)
    # Text and image share queries and the output projection.
    text = matmul(tokens, d, 2 * d)
    for memory in (clip.text_tokens + 1, *([] if net.image is None else [clip.image_tokens])):
        text += matmul(memory, d, 2 * d) + 2 * matmul(tokens * memory, d, 1)
    audio_tokens = 1 + len(ROLES) * net.audio.tokens  # the null token first
    if isinstance(net.blocks[0].audio, CrossAttention):
        audio = matmul(tokens, d, 2 * d) + matmul(latents * audio_tokens, d, 2 * d)
        audio += 2 * matmul(tokens * audio_tokens, d, 1)
    else:
        audio = matmul(latents, d, d)
    return attention + text + audio + 2 * matmul(tokens, d, net.ffn)


def outer_flops(net, latents: int, per_latent: int, clip: flops.ClipShape) -> int:
    """Embeddings, projections and output, outside the blocks."""
    d, tokens, patch = net.dim, latents * per_latent, net.channels * net.patch**2
    patches = matmul(tokens, net.patches.proj.in_features, d)
    if net.patches.reference is not None:
        patches += matmul(per_latent, patch, d)
    output = matmul(tokens, d, patch + net.input_skip.weights.out_features)
    time = matmul(latents, net.time.frequencies, d) + matmul(latents, d, d + 6 * d)
    audio = matmul(latents * len(ROLES) * net.audio.tokens, net.audio.width + d, d)
    image = 0 if net.image is None else matmul(clip.image_tokens, net.image.features, net.image.features + d)
    return patches + output + time + audio + text_flops(net.text, clip.text_tokens) + image


def text_flops(text, tokens: int) -> int:
    if isinstance(text, TextProjection):
        return matmul(tokens + 1, text.features + text.dim, text.dim)
    width = text.out.in_features
    layer = 12 * width * width + 2 * tokens * width  # a feed-forward of 4 × width, and attention
    return 2 * tokens * (len(text.encoder.layers) * layer + width * text.dim)


def matmul(rows: int, inner: int, columns: int) -> int:
    return 2 * rows * inner * columns


@pytest.mark.parametrize("name", BACKBONES)
def test_flops_match_the_closed_form(name):
    clip = flops.ClipShape(latents=3, height=8, width=12, text_tokens=96, image_tokens=17)
    net = on_meta(name, "model.network.layers=2")  # more would hide the layers outside the blocks
    assert flops.forward_flops(net, clip) == closed_form(net, clip)


@pytest.mark.parametrize("change", ["audio_injection=addition", "reference_channels=false"])
def test_flops_of_options_match_the_closed_form(change):
    clip = flops.ClipShape(latents=2, height=4, width=4, text_tokens=16, image_tokens=5)
    small = ("wan_1_3b", "model.network.layers=2")
    net = on_meta(*small, f"model.network.{change}")
    assert flops.forward_flops(net, clip) == closed_form(net, clip)
    assert flops.forward_flops(net, clip) != flops.forward_flops(on_meta(*small), clip)


@pytest.mark.parametrize("name, billions", BILLIONS.items())
def test_parameters_match_the_name_of_the_config(name, billions):
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


def test_every_parameter_is_counted_once():
    net = make_net()
    assert flops.parameters(net) == sum(len(p.flatten()) for p in net.state_dict().values())
    assert flops.training_bytes(net) == 16 * flops.parameters(net)


def test_flops_depend_on_neither_precision_nor_mode():
    net, clip = make_net(), flops.ClipShape(latents=3, height=4, width=4, text_tokens=9, image_tokens=5)
    expected = closed_form(net, clip)
    for changed in (net.eval(), net.train(), net.to(torch.bfloat16)):
        assert flops.forward_flops(changed, clip) == expected
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16} and not any(p.is_meta for p in net.parameters())


def test_prompts_are_counted_up_to_the_limit_of_a_byte_encoder():
    net, size = make_net(), {"latents": 3, "height": 4, "width": 4, "image_tokens": 5}
    limit = len(net.text.place)
    longest, longer = (flops.forward_flops(net, flops.ClipShape(text_tokens=n, **size)) for n in (limit, limit + 1))
    assert longest == longer


def test_the_summary_fits_a_terminal():
    rows = lines(on_meta("dit_20b"), flops.ClipShape(20, 60, 104, 512, 257))
    assert dict(rows)["parameters"].startswith("20.3 G")
    assert max(len(value) for _, value in rows) < 60


def test_an_empty_clip_is_rejected():
    with pytest.raises(ValueError, match="at least 1"):
        flops.ClipShape(0, 60, 104, 512, 257)


@pytest.mark.parametrize(
    "name, autoencoder, latents",
    [
        ("wan_1_3b", "nano", (20, 60, 104)),
        ("wan_5b", "ltx", (20, 30, 52)),  # of the autoencoder of the model, whichever is configured
        ("nano", "wan22", (20, 30, 52)),
    ],
)
def test_a_clip_in_pixels_has_the_latents_of_the_strides_of_the_model(name, autoencoder, latents):
    cfg, net = summary(autoencoder), on_meta(name, f"autoencoder={autoencoder}", "model.network.layers=1")
    assert clip_of(net, **cfg.clip) == flops.ClipShape(*latents, text_tokens=512, image_tokens=257)
    with pytest.raises(ValueError, match="80 frames of 480×840 pixels"):  # not a multiple of the patch size
        clip_of(net, **{**cfg.clip, "width": 840})


def test_a_clip_that_patches_do_not_divide_is_rejected():
    cfg, net = summary("ltx"), on_meta("nano", "autoencoder=ltx", "model.network.layers=1")
    with pytest.raises(ValueError, match="patches of 64×64 pixels"):  # 480 pixels are 15 latent pixels
        clip_of(net, **cfg.clip)
    with pytest.raises(ValueError, match=r"give model\.network\.strides"):
        clip_of(on_meta("wan_5b", "model.network.strides=null", "model.network.layers=1"), **cfg.clip)


def summary(autoencoder: str):
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        return compose("summarize", overrides=[f"autoencoder={autoencoder}"])
