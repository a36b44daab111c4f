"""Discrete consistency distillation under teacher forcing (arXiv:2303.01469, Alg. 2; causal as in arXiv:2606.25473).

    k ~ U{1 … N},  t = shift(k / N),  r = shift((k - 1) / N)
    x_r = x_t + (r - t) guided(teacher(x_t, t))                       one Euler step of the causal teacher
    L = λ(r) |f(x_t, t) - sg f(x_r, r)|²,  f(x, t) = x - t v(x, t)

At k = 1 the target's timestep is r = 0, where f is the identity, so the chain is anchored to data and not to its
initialisation.
"""

from collections.abc import Callable, Iterable, Sequence

import lightning
import torch
from torch import Tensor
from torch.optim import Optimizer

from avatar.diffusion import path
from avatar.diffusion.guidance import Guidance
from avatar.diffusion.packing import TeacherForced, guided_velocity
from avatar.diffusion.timesteps import shifted
from avatar.models.adapted import add_guidance_embedding
from avatar.models.video_dit import VideoDiT
from avatar.objectives import losses
from avatar.objectives.distributed import noise_like, sample_globally
from avatar.objectives.guidance_distillation import GuidanceRange
from avatar.objectives.optim import Schedule, trainable_parameters, with_schedule
from avatar.objectives.sharding import shard_networks
from avatar.objectives.weighting import RegionWeights, Weighting
from avatar.types import GLOBAL_BATCH, Batch, Conditioning, Latents, Times


class Consistency(lightning.LightningModule):
    """Consistency distillation: the student predicts the endpoints of the causal teacher's trajectories.

    Args:
        model: the student, usually initialised with the teacher's weights.
        teacher: a frozen causal network with the same attention pattern.
        pattern: teacher forcing with the student's rollout plan.
        guidance: scales of the teacher's classifier-free guidance.
        guidance_range: of the labels' scale, which the student then takes as an input; None: that of `guidance`.
        discretisation: N, the number of steps of the teacher's trajectory.
        shift: of the timesteps towards noise; 1: evenly spaced.
        optimizer: parameters → optimiser.
        region_weights: loss weights of image regions.
        weighting: λ, evaluated at r: at t, the weight of pure noise, whose SNR is 0, could be 0.
        schedule: update → factor of the learning rate.
    """

    def __init__(
        self,
        model: VideoDiT,
        teacher: VideoDiT,
        pattern: TeacherForced,
        guidance: Guidance,
        discretisation: int,
        shift: float,
        optimizer: Callable[[Iterable], Optimizer],
        region_weights: RegionWeights,
        weighting: Weighting,
        schedule: Schedule,
        guidance_range: Sequence[float] | None = None,
    ):
        super().__init__()
        self.guidance_range = None if guidance_range is None else GuidanceRange.of(guidance_range, pattern.plan)
        if self.guidance_range is not None:
            add_guidance_embedding(model)
        self.net, self.teacher = model, teacher.requires_grad_(False).eval()
        self.pattern, self.guidance, self.discretisation, self.shift = pattern, guidance, discretisation, shift
        self.optimizer, self.region_weights, self.weighting, self.schedule = (
            optimizer,
            region_weights,
            weighting,
            schedule,
        )

    def training_step(self, batch: Batch, index: int) -> Tensor:
        guidance = self.guidance
        if self.guidance_range is not None:
            batch, guidance = self.guidance_range.draw(batch, guidance)
        x0, cond = batch.latents, batch.conditioning
        t, r = self.draw_times(x0, batch.shard)
        x_t = path.noised(x0, noise_like(x0, batch.shard), t)
        with torch.no_grad():
            v = guided_velocity(self.teacher, self.pattern, x_t, t, cond, x0, guidance)
            x_r = path.step(x_t, v, t, r)
            target = self._endpoint(x_r, r, cond, x0)
        weight = self.region_weights(batch.regions, self.weighting.of_clean(r))
        loss = losses.consistency(self._endpoint(x_t, t, cond, x0), target, weight)
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def draw_times(self, x0: Latents, shard: slice = GLOBAL_BATCH) -> tuple[Times, Times]:
        """Draw neighbouring timesteps (t, r) of the discretised trajectory, one pair per chunk; r can be 0."""
        n = self.discretisation
        u = self.pattern.times(sample_globally(self._draw_steps, shard), x0)
        return shifted(u, self.shift), shifted((u * n - 1).round() / n, self.shift)

    def _draw_steps(self, *shape: int, device: torch.device) -> Tensor:
        return torch.randint(1, self.discretisation + 1, shape, device=device) / self.discretisation

    def _endpoint(self, x: Latents, t: Times, cond: Conditioning, x0: Latents) -> Latents:
        return path.clean(x, self.pattern.velocity(self.net, x, t, cond, x0), t)

    def configure_model(self) -> None:
        shard_networks(self)

    def configure_optimizers(self):
        return with_schedule(self.optimizer(trainable_parameters(self.net)), self.schedule)
