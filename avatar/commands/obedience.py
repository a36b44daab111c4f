"""Obedience: the share of counterfactual pairs (`control_pairs`) that follow a control.

Reference, audio and noise are the same in both clips of a pair. `held_out` generates the clips, the same reader as for
all scores estimates their states, and rule-based classifiers (`avatar.metrics.control`) read the control. The same
pairs, acted by the simulator, give the share that a perfect model would reach with this reader; through the
autoencoder, the share that it would reach with these latents.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import rankdata
from torch import Tensor

from avatar.commands.control_pairs import Control, controls
from avatar.commands.held_out import HeldOutClips
from avatar.metrics import control
from avatar.metrics.state_estimation import EstimatedClip
from avatar.puppet.clip import HELD_OUT, Acting
from avatar.types import Conditioning

SHOWN = 3  # pairs per control that are kept as videos

Generate = Callable[[Conditioning, Sequence[int], str], list[Tensor]]  # conditioning, clips, title → videos


@dataclass(frozen=True)
class Shown:
    """Videos of one pair: true and generated, before and after."""

    title: str
    truth: tuple[Tensor, Tensor]
    generated: tuple[Tensor, Tensor]


def obedience(held_out: HeldOutClips, count: int, generate: Generate) -> tuple[dict[str, Any], dict[str, list[Shown]]]:
    """Scores and example videos of each control, over pairs of the first `count` held-out clips.

    Args:
        held_out: the clips.
        count: pairs per control, at most; gestures have those of their framing.
        generate: the system: videos for a conditioning of some of the clips.

    Returns:
        The scores of `metrics.control.counterfactual` per control, with `truth`, the accuracy of the acted pairs,
        `autoencoder`, that of the acted pairs through the autoencoder, and the `ratio` to the truth; of emotions also
        the rank correlation of intensities; of gestures, and in scenes with moods of emotions, also `seen_accuracy`
        and `unseen_accuracy` in combinations with a kind of puppet that training clips have and never have. And some
        pairs of each control.
    """
    scores: dict[str, Any] = {}
    shown: dict[str, list[Shown]] = {}
    for one in controls(held_out, count):
        videos = [
            generate(side.cond, one.clips, f"{one.name.replace('_', ' ')}, {what}")
            for side, what in ((one.before, "without"), (one.after, "with"))
        ]
        true = [acted(held_out, one.clips, side.acting) for side in (one.before, one.after)]
        coded = [
            [held_out.reconstructed(i, acting) for i, acting in zip(one.clips, side.acting, strict=True)]
            for side in (one.before, one.after)
        ]
        read = [_read(held_out, one.clips, side) for side in videos]
        bound, coded_bound = (
            _score(one, [_read(held_out, one.clips, side) for side in sides])["accuracy"] for sides in (true, coded)
        )
        found = _score(one, read)
        ratio = found["accuracy"] / bound if bound else math.nan
        scores[one.name] = found | {"truth": bound, "autoencoder": coded_bound, "ratio": ratio}
        if one.attribute == "gesture" or (one.attribute == "emotion" and held_out.clips.scene.moods):
            scores[one.name] |= _by_combination(one, read, [held_out.truth[i].identity.kind for i in one.clips])
        if one.name == "emotion":
            scores[one.name]["intensity_rank_correlation"] = intensity_correlation(one, read[1])
        shown[one.name] = [
            Shown(
                f"{one.labels[i]}: {held_out.truth[one.clips[i]].identity.description}",
                (true[0][i], true[1][i]),
                (videos[0][i], videos[1][i]),
            )
            for i in range(min(SHOWN, len(one.clips)))
        ]
    return scores, shown


def acted(held_out: HeldOutClips, clips: Sequence[int], acting: Sequence[Acting]) -> list[Tensor]:
    """True videos of held-out clips with another acting."""
    frames = 1 + held_out.stride * held_out.clips.latents
    made = (held_out.acted(i, one) for i, one in zip(clips, acting, strict=True))
    return [held_out.world.video(clip, 1, frames) for clip in made]


def intensity_correlation(one: Control, read: Sequence[EstimatedClip]) -> float:
    """Spearman's rank correlation of asked and shown intensity, over the pairs with an emotion that has one."""
    asked = [acting.intensity for acting in one.after.acting]
    shown = [control.intensity(clip.trajectory, label) for clip, label in zip(read, one.labels, strict=True)]
    known = [(a, b) for a, b in zip(asked, shown, strict=True) if b is not None]
    if len(known) < 3:
        return float("nan")
    ranks = rankdata(np.array(known), axis=0)
    return float(np.corrcoef(ranks.T)[0, 1])


def _by_combination(one: Control, read: Sequence[Sequence[EstimatedClip]], kinds: Sequence[str]) -> dict[str, Any]:
    unseen = np.array([pair in HELD_OUT for pair in zip(one.labels, kinds, strict=True)])

    def accuracy(rows: np.ndarray) -> float:
        part = replace(one, labels=[one.labels[i] for i in rows])
        return _score(part, [[side[i] for i in rows] for side in read])["accuracy"]

    return {
        "seen_accuracy": accuracy(np.flatnonzero(~unseen)),
        "unseen_accuracy": accuracy(np.flatnonzero(unseen)),
        "unseen_pairs": int(unseen.sum()),
    }


def _score(one: Control, read: Sequence[Sequence[EstimatedClip]]) -> dict[str, Any]:
    pairs = [(a.trajectory[one.frames], b.trajectory[one.frames]) for a, b in zip(*read, strict=True)]
    return control.counterfactual(pairs, one.labels, one.attribute)


def _read(held_out: HeldOutClips, clips: Sequence[int], videos: Sequence[Tensor]) -> list[EstimatedClip]:
    return [held_out.reader.read(held_out.truth[i], video, start=1) for i, video in zip(clips, videos, strict=True)]
