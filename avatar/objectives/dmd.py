"""Distribution matching distillation on the student's own rollouts (DMD2, arXiv:2405.14867; Self-Forcing,
arXiv:2506.08009).

    n critic updates       roll out the student without gradients; flow matching of the critic on these clips
    one student update     roll out with gradients at a random exit step; descend along critic minus teacher score

The rollout is the same as in streaming. Teacher and critic are bidirectional over full clips.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import lightning
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from avatar.diffusion import path
from avatar.diffusion.guidance import Guidance
from avatar.diffusion.packing import Bidirectional, TimestepSampler, guided_velocity
from avatar.diffusion.plan import Plan
from avatar.diffusion.rollout import Noise, generate, replay
from avatar.errors import UserError
from avatar.models.adapted import add_guidance_embedding
from avatar.models.video_dit import VideoDiT
from avatar.objectives import losses
from avatar.objectives.alternating import Alternation
from avatar.objectives.distributed import noise_like, sample_globally
from avatar.objectives.guidance_distillation import GuidanceRange
from avatar.objectives.optim import Schedule, trainable_parameters, with_schedule
from avatar.objectives.sharding import shard_networks
from avatar.objectives.weighting import RegionWeights, Weighting
from avatar.types import Batch, Latents, Times

BIDIRECTIONAL = Bidirectional()


class DistributionMatching(lightning.LightningModule):
    """Distribution matching distillation: student, critic (fake score) and frozen teacher (real score).

    Args:
        model: the causal student.
        critic: usually initialised with the teacher's weights.
        teacher: frozen, bidirectional.
        plan: the student's rollout.
        guidance: scales of the teacher's classifier-free guidance.
        guidance_range: of the labels' scale, which student and critic then take as an input; None: that of `guidance`.
        timesteps: distribution of t, for the scores and for the critic's training.
        critic_steps: critic updates per student update.
        accumulate: micro-batches per update of either network.
        clip: bound of the norm of an update's gradient.
        gradient: of the rollout: `exit_step`; `replayed`, the same with the memory of one chunk; or `history`.
        optimizer, critic_optimizer: parameters → optimiser.
        region_weights: loss weights of image regions.
        critic_weighting: loss weights of timesteps in the critic's flow matching.
        schedule: update of either network → factor of both learning rates.

    Raises:
        UserError: an unknown gradient policy, or a plan that cannot be trained.
    """

    def __init__(
        self,
        model: VideoDiT,
        critic: VideoDiT,
        teacher: VideoDiT,
        plan: Plan,
        guidance: Guidance,
        timesteps: TimestepSampler,
        critic_steps: int,
        accumulate: int,
        clip: float,
        gradient: str,
        optimizer: Callable[[Iterable], Optimizer],
        critic_optimizer: Callable[[Iterable], Optimizer],
        region_weights: RegionWeights,
        critic_weighting: Weighting,
        schedule: Schedule,
        guidance_range: Sequence[float] | None = None,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.guidance_range = None if guidance_range is None else GuidanceRange.of(guidance_range, plan)
        if self.guidance_range is not None:
            for net in (model, critic):
                add_guidance_embedding(net)
        if gradient not in ("exit_step", "replayed", "history"):
            raise UserError(f"got gradient={gradient!r}; choose exit_step, replayed or history")
        plan.check_trainable()
        self.net, self.critic, self.teacher = model, critic, teacher.requires_grad_(False).eval()
        self.plan, self.guidance, self.timesteps = plan, guidance, timesteps
        self.alternation, self.accumulate, self.gradient = (
            Alternation(critic_steps, accumulate, clip),
            accumulate,
            gradient,
        )
        self.optimizer, self.critic_optimizer = optimizer, critic_optimizer
        self.region_weights, self.critic_weighting, self.schedule = region_weights, critic_weighting, schedule

    def training_step(self, batch: Batch, index: int) -> None:
        student, critic = self.optimizers()  # pyright: ignore[reportGeneralTypeIssues]
        if self.alternation.updates_generator(index):
            name, optimizer, net, loss = "student", student, self.net, self.student_loss(batch)
        else:
            name, optimizer, net, loss = "critic", critic, self.critic, self.critic_loss(batch)
        norm = self.alternation.backward(self, optimizer, net, loss, index)
        if norm is not None:
            self.log(f"train/{name}_norm", norm)
            schedules = cast(list[LRScheduler], self.lr_schedulers())
            schedules[0 if name == "student" else 1].step()

    def student_loss(self, batch: Batch) -> Tensor:
        """The distribution matching loss of a fresh rollout."""
        batch, guidance = self._with_guidance(batch)
        cond = batch.conditioning
        exit_step = int(torch.randint(len(self.plan.times), ()))
        x = self._rollout(batch, exit_step)
        t = self._draw_times(x, batch.shard)
        with torch.no_grad():
            x_t = path.noised(x, noise_like(x, batch.shard), t)
            v = guided_velocity(self.teacher, BIDIRECTIONAL, x_t, t, cond, x_t, guidance)
            real = path.clean(x_t, v, t)
            fake = path.clean(x_t, BIDIRECTIONAL.velocity(self.critic, x_t, t, cond, x_t), t)
        loss = losses.distribution_matching(x, real, fake, self.region_weights(batch.regions))
        logged = {"train/student_loss": loss, "train/score_gap": (fake - real).abs().mean()}
        self.log_dict(logged, prog_bar=True, sync_dist=True)
        return loss

    def critic_loss(self, batch: Batch) -> Tensor:
        """Flow matching of the critic on a rollout without gradients."""
        batch, _ = self._with_guidance(batch)
        cond = batch.conditioning
        exit_step = int(torch.randint(len(self.plan.times), ()))
        with torch.no_grad():
            x = generate(self.net, cond, self.plan, self._draw_noise(batch), exit_step).latents
        t, eps = self._draw_times(x, batch.shard), noise_like(x, batch.shard)
        v = BIDIRECTIONAL.velocity(self.critic, path.noised(x, eps, t), t, cond, x)
        weight = self.region_weights(batch.regions, self.critic_weighting.of_velocity(t))
        loss = losses.flow_matching(v, x, eps, weight)
        self.log("train/critic_loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def _rollout(self, batch: Batch, exit_step: int) -> Latents:
        """Roll out the student; the gradient policy decides which passes gradients flow through."""
        if self.gradient != "replayed":
            noise = self._draw_noise(batch)
            return generate(self.net, batch.conditioning, self.plan, noise, exit_step, self.gradient).latents
        with torch.no_grad():
            generated = generate(self.net, batch.conditioning, self.plan, self._draw_noise(batch), exit_step)

        def rerun(gradient: Latents) -> None:
            with torch.enable_grad():  # a backward hook runs without gradients
                replay(self.net, generated, gradient)

        x = generated.latents.requires_grad_()
        x.register_hook(rerun)
        return x

    def _with_guidance(self, batch: Batch) -> tuple[Batch, Guidance]:
        return (batch, self.guidance) if self.guidance_range is None else self.guidance_range.draw(batch, self.guidance)

    def _draw_times(self, x: Latents, shard: slice) -> Times:
        return BIDIRECTIONAL.times(sample_globally(self.timesteps, shard), x)

    def _draw_noise(self, batch: Batch) -> Noise:
        seeds = sample_globally(lambda n, device: torch.randint(2**62, (n,), device=device), batch.shard)
        return Noise(tuple(seeds(len(batch.latents)).tolist()))

    def configure_model(self) -> None:
        shard_networks(self)

    def configure_optimizers(self):
        student = self.optimizer(trainable_parameters(self.net))
        critic = self.critic_optimizer(trainable_parameters(self.critic))
        turns, n = self.alternation.critic_steps + 1, self.alternation.critic_steps
        return (  # one schedule step per update of its own network; the schedule counts updates of both
            with_schedule(student, lambda step: self.schedule(step * turns)),
            with_schedule(critic, lambda step: self.schedule(step * turns // n)),
        )
