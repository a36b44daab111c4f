"""Everything that is said of a set of clips, ready for JSON: what can't be measured is None."""

import math
from collections.abc import Sequence
from typing import Any

from avatar.metrics import control, drift, identity, lip_sync
from avatar.metrics.distribution import Trajectory, distribution
from avatar.metrics.state_estimation import EstimatedClip


def score(readings: Sequence[EstimatedClip], others: Sequence[Trajectory] = ()) -> dict[str, Any]:
    """The scores of clips, pooled; `others` are the true states of other clips, which show how puppets move.

    lip_sync_r: correlation of apertures at lag 0, `lip_sync_r_ci` its 95 % interval; lip_sync_lag_ms: positive if the
    lips are late, `lip_sync_r_at_lag` the correlation there; closure_recall: of p, b and m; silence_motion: aperture
    per frame; identity_delta_e: CIE76; undecodable_rate: share of frames; motion: per frame, in shares of the
    channels' ranges; frechet, coverage, motion_amount, motion_roughness, some with intervals: see
    `avatar.metrics.distribution`, None without others or for few clips; emotion_accuracy, state_accuracy,
    gesture_accuracy, unprompted_accuracy (of gestures that words cause): see `avatar.metrics.control`, None unless two
    classes were asked for; drift: see `avatar.metrics.drift`, None for short clips; clips: how many.
    """
    lag, at_lag = lip_sync.best_lag(readings)
    return measured(
        {
            "lip_sync_r": lip_sync.correlation(readings),
            "lip_sync_r_ci": list(lip_sync.correlation_interval(readings)),
            "lip_sync_lag_ms": lag,
            "lip_sync_r_at_lag": at_lag,
            "closure_recall": lip_sync.closure_recall(readings),
            "silence_motion": lip_sync.silence_motion(readings),
            "identity_delta_e": identity.delta_e(readings),
            "undecodable_rate": identity.undecodable_rate(readings),
            "motion": drift.motion(readings),
            **distribution(readings, others),
            **{f"{attribute}_accuracy": control.accuracy(readings, attribute) for attribute in control.CLASSIFIERS},
            "unprompted_accuracy": control.unprompted(readings),
            "drift": drift.drift(readings),
            "clips": len(readings),
        }
    )


def measured(value: Any) -> Any:
    """The same with None for every number that isn't finite, however deep it lies."""
    if isinstance(value, dict):
        return {key: measured(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [measured(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
