"""The backbone: optional inputs, the input skip, the sink, and compilation as one graph."""

from dataclasses import replace

import pytest
import torch

from avatar.models.video_dit import VideoDiT
from avatar.nn.attention import zero_init_
from avatar.nn.embeddings import ByteTextEncoder
from avatar.nn.masks import MaskSpec, mask_view
from avatar.nn.patches import InputSkip
from avatar.protocols import View
from avatar.types import Conditioning, join
from tests.conftest import AUDIO_TOKENS, CHANNELS, FEATURES, make_cond, make_net

LATENTS = 3
SIZES = {"channels": CHANNELS, "dim": 24, "ffn": 32, "heads": 2, "layers": 2, "patch": 2}
SIZES |= {"audio_features": FEATURES, "audio_tokens": AUDIO_TOKENS}


def inputs(latents: int = LATENTS) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    """Latents, timesteps and conditioning of a pass over [sink | clip]."""
    cond = make_cond(latents=latents)
    x = torch.cat([cond.reference, torch.randn(2, CHANNELS, latents, 4, 4)], dim=2)
    t = torch.rand(2, 1 + latents) * 0.8 + 0.1
    return x, t, join([cond.blank(1), cond], "l")


def causal_view(net: VideoDiT, latents: int = LATENTS) -> View:
    return mask_view(MaskSpec((1,) * latents), net.tokens(4, 4), torch.device("cpu"))


def velocity(net: VideoDiT, x, t, cond, r=None, guidance=None) -> torch.Tensor:
    return net(x, t, replace(cond, guidance=guidance), causal_view(net), r=r)


@torch.no_grad()
def test_zero_initialised_target_time_and_guidance_change_nothing():
    net, (x, t, cond) = make_net(flow_map=True, guidance_embedding=True), inputs()
    zero_init_(net.target_time.linear_2)
    zero_init_(net.guidance.linear_2)
    got = net(x, t, replace(cond, guidance=torch.full_like(t, 3.0)), causal_view(net), r=t / 2)
    assert got.shape == x.shape
    torch.testing.assert_close(got, net(x, t, cond, causal_view(net)))


@torch.no_grad()
@pytest.mark.parametrize("name", ["r", "guidance"])
def test_target_time_and_guidance_are_per_latent(name):
    net, (x, t, cond) = make_net(flow_map=True, guidance_embedding=True), inputs()
    before = torch.full_like(t, 0.3)
    after = before.clone()
    after[:, 2] = 0.7  # of the second latent on the timeline; the sink is the first entry
    first, second = (velocity(net, x, t, cond, **{name: value}) for value in (before, after))
    assert not torch.allclose(first, net(x, t, cond, causal_view(net)))
    torch.testing.assert_close(second[:, :, :2], first[:, :, :2])
    changed = (second - first).abs().amax(dim=(0, 1, 3, 4))
    assert (changed[2:] > 1e-4).all()


@torch.no_grad()
def test_target_time_and_guidance_are_different_inputs():
    net, (x, t, cond) = make_net(flow_map=True, guidance_embedding=True), inputs()
    a, b = torch.full_like(t, 0.3), torch.full_like(t, 0.7)
    assert not torch.allclose(
        velocity(net, x, t, cond, r=a, guidance=b),
        velocity(net, x, t, cond, r=b, guidance=a),
        atol=1e-3,
    )


def test_target_times_for_a_network_without_their_embedding_are_rejected(net):
    x, t, cond = inputs()
    with pytest.raises(AssertionError, match="r for a network without flow_map"):
        net(x, t, cond, causal_view(net), r=t)


def fresh(**changes) -> VideoDiT:
    text = ByteTextEncoder(24, width=8, layers=1, max_bytes=16)
    return VideoDiT(**SIZES | changes, text=text).eval()


@torch.no_grad()
def test_the_input_skip_of_a_fresh_network_is_zero():
    net, (x, t, cond) = fresh(), inputs()
    torch.nn.init.normal_(net.out.weight)
    expected = net(x, t, cond, causal_view(net))
    assert expected.abs().max() > 0.1
    net.input_skip = None
    net.register_module("input_skip", Zero())
    assert torch.equal(net(x, t, cond, causal_view(net)), expected)


class Zero(torch.nn.Module):
    def forward(self, *_):
        return 0.0


@torch.no_grad()
@pytest.mark.parametrize("reference", [True, False])
def test_the_input_skip_adds_weighted_inputs_per_channel(reference):
    net, (x, t, cond) = make_net(reference_channels=reference), inputs()
    zero_init_(net.input_skip.weights)
    without = net(x, t, cond, causal_view(net))
    weights = torch.linspace(-1, 1, CHANNELS * (1 + reference)).view(-1, CHANNELS, 1, 1, 1)
    net.input_skip.weights.bias.copy_(weights.flatten())
    expected = weights[0] * x + (weights[1] * cond.reference if reference else 0)
    torch.testing.assert_close(net(x, t, cond, causal_view(net)) - without, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_every_token_weights_its_own_patch():
    input_skip = InputSkip(dim=6, channels=2, patch=2, reference=True)
    torch.nn.init.normal_(input_skip.weights.weight)
    x, reference, y = torch.randn(1, 2, 3, 4, 6), torch.randn(1, 2, 1, 4, 6), torch.randn(1, 3, 6, 6)
    out = input_skip(y, x, reference)
    for latent in range(3):
        for row in range(2):
            for column in range(3):
                own, other = input_skip.weights(y[0, latent, 3 * row + column]).view(2, 2, 1, 1)
                own_patch = (slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2))
                expected = own * x[0, :, latent][:, *own_patch] + other * reference[0, :, 0][:, *own_patch]
                torch.testing.assert_close(out[0, :, latent][:, *own_patch], expected)


@torch.no_grad()
@pytest.mark.parametrize("sink", [True, False])
def test_the_sink_has_no_input_without_reference_sink(sink):
    net, (x, t, cond) = make_net(reference_sink=sink), inputs()
    other = x.clone()
    other[:, :, 0] = torch.randn_like(other[:, :, 0])
    clips = [net(latents, t, cond, causal_view(net))[:, :, 1:] for latents in (x, other)]
    assert torch.equal(*clips) != sink


def test_a_missing_reference_and_unknown_audio_injection_are_rejected(unchecked):
    with pytest.raises(ValueError, match="neither reference_channels nor reference_sink"):
        fresh(reference_sink=False, reference_channels=False)
    with pytest.raises(ValueError, match="attention, addition"):
        fresh(audio_injection="whisper")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mask", "ring"])
def test_the_backbone_compiles_as_one_graph(kind, compilable):
    video_dit, embeddings = compilable("avatar.models.video_dit"), compilable("avatar.nn.embeddings")
    checked, (x, t, cond) = make_net(layers=1), inputs()
    text = embeddings.ByteTextEncoder(24, width=8, layers=1, max_bytes=16)
    net = video_dit.VideoDiT(**SIZES | {"layers": 1}, text=text).eval()
    net.load_state_dict(checked.state_dict())
    if kind == "mask":
        masks = compilable("avatar.nn.masks")
        view = masks.mask_view(masks.MaskSpec((1, 2)), net.tokens(4, 4), x.device)
    else:
        cache = compilable("avatar.nn.kv_cache").RingCache(1, 2, net.heads, 12, net.tokens(4, 4), window=4, spare=1)
        sink = cache.prime()
        net(x[:, :, :1], t[:, :1], cond.at(slice(0, 1)), sink)
        cache.advance(sink, 1)
        x, t, cond = x[:, :, 1:], t[:, 1:], cond.at(slice(1, None))
        view = cache.view(range(LATENTS), [LATENTS] * LATENTS)
    expected = net(x, t, cond, view)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, t, cond, view), expected, rtol=1e-4, atol=1e-5)
