"""Autoencoders: streaming equals the full pass, both directions are causal, single frames have a latent."""

import pytest
import torch

from avatar.models.autoencoders.causal_conv import CausalConv, CausalConvAutoencoder
from avatar.models.autoencoders.distilled import DistilledAutoencoder
from avatar.models.autoencoders.state import StateAutoencoder
from avatar.objectives.autoencoder import perturbed


def make(kind: str):
    if kind == "state":
        return StateAutoencoder([0.0, 1.0], [1.0, 2.0]), torch.randn(2, 2, 13, 1, 1)
    net = CausalConvAutoencoder(6, *{"conv16": ((4, 6, 8),), "reference": ((4, 6, 8), True)}.get(kind, ((8, 8),)))
    if kind == "distilled":
        net = DistilledAutoencoder(net, 8)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return net.eval(), torch.randn(2, 3, 13, 16, 32)


KINDS = pytest.mark.parametrize("kind", ["conv", "conv16", "reference", "state", "distilled"])


@KINDS
@pytest.mark.parametrize("cuts", [(1, 1, 1, 1), (1, 3), (2, 2), (4,)])
@torch.no_grad()
def test_streaming_decode_equals_the_full_decode(kind, cuts):
    net, video = make(kind)
    latents = net.encode(video)
    assert latents.shape[2] == 4
    stream = net.decoder_stream()
    pieces = [stream.push(part) for part in latents.split(list(cuts), dim=2)]
    torch.testing.assert_close(torch.cat(pieces, dim=2), net.decode(latents))


@KINDS
@pytest.mark.parametrize("cuts", [(1, 4, 8), (5, 8), (9, 4)])
@torch.no_grad()
def test_streaming_encode_equals_the_full_encode(kind, cuts):
    net, video = make(kind)
    stream = net.encoder_stream()
    pieces = [stream.push(part) for part in video.split(list(cuts), dim=2)]
    torch.testing.assert_close(torch.cat(pieces, dim=2), net.encode(video))


@KINDS
@pytest.mark.parametrize("before", [0, 2])
@torch.no_grad()
def test_a_restored_stream_repeats_its_output(kind, before):
    net, video = make(kind)
    latents = net.encode(video)
    stream = net.decoder_stream()
    if before:
        stream.push(latents[:, :, :before])
    snapshot = stream.snapshot()
    first = stream.push(latents[:, :, before:])
    stream.restore(snapshot)
    torch.testing.assert_close(stream.push(latents[:, :, before:]), first)


@torch.no_grad()
def test_a_failed_piece_leaves_its_stream_unchanged():
    net, video = make("conv")
    latents, stream = net.encode(video), net.decoder_stream()
    frames = [stream.push(latents[:, :, :2])]
    # Fails inside the decoder, after its first layers have updated their caches.
    handle = net.decoder[3].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stream.push(latents[:, :, 2:])
    handle.remove()
    frames.append(stream.push(latents[:, :, 2:]))
    torch.testing.assert_close(torch.cat(frames, dim=2), net.decode(latents))


@KINDS
def test_encoders_and_decoders_are_causal(kind):
    net, video = make(kind)
    video.requires_grad_()
    latents = net.encode(video)
    latents[:, :, :2].square().sum().backward()
    assert video.grad[:, :, :5].abs().sum() > 0 and video.grad[:, :, 5:].abs().sum() == 0
    latents = latents.detach().requires_grad_()
    net.decode(latents)[:, :, :5].square().sum().backward()
    assert latents.grad[:, :, :2].abs().sum() > 0 and latents.grad[:, :, 2:].abs().sum() == 0


@KINDS
@torch.no_grad()
def test_the_first_latent_depends_on_the_first_frame_alone(kind):
    net, video = make(kind)
    torch.testing.assert_close(net.encode(video[:, :, :1]), net.encode(video)[:, :, :1])
    assert net.decode(net.encode(video[:, :, :1])).shape == video[:, :, :1].shape


@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3), (1, 1, 1)])
@torch.no_grad()
def test_a_causal_convolution_is_torchs_three_dimensional_one_of_the_padded_clip(kernel):
    layer, x = CausalConv(3, 5, kernel), torch.randn(2, 3, 4, 6, 6)
    padded = torch.cat([x[:, :, :1].expand(-1, -1, kernel[0] - 1, -1, -1), x], dim=2)
    memory = {}
    pieces = torch.cat([layer(x[:, :, :3], memory), layer(x[:, :, 3:], memory)], dim=2)
    torch.testing.assert_close(pieces, layer.conv(padded), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_the_state_autoencoder_is_lossless():
    net, video = make("state")
    torch.testing.assert_close(net.decode(net.encode(video)), video)


@torch.no_grad()
def test_latents_have_unit_variance_after_start_from_and_training():
    torch.manual_seed(0)
    net = CausalConvAutoencoder(24, (8, 8))
    basis = torch.randn(16, 3 * 4 * 8 * 8)

    def video():  # blocks of rank 16
        blocks = (torch.randn(2, 2, 2, 2, 16) @ basis).unflatten(-1, (3, 4, 8, 8))
        groups = blocks.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(2, 3, 8, 16, 16)
        return torch.cat([groups[:, :, :1], groups], dim=2)[:, :, :9] * 0.1 + 3.0

    net.start_from(torch.cat([video() for _ in range(16)]))
    for _ in range(60):
        latents = net.encode(video())
    assert 0.7 < latents.std() < 1.3
    assert (net.eval().normalise.variance > 0).all()


@torch.no_grad()
def test_initial_latents_are_mixed_components_with_the_power_of_linear_coding():
    """Before training: a rotation of principal components, whose power is the square root of their variance."""
    torch.manual_seed(0)
    net = CausalConvAutoencoder(16, (4, 4)).eval()
    still = torch.linalg.qr(torch.randn(3 * 8 * 8, 16))[0].T.unflatten(1, (3, 1, 8, 8)) / 2
    axes = still.expand(-1, -1, 4, -1, -1).flatten(1)  # as in a stream's first group, whose frames are equal
    sizes = torch.logspace(0, -1, 16)
    blocks = (torch.randn(1, 256, 1, 1, 16) * sizes @ axes).unflatten(-1, (3, 4, 8, 8))
    groups = blocks.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(1, 3, 1024, 8, 8)
    video = torch.cat([groups[:, :, :1], groups], dim=2)
    net.start_from(video)
    latents = net.encode(video)[0, :, 1:, 0, 0]
    torch.testing.assert_close(net.decode(net.encode(video))[:, :, 1:], groups, atol=1e-3, rtol=0)
    power = torch.linalg.eigvalsh(torch.cov(latents)).flip(0)
    torch.testing.assert_close(power / power.mean(), sizes / sizes.mean(), atol=0.1, rtol=0.2)
    assert latents.var(dim=1).max() < 3 * latents.var(dim=1).min()


@torch.no_grad()
def test_the_noise_of_a_sample_is_below_the_maximum_and_differs_between_samples():
    torch.manual_seed(0)
    noisy = perturbed(torch.zeros(400, 2, 3, 8, 8), 0.5)
    assert not noisy[:, :, 0].any()
    deviation = noisy[:, :, 1:].flatten(1).std(dim=1)
    assert deviation.max() < 0.6 and 0.2 < deviation.mean() < 0.3 and deviation.min() < 0.05


@pytest.mark.parametrize("shape", [(1, 3, 4, 16, 16), (1, 3, 5, 15, 16)])
def test_other_sizes_are_rejected(shape):
    with pytest.raises(ValueError, match="crop it"):
        make("conv")[0].encode(torch.zeros(shape))
