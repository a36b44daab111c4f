"""Students that take a guidance scale: exported with it, continued by the next stage, and streamed at any scale."""

from dataclasses import replace

import pytest
import torch

from avatar.diffusion.plan import Plan, plan_of
from avatar.diffusion.rollout import Noise, generate
from avatar.errors import UserError
from avatar.models import bundle
from tests.conftest import make_cond, make_net
from tests.stages import FILTERS, fitted, random_bundle

pytestmark = [pytest.mark.filterwarnings(text) for text in FILTERS]
STATES = ("autoencoder=states", "model=states")
RANGE = ("objective.guidance_range=[1.0,4.0]", "plan.guidance=3.0")
SHORT = ("steps=2", "data.buckets.lengths=[2,3]", "objective.guidance.labels=3")


def test_a_student_takes_a_guidance_scale_from_stage_to_stage(tmp_path):
    causal, teacher = (
        random_bundle(tmp_path / f"{kind}.safetensors", kind, *STATES) for kind in ("causal_teacher", "teacher")
    )
    jumps = fitted("distill", tmp_path / "jumps", "objective=consistency", *RANGE, *SHORT, f"teacher='{causal}'")
    critics = (f"init='{jumps}'", f"teacher='{teacher}'", "objective.critic_steps=1")
    student = bundle.load(str(fitted("distill", tmp_path / "student", "objective=dmd", *RANGE, *SHORT, *critics)))
    assert bundle.load(str(jumps)).guidance is not None and student.guidance is not None
    plan = bundle.origin_of(student).plan
    assert [plan_of(plan, changes).guidance for changes in ({}, {"guidance": 2})] == [3.0, 2]
    with pytest.raises(UserError, match=r"plan\.guidance=null for a student that takes"):
        plan_of(plan, {"guidance": None})


@torch.no_grad()
def test_a_rollout_at_the_scale_of_its_plan_equals_one_at_the_scale_of_its_conditioning():
    net, cond, plan = make_net(guidance_embedding=True), make_cond(), Plan((1.0, 0.6), window=4)
    noise = Noise((1, 2))

    def at(scale: float, by_conditioning: bool = False) -> torch.Tensor:
        if by_conditioning:
            return generate(net, replace(cond, guidance=torch.full((2, 5), scale)), plan, noise).latents
        return generate(net, cond, replace(plan, guidance=scale), noise).latents

    torch.testing.assert_close(at(3.0), at(3.0, by_conditioning=True))
    assert (at(3.0) - at(1.0)).abs().amax((0, 1, 3, 4)).min() > 1e-4


def test_a_scale_for_a_network_that_takes_none_is_rejected(net, cond):
    with pytest.raises(UserError, match=r"plan\.guidance=2\.0 for a network that takes no guidance scale"):
        generate(net, cond, Plan((1.0,), guidance=2.0), Noise((1, 2)))
    for wrong in (-1.0, float("nan")):
        with pytest.raises(UserError, match=r"guidance=.*at least 0"):
            Plan((1.0,), guidance=wrong)
