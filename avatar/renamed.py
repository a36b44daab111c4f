"""Renamed settings: an override with a former name raises an error that states the new one."""

from collections.abc import Iterable

from avatar.errors import UserError

# Former key (and all keys below it) -> new key.
RENAMED = {
    "world.view": "puppet",
    "world.autoencoder": "autoencoder",
    "world.channels": "latent.channels",
    "world.temporal_stride": "latent.temporal_stride",
    "world.spatial_stride": "latent.spatial_stride",
    "objective.emphasis": "objective.region_weights",
    "data.emphasis": "data.region_weights",
    "data.buckets.budget": "data.buckets.max_latents_per_batch",
    "data.buckets.multiple": "data.buckets.batch_multiple_of",
    "audio_encoder@audio": "audio_encoder",
    "text_encoder@text": "text_encoder",
    "image_encoder@image": "image_encoder",
    "audio_encoder@shipped.audio": "audio_encoder",
    "text_encoder@shipped.text": "text_encoder",
    "callbacks.finite": "callbacks.nonfinite_guard",
    "callbacks.video.generator": "callbacks.video.sampler",
    "model.network.more_channels": "model.network.extra_in_channels",
    "prepare": "transforms",
    "objective.steps": "steps",
    "audio.hop": "audio.hop_frames",
    "others": "reference_motion",
}
# Former key (and all keys below it) -> the settings that replace it.
REPLACED = {
    "world": "autoencoder=nano|wan21|wan22|ltx|states, and puppet=64px|128px|256px|states for another puppet size",
    "objective.weighting": "weighting=uniform|min_snr",
    "objective.critic_weighting": "weighting=uniform|min_snr",
    **{f"objective.dropout.{name}": "objective.dropout.kept={none: 0.05, …}" for name in ("audio", "text", "labels")},
    "trainer.strategy.find_unused_parameters": "trainer=ddp, which has no unused parameters",
}
RENAMED_CHOICES = {
    "trainer=dry": "python -m avatar summarize model=NAME",
    "scene=grown": "scene=full",
    "world=pixels": "autoencoder=nano",
    **{f"world={name}": f"autoencoder={name}" for name in ("states", "wan21", "wan22", "ltx")},
}


def check_overrides(overrides: Iterable[str]) -> None:
    """Raise UserError for a Hydra override (`key=value`, as typed) of a setting that has been renamed."""
    for override in overrides:
        key, separator, value = override.lstrip("+~").partition("=")
        for choice in value.split(","):  # of a sweep
            if (new := RENAMED_CHOICES.get(f"{key}={choice}")) is not None:
                raise UserError(f"{override} has been renamed; use {new}")
        for old, new in [*RENAMED.items(), *REPLACED.items()]:
            if key == old or key.startswith(f"{old}."):
                replacement = f"{new}{key.removeprefix(old)}{separator}{value}" if old in RENAMED else new
                raise UserError(f"{override} has been renamed; use {replacement}")
