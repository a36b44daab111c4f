"""Joint dropout of modalities: its shares, and that every branch of guidance is trained."""

from collections import Counter
from itertools import product

import pytest
import torch

from avatar.conditioning.dropout import COMBINATIONS, MODALITIES, Dropout
from avatar.diffusion.guidance import Guidance
from tests.conftest import make_cond
from tests.stages import composed

SAMPLES = 20_000


def shares(dropout: Dropout) -> dict[tuple[str, ...], float]:
    """The share of samples with each combination of kept modalities."""
    cond = make_cond(batch=SAMPLES, latents=1)
    cond.emotion, cond.audio_mask = torch.ones_like(cond.emotion), torch.ones_like(cond.audio_mask)
    kept = dropout(cond, torch.rand)
    present = torch.stack(
        [kept.audio_mask.flatten(1).any(1), kept.text_mask.flatten(1).any(1), kept.emotion.flatten(1).any(1)], dim=1
    )
    counts = Counter(
        tuple(name for name, flag in zip(MODALITIES, row, strict=True) if flag) for row in present.tolist()
    )
    return {combination: count / SAMPLES for combination, count in counts.items()}


def test_combinations_have_their_probabilities():
    dropout = Dropout({"none": 0.1, "text": 0.2, "audio_labels": 0.3})
    found = shares(dropout)
    for combination, expected in {(): 0.1, ("text",): 0.2, ("audio", "labels"): 0.3, MODALITIES: 0.4}.items():
        assert found[combination] == pytest.approx(expected, abs=0.015)
    assert len(found) == 4
    assert shares(Dropout({})) == {MODALITIES: 1.0}


@pytest.mark.parametrize("config, objective", [("train", "flow_matching"), ("distill", "teacher_forcing")])
def test_every_branch_of_guidance_has_at_least_five_percent_of_samples(config, objective):
    cfg = composed(config, f"objective={objective}", "folder=/tmp/run", "name=test")
    found = shares(Dropout(dict(cfg.objective.dropout.kept)))
    for scales in product((1.0, 2.0, 3.0), repeat=3):
        for _, dropped in Guidance(*scales).branches():
            branch = tuple(name for name in MODALITIES if not dropped[name])
            assert found.get(branch, 0.0) >= 0.045, branch


@pytest.mark.parametrize("kept", [{"none": -0.1}, {"none": 0.6, "text": 0.6}, {"none": float("nan")}, {"words": 0.1}])
def test_invalid_probabilities_are_rejected(kept):
    with pytest.raises(ValueError, match=r"got dropout\.kept.*expected"):
        Dropout(kept)


def test_names_of_combinations_are_their_modalities():
    assert all(name == ("_".join(combination) or "none") for name, combination in COMBINATIONS.items())
