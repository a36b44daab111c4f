"""Guidance distillation: a student takes the scale of the labels' guidance as an input (arXiv:2210.03142).

The teacher of each sample has a scale of its own, which the student gets as `Conditioning.guidance`. A stream then
chooses the scale, by `plan.guidance`, and pays one forward pass at any.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from avatar.diffusion.guidance import Guidance
from avatar.diffusion.plan import Plan
from avatar.errors import UserError
from avatar.objectives.distributed import sample_globally
from avatar.types import Batch


@dataclass(frozen=True)
class GuidanceRange:
    """Distribution of the scale of the labels' guidance: uniform in [low, high]."""

    low: float
    high: float

    @classmethod
    def of(cls, bounds: Sequence[float], plan: Plan) -> "GuidanceRange":
        """The range between two bounds.

        Raises:
            UserError: other than two finite numbers, 0 ≤ low < high, or a plan without a scale in this range, with
                which the student streams by default.
        """
        numbers = isinstance(bounds, Sequence) and all(isinstance(bound, int | float) for bound in bounds)
        if not numbers or len(bounds) != 2 or not 0 <= bounds[0] < bounds[1] < math.inf:
            raise UserError(f"got guidance_range={bounds}; expected two numbers, 0 ≤ low < high, such as [1.0, 4.0]")
        self = cls(*bounds)
        if plan.guidance is None or not self.low <= plan.guidance <= self.high:
            raise UserError(
                f"got plan.guidance={plan.guidance} for a student of scales from {self.low} to {self.high}; set "
                "plan.guidance to the scale that it streams with by default"
            )
        return self

    def draw(self, batch: Batch, guidance: Guidance) -> tuple[Batch, Guidance]:
        """Draw a scale per sample: the batch with it in its conditioning, and the teacher's guidance with it."""
        cond = batch.conditioning
        uniform = sample_globally(torch.rand, batch.shard)(len(cond.state), 1, device=cond.state.device)
        scale = self.low + (self.high - self.low) * uniform
        conditioned = replace(batch, conditioning=replace(cond, guidance=scale.expand(-1, cond.latents)))
        return conditioned, replace(guidance, labels=scale[..., None, None, None])
