"""Scores of a set of clips, ready for JSON: a score that cannot be measured is None."""

import math
from collections.abc import Sequence
from typing import Any

from avatar.metrics import control, drift, identity, lip_sync
from avatar.metrics.distribution import Trajectory, distribution
from avatar.metrics.state_estimation import EstimatedClip


def score(clips: Sequence[EstimatedClip], reference: Sequence[Trajectory] = ()) -> dict[str, Any]:
    """All scores of the clips together.

        lip_sync_r, lip_sync_r_ci       correlation of the apertures at lag 0, and its 95 % interval
        lip_sync_lag_ms                 best lag, positive if the lips are late
        lip_sync_r_at_lag               correlation at the best lag
        closure_recall                  share of p, b and m with closed lips
        silence_motion                  change of the aperture per silent frame
        identity_delta_e                colour error, CIE76
        undecodable_rate                share of invalid frames
        motion                          motion per frame, in shares of the channels' ranges
        frechet, coverage,              compared with `reference`: `avatar.metrics.distribution`; None without it or
          motion_amount, …                for few clips
        emotion_accuracy, …,            recall of the labels: `avatar.metrics.control`; None for fewer than two classes
          unprompted_accuracy             the same, of gestures that words cause
        drift                           `avatar.metrics.drift`; None for short clips
        clips                           number of clips

    Args:
        clips: estimated from the videos of one system.
        reference: true states of other clips, the reference distribution of motion.
    """
    lag, at_lag = lip_sync.best_lag(clips)
    return measured(
        {
            "lip_sync_r": lip_sync.correlation(clips),
            "lip_sync_r_ci": list(lip_sync.correlation_interval(clips)),
            "lip_sync_lag_ms": lag,
            "lip_sync_r_at_lag": at_lag,
            "closure_recall": lip_sync.closure_recall(clips),
            "silence_motion": lip_sync.silence_motion(clips),
            "identity_delta_e": identity.delta_e(clips),
            "undecodable_rate": identity.undecodable_rate(clips),
            "motion": drift.motion(clips),
            **distribution(clips, reference),
            **{f"{attribute}_accuracy": control.accuracy(clips, attribute) for attribute in control.LABELS},
            "unprompted_accuracy": control.unprompted(clips),
            "drift": drift.drift(clips),
            "clips": len(clips),
        }
    )


def measured(value: Any) -> Any:
    """A nested value with None in place of every number that is not finite."""
    if isinstance(value, dict):
        return {key: measured(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [measured(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
