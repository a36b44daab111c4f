"""Equalities between training and streaming: masks, caches, gradients, updates."""

from dataclasses import replace

import pytest
import torch

from avatar.diffusion import path
from avatar.diffusion.packing import packed_velocity
from avatar.diffusion.plan import Plan
from avatar.diffusion.rollout import Noise, Rollout, chunk_step, generate, replay
from avatar.diffusion.samplers import euler
from avatar.models.audio_encoders.log_mel import LogMel
from avatar.nn.kv_cache import PrefixCache, RingCache
from avatar.types import SAMPLES_PER_FRAME
from tests.conftest import make_cond, make_net

SEEDS = Noise((3, 4))


def ring(net, window: int, spare: int = 2) -> RingCache:
    return RingCache(net.layers, 2, net.heads, net.dim // net.heads, net.tokens(4, 4), window, spare)


def stream(net, cond, plan, cache) -> torch.Tensor:
    rollout = Rollout(net, plan, cache, SEEDS).prime(cond)
    chunks = []
    for length in plan.chunks(cond.latents):
        chunks.append(rollout.chunk(cond.at(slice(rollout.position, rollout.position + length))))
    return torch.cat(chunks, dim=2)


@torch.no_grad()
@pytest.mark.parametrize("latents, window", [(5, 8), (9, 4)])
@pytest.mark.parametrize("kind", ["prefix", "ring"])
def test_packed_mask_equals_cached_rollout(net, kind, latents, window):
    cond, plan = make_cond(latents=latents, events=2), Plan((1.0,), window=window)
    clean, x_t = torch.randn(2, 2, 3, latents, 4, 4)
    t = torch.full((2, latents), 0.7)
    packed = path.clean(x_t, packed_velocity(net, x_t, t, cond, plan.spec(latents), clean), t)

    cache = PrefixCache(net.tokens(4, 4), window) if kind == "prefix" else ring(net, window)
    Rollout(net, plan, cache, SEEDS).prime(cond)
    start = 0
    for length in plan.chunks(latents):
        part, positions = slice(start, start + length), range(start, start + length)
        ends = [positions.stop] * length
        cached = chunk_step(net, x_t[:, :, part], 0.7, cond.at(part), cache.view(positions, ends))
        torch.testing.assert_close(cached, packed[:, :, part], rtol=1e-4, atol=1e-4)
        view = cache.view(positions, ends)
        chunk_step(net, clean[:, :, part], 0.0, cond.at(part), view)
        cache.advance(view, length)
        start += length


@torch.no_grad()
def test_ring_equals_prefix_far_beyond_the_window(net):
    cond, plan = make_cond(latents=19), Plan((1.0, 0.6), window=4)
    torch.testing.assert_close(
        stream(net, cond, plan, ring(net, 4)), generate(net, cond, plan, SEEDS).latents, rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
@pytest.mark.parametrize("window", [4, 20])
@pytest.mark.parametrize("times", [(1.0,), (1.0, 0.6, 0.3)])
def test_merged_context_equals_a_pass_of_its_own(net, window, times):
    cond, plan = make_cond(latents=9, events=3), Plan(times, window=window)
    merged = replace(plan, context="merged")
    expected = stream(net, cond, plan, ring(net, window))
    torch.testing.assert_close(stream(net, cond, merged, ring(net, window)), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(generate(net, cond, merged, SEEDS).latents, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_ring_cache_too_small_for_a_merged_pass_is_rejected(net):
    plan = Plan((1.0,), window=4, context="merged")
    with pytest.raises(AssertionError, match="overwrite keys"):
        stream(net, make_cond(latents=9), plan, ring(net, 4, spare=1))


@torch.no_grad()
def test_noisy_context_has_no_context_pass_and_other_latents(net):
    cond, plan, latents, passes = make_cond(latents=5), Plan((1.0, 0.6)), {}, {}
    for context in ("clean", "noisy"):
        counting = GradientOfInputs(net)
        latents[context] = generate(counting, cond, replace(plan, context=context), SEEDS).latents
        passes[context] = len(counting.gradients)
    assert passes == {"clean": 1 + 3 * 3, "noisy": 1 + 3 * 2}  # the sink, then three chunks
    assert not torch.allclose(latents["clean"], latents["noisy"])


@torch.no_grad()
def test_euler_update_equals_the_euler_solver(net):
    cond, plan = make_cond(latents=3), Plan((1.0, 0.7, 0.4), chunk=3, first_chunk=3, update="euler")
    cache = PrefixCache(net.tokens(4, 4), plan.window)
    Rollout(net, plan, cache, SEEDS).prime(cond)
    view = cache.view(range(3), [3] * 3)
    noise = SEEDS(cond.reference.expand(-1, -1, 3, -1, -1), 0, 0)
    expected = euler(lambda x, t: net(x, t, cond, view), noise, torch.tensor([*plan.times, 0.0]))
    torch.testing.assert_close(generate(net, cond, plan, SEEDS).latents, expected, rtol=1e-4, atol=1e-4)
    renoised = generate(net, cond, replace(plan, update="renoise"), SEEDS).latents
    assert not torch.allclose(renoised, expected, rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_noise_is_indexed_by_seed_latent_and_step():
    like = torch.empty(2, 3, 4, 2, 2)
    whole = SEEDS(like, 5, 1)
    torch.testing.assert_close(SEEDS(like[:, :, :2], 7, 1), whole[:, :, 2:])
    assert not torch.equal(SEEDS(like, 5, 2), whole)
    assert not torch.equal(whole[0], whole[1])


def test_inputs_of_later_chunks_get_zero_gradient(net):
    cond, plan = make_cond(latents=5), Plan((1.0,))
    clean, x_t = (torch.randn(2, 3, 5, 4, 4, requires_grad=True) for _ in range(2))
    audio = cond.audio.clone().requires_grad_()
    v = packed_velocity(net, x_t, torch.full((2, 5), 0.5), replace(cond, audio=audio), plan.spec(5), clean)
    v[:, :, 1:3].square().sum().backward()  # the second chunk
    for gradient, first in ((clean.grad, 1), (x_t.grad, 3), (audio.grad.transpose(1, 2), 3)):
        assert gradient[:, :, :first].abs().sum() > 0
        assert gradient[:, :, first:].abs().sum() == 0
    assert x_t.grad[:, :, :1].abs().sum() == 0  # the noisy latents of earlier chunks are masked


@pytest.mark.parametrize("exit_step", [0, 1])
@pytest.mark.parametrize("context", ["clean", "merged"])
def test_truncated_gradient_is_exactly_zero_in_earlier_chunks(net, context, exit_step):
    cond, plan = make_cond(latents=3), Plan((1.0, 0.5), context=context)
    gradients = {}
    for policy in ("exit_step", "history"):
        recording = GradientOfInputs(net)
        latents = generate(recording, cond, plan, SEEDS, exit_step=exit_step, gradient=policy).latents
        latents[:, :, 1:].square().sum().backward()
        gradients[policy] = recording.gradients
    # passes: sink, chunk 1 up to its exit, its context, chunk 2 up to its exit, perhaps its context
    first, context_pass, second = 1 + exit_step, 2 + exit_step, 3 + 2 * exit_step
    assert [at for at, size in enumerate(gradients["exit_step"]) if size > 0] == [second]
    assert [at for at, size in enumerate(gradients["history"]) if size > 0] == [0, first, context_pass, second]


@pytest.mark.parametrize("exit_step", [0, 1, 2])
def test_history_gradient_is_equal_with_merged_context(net, exit_step):
    cond, plan = make_cond(latents=5), Plan((1.0, 0.6, 0.3))
    weight = torch.randn(2, 3, 5, 4, 4)

    def gradient(context: str, policy: str) -> dict[str, torch.Tensor]:
        net.zero_grad()
        latents = generate(net, cond, replace(plan, context=context), SEEDS, exit_step, policy).latents
        (latents * weight).sum().backward()
        return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}

    clean, merged, truncated = (
        gradient(*of) for of in (("clean", "history"), ("merged", "history"), ("clean", "exit_step"))
    )
    assert clean.keys() == merged.keys()
    for name, expected in clean.items():
        torch.testing.assert_close(merged[name], expected, rtol=1e-3, atol=1e-4)
    name = "blocks.0.attention.k.weight"
    assert not torch.allclose(truncated[name], clean[name], rtol=1e-2)  # the two policies differ


class GradientOfInputs(torch.nn.Module):
    """Records the size of the gradient that reaches each pass's input."""

    def __init__(self, net):
        super().__init__()
        self.net, self.gradients = net, []
        self.tokens, self.check_guidance = net.tokens, net.check_guidance

    def forward(self, x, *args):
        index = len(self.gradients)
        self.gradients.append(0.0)
        x = x.clone()
        x = x if x.requires_grad else x.requires_grad_()

        def record(gradient):
            self.gradients[index] = gradient.abs().sum().item()

        x.register_hook(record)
        return self.net(x, *args)


def test_replayed_gradient_equals_exit_step_gradient(net):
    cond, plan = make_cond(latents=5), Plan((1.0, 0.5))
    weight = torch.randn(2, 3, 5, 4, 4)
    (generate(net, cond, plan, SEEDS).latents * weight).sum().backward()
    expected = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    with torch.no_grad():
        generated = generate(net, cond, plan, SEEDS)
    replay(net, generated, weight)
    for name, gradient in expected.items():
        torch.testing.assert_close(dict(net.named_parameters())[name].grad, gradient, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_padding_the_prompt_changes_nothing(net, cond):
    padded = replace(
        cond,
        text=torch.cat([cond.text, torch.full_like(cond.text, 7)], -1),
        text_mask=torch.cat([cond.text_mask, torch.zeros_like(cond.text_mask)], -1),
    )
    plan = Plan((1.0,))
    torch.testing.assert_close(
        generate(net, padded, plan, SEEDS).latents, generate(net, cond, plan, SEEDS).latents, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"times": (0.9, 0.5)},
        {"times": (1.0, 1.0)},
        {"chunk": 0},
        {"window": 1},
        {"context": "dirty"},
        {"update": "heun"},
    ],
)
def test_invalid_plan_is_rejected(wrong):
    with pytest.raises(ValueError, match=r"got|expected|choose"):
        Plan(**wrong)


def test_audio_beyond_the_right_context_has_no_influence(net):
    """Gradients with respect to raw samples, through encoder, windows and network with the causal mask."""
    encoder, latents, stride = LogMel(2, left_context=2, right_context=1), 5, 4
    plan, net = Plan((1.0,)), make_net(audio_features=encoder.dim, audio_tokens=encoder.tokens(stride))
    frames = latents * stride + encoder.right_context
    samples = (torch.randn((frames + 1) * SAMPLES_PER_FRAME) * 0.2).requires_grad_()
    before = encoder.silence.expand(encoder.left_context, -1)
    own = encoder.window(torch.cat([before, encoder.encode(samples)[:frames]]), stride)
    cond = make_cond(batch=1, latents=latents)
    cond = replace(
        cond,
        audio=torch.stack([own, torch.randn_like(own)])[None],
        audio_mask=torch.ones_like(cond.audio_mask),
    )
    clean, x_t = torch.randn(2, 1, 3, latents, 4, 4)
    v = packed_velocity(net, x_t, torch.full((1, latents), 0.5), cond, plan.spec(latents), clean)
    for first, end in ((0, 1), (1, 3), (3, 5)):
        (gradient,) = torch.autograd.grad(v[:, :, first:end].square().sum(), samples, retain_graph=True)
        known = (end * stride + encoder.right_context) * SAMPLES_PER_FRAME + encoder.lookahead_samples
        assert gradient[known:].abs().sum() == 0
        assert gradient[known - 60 : known].abs().sum() > 0
        assert gradient[:SAMPLES_PER_FRAME].abs().sum() > 0


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_jvp_through_the_backbone_matches_a_central_difference():
    net, cond = make_net().double(), make_cond().map(lambda x: x.double() if x.is_floating_point() else x)
    x, dx = torch.randn(2, 2, 3, 5, 4, 4, dtype=torch.float64)
    t = torch.full((2, 5), 0.5, dtype=torch.float64)
    spec = Plan((1.0,), chunk=5, first_chunk=5).spec(5)

    def velocity(x, t):
        return packed_velocity(net, x, t, cond, spec, x * 0)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), torch.no_grad():
        dt = torch.full_like(t, 1e-3)  # the network embeds 1000 t
        _, tangent = torch.func.jvp(velocity, (x, t), (dx, dt))
        e = 1e-3
        difference = (velocity(x + e * dx, t + e * dt) - velocity(x - e * dx, t - e * dt)) / (2 * e)
    torch.testing.assert_close(tangent, difference, rtol=1e-4, atol=1e-4)
