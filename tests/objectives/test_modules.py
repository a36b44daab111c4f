"""Which networks learn in which step, where the consistency target ends, and that one batch can be learnt by heart."""

import functools
import itertools
import math
from dataclasses import replace
from unittest import mock

import pytest
import torch

from avatar.conditioning.dropout import Dropout
from avatar.diffusion import path
from avatar.diffusion.guidance import Guidance
from avatar.diffusion.packing import Bidirectional, TeacherForced, guided_velocity
from avatar.diffusion.plan import Plan
from avatar.diffusion.timesteps import LogitNormal, ShiftedUniform
from avatar.errors import UserError
from avatar.models import bundle
from avatar.models.video_dit import VideoDiT
from avatar.objectives.consistency import Consistency
from avatar.objectives.dmd import DistributionMatching
from avatar.objectives.flow_matching import FlowMatching
from avatar.objectives.optim import Constant, WarmupDecay
from avatar.objectives.weighting import MinSNR, RegionWeights, Uniform
from avatar.types import REGIONS, Batch
from tests.conftest import make_cond, make_net

PLAN = Plan((1.0, 0.5), window=6)
SCALED = replace(PLAN, guidance=2.0)
ADAM = functools.partial(torch.optim.Adam, lr=1e-3)
REGION_WEIGHTS = RegionWeights(face=0.5, lips=4.0)


def make_batch(latents: int = 5) -> Batch:
    x0 = torch.randn(2, 3, latents, 4, 4)
    return Batch(x0, make_cond(latents=latents), torch.rand(2, len(REGIONS), latents, 4, 4), ["a", "b"])


def without_logging(module):
    """A module without logging, since these tests have no trainer."""
    module.log = module.log_dict = lambda *_, **__: None
    return module


def loaded_net() -> VideoDiT:
    """A network with an origin, as if it were loaded from a bundle."""
    net = make_net()
    net.origin = bundle.Origin({"network": {}}, "causal_teacher")  # pyright: ignore[reportAttributeAccessIssue]
    return net


def make_dmd(**changes) -> DistributionMatching:
    arguments = {
        "plan": PLAN,
        "guidance": Guidance(audio=2.0),
        "timesteps": ShiftedUniform(low=0.02, high=0.98),
        "critic_steps": 5,
        "schedule": Constant(),
        "accumulate": 1,
        "clip": 1.0,
        "gradient": "exit_step",
        "optimizer": ADAM,
        "critic_optimizer": ADAM,
        "region_weights": REGION_WEIGHTS,
        "critic_weighting": Uniform(),
    }
    return without_logging(DistributionMatching(loaded_net(), loaded_net(), loaded_net(), **arguments | changes))


def touched(net) -> bool:
    return any(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_a_student_update_of_dmd_changes_only_the_student():
    dmd = make_dmd()
    dmd.student_loss(make_batch()).backward()
    assert [touched(net) for net in (dmd.net, dmd.critic, dmd.teacher)] == [True, False, False]


def test_a_critic_update_of_dmd_changes_only_the_critic():
    dmd = make_dmd()
    dmd.critic_loss(make_batch()).backward()
    assert [touched(net) for net in (dmd.net, dmd.critic, dmd.teacher)] == [False, True, False]


def test_dmd_updates_the_critic_five_times_per_student_update():
    dmd, order = make_dmd(), []
    optimizers = {name: Recorder(name, order) for name in ("student", "critic")}
    dmd.optimizers = lambda: tuple(optimizers.values())
    dmd.student_loss = dmd.critic_loss = lambda batch: torch.zeros((), requires_grad=True)
    dmd.manual_backward = lambda loss: loss.backward()
    dmd.lr_schedulers = lambda: [Recorder("schedule", []), Recorder("schedule", [])]
    dmd.log = lambda *_: None
    for index in range(12):
        dmd.training_step(make_batch(), index)
    assert order == (["critic"] * 5 + ["student"]) * 2


class Recorder:
    """An optimiser that records its steps by name."""

    def __init__(self, name: str, steps: list[str]):
        self.name, self.steps = name, steps

    def step(self) -> None:
        self.steps.append(self.name)

    def zero_grad(self) -> None:
        pass


def test_dmd_accumulates_before_it_steps():
    dmd, steps = make_dmd(accumulate=2), []
    optimizer = Recorder("critic", steps)
    dmd.manual_backward = lambda loss: loss.backward()
    norms = [
        dmd.alternation.backward(dmd, optimizer, dmd.critic, dmd.critic_loss(make_batch()), index) for index in range(4)
    ]
    assert steps == ["critic"] * 2
    assert [norm is not None for norm in norms] == [False, True, False, True]


def test_both_learning_rates_of_dmd_follow_the_schedule():
    dmd = make_dmd(schedule=WarmupDecay(600, warmup=0.5), critic_steps=1)
    for configured in dmd.configure_optimizers():
        rates = []
        for _ in range(150):
            rates.append(configured["optimizer"].param_groups[0]["lr"])
            configured["optimizer"].step()
            configured["lr_scheduler"]["scheduler"].step()
        assert rates[0] < 0.02 * rates[149] and all(a < b for a, b in itertools.pairwise(rates[:149]))


def test_a_schedule_of_impossible_shares_is_rejected():
    for wrong in ({"warmup": 1.0}, {"decay_from": -0.1}, {"final": 2.0}):
        with pytest.raises(ValueError, match=r"lr_schedule\.warmup=.*expected shares"):
            WarmupDecay(10, **wrong)


def test_noisy_context_is_rejected_for_training():
    """A pattern under which training would show the network what its stream doesn't: no mask packs noisy context."""
    noisy = Plan((1.0, 0.5), context="noisy")
    for refused in (lambda: TeacherForced(noisy), lambda: make_dmd(plan=noisy)):
        with pytest.raises(ValueError, match="clean or merged"):
            refused()
    for context in ("clean", "merged"):
        make_dmd(plan=Plan((1.0, 0.5), context=context))
        TeacherForced(Plan((1.0, 0.5), context=context))


def make_consistency(n: int = 4, plan: Plan = PLAN, **changes) -> Consistency:
    arguments = {"region_weights": REGION_WEIGHTS, "weighting": Uniform(), "schedule": WarmupDecay(10)}
    return without_logging(
        Consistency(
            loaded_net(), loaded_net(), TeacherForced(plan), Guidance(audio=2.0), n, 3.0, ADAM, **arguments | changes
        )
    )


def test_the_consistency_target_reaches_data_at_time_zero():
    module, batch = make_consistency(), make_batch(latents=64)
    t, r = module.draw_times(batch.latents)
    assert r.min() == 0 and t.max() == 1 and bool((t > r).all())
    # every chunk has a time of its own, and at r = 0 the target is the point itself
    assert len(t[0].unique()) > 1
    x = batch.latents
    torch.testing.assert_close(module._endpoint(x, torch.zeros_like(t), batch.conditioning, x), x)


def test_consistency_changes_only_the_student():
    module = make_consistency()
    module.training_step(make_batch(), 0).backward()
    assert touched(module.net) and not touched(module.teacher)


@pytest.mark.parametrize("objective", ["consistency", "dmd"])
def test_a_student_is_trained_at_the_scale_of_its_teacher(objective, monkeypatch):
    """Each sample's teacher is guided by the scale that the student gets for the sample."""
    make = {"consistency": make_consistency, "dmd": make_dmd}[objective]
    module, batch, scales = make(plan=SCALED, guidance_range=[1.0, 4.0]), make_batch(), {}

    def spy(net, pattern, x_t, t, cond, x0, guidance):
        scales["teacher"] = guidance.labels.flatten()
        return guided_velocity(net, pattern, x_t, t, cond, x0, guidance)

    def record(embedding, inputs) -> None:
        scales["student"] = inputs[0]

    monkeypatch.setattr(f"avatar.objectives.{objective}.guided_velocity", spy)
    module.net.guidance.register_forward_pre_hook(record)
    (module.student_loss(batch) if objective == "dmd" else module.training_step(batch, 0)).backward()
    assert torch.equal(scales["student"], scales["teacher"][:, None].expand_as(scales["student"]))
    assert len(scales["teacher"].unique()) == 2 and scales["teacher"].min() >= 1 and scales["teacher"].max() <= 4
    assert module.net.guidance.linear_2.weight.grad.abs().sum() > 0


def test_scales_per_sample_guide_as_the_same_scales_alone():
    net, batch = make_net(), make_batch()
    t = torch.full((2, 5), 0.7)

    def guided_by(labels) -> torch.Tensor:
        guidance = Guidance(audio=2.0, text=1.5, labels=labels)
        return guided_velocity(net, Bidirectional(), batch.latents, t, batch.conditioning, batch.latents, guidance)

    each = guided_by(torch.tensor([1.5, 3.0])[:, None, None, None, None])
    for i, scale in enumerate((1.5, 3.0)):
        torch.testing.assert_close(each[i], guided_by(scale)[i])
    assert not torch.allclose(guided_by(1.5), guided_by(3.0))


def test_the_critic_of_dmd_takes_the_scale():
    module = make_dmd(plan=SCALED, guidance_range=[1.0, 4.0])
    module.critic_loss(make_batch()).backward()
    assert module.critic.guidance.linear_2.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "bounds, scale", [([1.0, 4.0], None), ([1.0, 4.0], 5.0), ([4.0, 1.0], 2.0), ([1.0], 1.0), ([1.0, math.inf], 2.0)]
)
def test_a_range_without_a_default_scale_in_it_is_rejected(bounds, scale):
    with pytest.raises(UserError, match=r"plan\.guidance|guidance_range"):
        make_dmd(plan=replace(PLAN, guidance=scale), guidance_range=bounds)


def test_consistency_is_weighted_at_the_earlier_timestep():
    """At the later one a jump from pure noise would have no weight, and nothing else trains it."""
    module, batch = make_consistency(n=1, weighting=MinSNR(3.0)), make_batch()
    even = make_consistency(n=1)
    even.load_state_dict(module.state_dict())
    torch.manual_seed(7)
    bounded = module.training_step(batch, 0)  # one step: from t = 1 to r = 0, where the SNR has no bound of its own
    torch.manual_seed(7)
    torch.testing.assert_close(bounded, 3 * even.training_step(batch, 0))


def test_the_consistency_target_follows_the_teacher_along_its_own_trajectory():
    module, batch = make_consistency(), make_batch()
    x0 = batch.latents
    t = torch.full((2, 5), 0.5)
    v = guided_velocity(module.teacher, module.pattern, x0, t, batch.conditioning, x0, module.guidance)
    c = TeacherForced(PLAN).velocity(module.teacher, x0, t, batch.conditioning, x0)
    flags = torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.bool)
    muted = batch.conditioning.without(audio=flags[0], text=flags[1], labels=flags[1])
    u = TeacherForced(PLAN).velocity(module.teacher, x0, t, muted, x0)
    torch.testing.assert_close(v, u + 2.0 * (c - u), rtol=1e-4, atol=1e-4)


def make_flow_matching(net=None, pattern=None, **changes) -> FlowMatching:
    dropout, adam = Dropout(), functools.partial(torch.optim.Adam, lr=1e-2)
    net, pattern = net or make_net(), pattern or Bidirectional()
    arguments = {"region_weights": REGION_WEIGHTS, "weighting": Uniform(), "schedule": WarmupDecay(10**6)}
    return without_logging(FlowMatching(net, pattern, LogitNormal(), dropout, adam, **arguments | changes))


@pytest.mark.parametrize("pattern", [Bidirectional(), TeacherForced(PLAN)])
def test_one_batch_overfits(pattern):
    """A batch with its noise is learnt by heart: the loss falls far below that of predicting nothing, which is about
    E |eps - x0|² = 2."""
    net = make_net()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.3)
    module, batch = make_flow_matching(net, pattern), make_batch()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(80):
        torch.manual_seed(1)
        loss = module._loss(batch, batch.conditioning)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_noise_on_the_context_reaches_clean_latents_only():
    """Teacher forcing with noisy context: targets and noisy latents are those without it, the context differs."""
    batch, seen = make_batch(), {}
    for noise in (0.0, 0.5):
        module = make_flow_matching(pattern=TeacherForced(PLAN), context_noise=noise)

        def velocity(self, net, x, t, cond, context, noise=noise):
            seen[noise] = x, t, context
            return x

        with mock.patch.object(TeacherForced, "velocity", velocity):
            torch.manual_seed(1)
            module._loss(batch, batch.conditioning)
    assert seen[0.0][2] is batch.latents
    for plain, noisy in zip(seen[0.0][:2], seen[0.5][:2], strict=True):
        torch.testing.assert_close(plain, noisy)
    deviation = (seen[0.5][2] - batch.latents).flatten(1).std(1)
    assert (deviation > 0).all() and (deviation < 0.6).all() and deviation[0] != deviation[1]


def test_validation_is_deterministic_and_keeps_the_training_generator():
    module, batch, logged = make_flow_matching(), make_batch(), []
    module.log = lambda name, value, **_: logged.append(value.item())
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        module.validation_step(batch, 0)
        assert torch.equal(torch.get_rng_state(), before)
    module.validation_step(batch, 1)
    assert logged[0] == logged[1] != logged[2]


def test_dropped_audio_has_no_influence():
    """A dropped modality's content must not leak: dropping is masking, whatever the values are."""
    net, batch = make_net(), make_batch()
    flags = torch.ones(2, dtype=torch.bool)
    gone = batch.conditioning.without(audio=flags, text=flags, labels=flags)
    t = torch.full((2, 5), 0.5)
    x = batch.latents
    first = Bidirectional().velocity(net, x, t, gone, x)
    gone.audio = torch.randn_like(gone.audio)
    gone.text = torch.randint_like(gone.text, 3, 259)
    torch.testing.assert_close(Bidirectional().velocity(net, x, t, gone, x), first)
    assert torch.isfinite(first).all()


def test_timesteps_are_constant_within_chunks():
    t = TeacherForced(PLAN).times(LogitNormal(), torch.randn(2, 3, 5, 4, 4))
    assert torch.equal(t[:, 1], t[:, 2]) and not torch.equal(t[:, 0], t[:, 1])
    assert path.per_latent(t).shape == (2, 1, 5, 1, 1)


def losses_by(make, loss_of, regions: torch.Tensor, **changes) -> float:
    """The loss of one batch with these masks, all else alike."""
    torch.manual_seed(5)
    module, batch = make(**changes), make_batch()
    torch.manual_seed(6)
    return loss_of(module, replace(batch, regions=regions)).item()


OBJECTIVES = {
    "flow_matching": (make_flow_matching, lambda module, batch: module.training_step(batch, 0), "weighting"),
    "consistency": (make_consistency, lambda module, batch: module.training_step(batch, 0), "weighting"),
    "critic": (make_dmd, lambda module, batch: module.critic_loss(batch), "critic_weighting"),
    "student": (make_dmd, lambda module, batch: module.student_loss(batch), None),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_applies_region_and_timestep_weights(name):
    make, loss_of, weighting = OBJECTIVES[name]
    masks = torch.zeros(2, len(REGIONS), 5, 4, 4)
    plain = losses_by(make, loss_of, masks)
    masks[:, REGIONS.index("lips"), :, 2:] = 1
    assert losses_by(make, loss_of, masks) != pytest.approx(plain, rel=1e-3)
    assert losses_by(make, loss_of, masks, region_weights=RegionWeights(face=4.0)) == pytest.approx(plain)
    if weighting is not None:
        assert losses_by(make, loss_of, 0 * masks, **{weighting: MinSNR()}) != pytest.approx(plain, rel=1e-2)
