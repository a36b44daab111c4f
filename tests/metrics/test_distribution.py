"""Motion scores: each planted failure changes its own score, and true motion of other seeds changes none."""

import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.ndimage import gaussian_filter1d

from avatar.metrics import distribution as d
from avatar.puppet.motion import CHANNELS, HIGH, LOW
from avatar.types import EMOTIONS
from tests.acting import acted

MINE, OTHERS, FRAMES = 24, 40, 64
SMOOTH, ROUGH = 0.8, 1.25


@pytest.fixture(scope="module")
def motions():
    moods = np.random.default_rng(0).choice(EMOTIONS[1:], MINE + OTHERS)
    return [acted(seed, str(mood), frames=FRAMES) for seed, mood in enumerate(moods)]


CHANGES = {
    "true": lambda i, all, rng: all[i],
    "late": lambda i, all, rng: np.roll(all[i], 2, axis=0)[2:],
    "frozen": lambda i, all, rng: np.repeat(all[i][:1], FRAMES, axis=0),
    "averaged": lambda i, all, rng: np.mean([all[(i + k) % MINE] for k in range(8)], axis=0),
    "over-smoothed": lambda i, all, rng: gaussian_filter1d(all[i], 2, axis=0, mode="nearest"),
    "trembling": lambda i, all, rng: all[i] + 0.02 * (HIGH - LOW) * rng.standard_normal(all[i].shape),
    "collapsed": lambda i, all, rng: all[i % 3] + 0.002 * (HIGH - LOW) * rng.standard_normal(all[i].shape),
}
CATCHES = {
    "frozen": ("motion_amount",),
    "averaged": ("motion_amount", "frechet"),
    "over-smoothed": ("motion_roughness",),
    "trembling": ("motion_roughness",),
    "collapsed": ("coverage", "frechet"),
}


@pytest.fixture(scope="module")
def found(motions, estimated, few_draws):
    """The measures of true motion, of late true motion, and of each planted failure."""
    rng = np.random.default_rng(0)

    def measured(change) -> dict:
        made = [np.asarray(change(i, motions[:MINE], rng), np.float32) for i in range(MINE)]
        return d.distribution([estimated(frames=len(m), states=m) for m in made], motions[MINE:])

    return {name: measured(change) for name, change in CHANGES.items()}


def alarms(measures: dict) -> set[str]:
    """The measures outside their normal range."""
    amount, rough = measures["motion_amount"], measures["motion_roughness"]
    wrong = {
        "frechet": measures["frechet_ci"][0] > 1,
        "coverage": measures["coverage"] < 0.75,
        "motion_amount": not SMOOTH < amount < ROUGH,
        "motion_roughness": not (np.isnan(rough) or SMOOTH < rough < ROUGH),
    }
    return {name for name, alarm in wrong.items() if alarm}


def test_true_motion_of_other_clips_passes(found):
    truth = found["true"]
    assert not alarms(truth) and abs(truth["frechet"]) < 0.5 and truth["coverage"] > 0.85
    for name in ("frechet", "motion_amount", "motion_roughness"):
        low, high = truth[f"{name}_ci"]
        assert low < truth[name] < high


@pytest.mark.parametrize("plant", CATCHES)
def test_planted_failures_are_found_by_their_own_measure(found, plant):
    assert set(CATCHES[plant]) <= alarms(found[plant])
    assert found[plant]["frechet"] > found["true"]["frechet"]


def test_the_measures_have_the_right_direction(found):
    assert found["frozen"]["motion_amount"] == 0 and np.isnan(found["frozen"]["motion_roughness"])
    assert found["averaged"]["motion_amount"] < 0.5
    assert found["over-smoothed"]["motion_roughness"] < SMOOTH < ROUGH < found["trembling"]["motion_roughness"]
    assert alarms(found["collapsed"]) == {"coverage", "frechet"}  # the remaining modes move normally


def test_late_motion_has_the_same_measures(found):
    assert not alarms(found["late"])
    assert found["late"]["motion_roughness"] == pytest.approx(found["true"]["motion_roughness"], abs=0.05)


def test_windows_with_invalid_frames_and_unknown_channels_are_left_out(motions, estimated):
    invalid = np.isin(np.arange(FRAMES), (0, 30))
    changed = [np.where(invalid[:, None], 9, m).astype(np.float32) for m in motions[:MINE]]
    blind = [m.copy() for m in motions[:MINE]]
    for clip in blind:
        clip[:, CHANNELS.index("gaze_x")] = np.nan
    for states, valid in ((changed, ~invalid), (blind, np.ones(FRAMES, bool))):
        found = d.distribution([estimated(frames=FRAMES, states=s, valid=valid) for s in states], motions[MINE:])
        assert abs(found["motion_amount"] - 1) < 0.15 and abs(found["motion_roughness"] - 1) < 0.15
    track = np.where(invalid, np.nan, 1.0)[:, None]
    assert len(d.windows(track)) == 1 and len(d.windows(np.ones((FRAMES, 1)))) == 4  # they start at 0, 12, 24, 36
    assert len(d.windows(np.ones((d.WINDOW - 1, 1)))) == 0


def test_measures_are_nan_for_too_few_windows(motions, estimated):
    windows = [np.random.default_rng(i).normal(size=(40, 2)) for i in range(20)]
    for side in ((windows[:7], windows), (windows, windows[:7])):  # many windows of few clips
        assert np.isnan(d.coverage(*side)) and np.isnan(d.frechet(*side)).all()
    few = [estimated(frames=FRAMES, states=m) for m in motions[: d.MIN_CLIPS - 1]]
    found = d.distribution(few, motions[MINE:])
    assert np.isnan(found["frechet"]) and np.isnan(found["coverage"]) and found["motion_amount"] > 0.8
    single = [
        estimated(frames=d.WINDOW, states=m[: d.WINDOW]) for m in motions[:MINE]
    ]  # 24 windows in 2 x 21 dimensions
    assert np.isnan(d.distribution(single, motions[MINE:])["frechet"])
    short = [estimated(frames=20, states=m[:20]) for m in motions[:MINE]]
    for nothing in (d.distribution(short, motions[MINE:]), d.distribution([], motions), d.distribution(few, [])):
        assert set(nothing) == set(d.MEASURES) and np.isnan(list(nothing.values())).all()


def gaussian(rng, dims):
    root = rng.normal(size=(dims, dims))
    return rng.normal(size=dims), root @ root.T / dims


def test_the_frechet_distance_of_gaussians_is_the_analytic_one():
    rng = np.random.default_rng(0)
    (m, c), (n, e) = gaussian(rng, 5), gaussian(rng, 5)
    assert d.frechet_distance((m, c), (m, c)) == pytest.approx(0, abs=1e-9)
    assert d.frechet_distance((m, c), (n, c)) == pytest.approx(((m - n) ** 2).sum())
    assert d.frechet_distance((m, c), (m, 4 * c)) == pytest.approx(np.trace(c))  # (2 - 1)² C
    scaled = (np.zeros(2), np.diag([1.0, 9.0])), (np.array([3.0, 4.0]), np.diag([4.0, 1.0]))
    assert d.frechet_distance(*scaled) == pytest.approx(25 + 1 + 4)
    general = ((m - n) ** 2).sum() + np.trace(c + e - 2 * sqrtm(c @ e).real)
    assert d.frechet_distance((m, c), (n, e)) == pytest.approx(general) == d.frechet_distance((n, e), (m, c))
    flat = np.diag([1.0, 0.0])  # a channel that never moves
    assert d.frechet_distance((np.zeros(2), flat), (np.zeros(2), np.eye(2))) == pytest.approx(1)


def test_the_estimate_is_unbiased_for_few_clips_and_its_interval_contains_the_truth():
    rng = np.random.default_rng(1)
    (m, c), (n, e) = (np.zeros(8), np.eye(8)), (np.full(8, 0.3), np.diag(np.linspace(0.5, 1.5, 8)))
    truth = d.frechet_distance((m, c), (n, e))

    def clips(mean, cov, count):
        # Windows of a clip are not independent: half of their variance belongs to the clip.
        own, shared = rng.multivariate_normal(np.zeros(8), cov / 2, (2, 4, count))
        return list((mean + own + shared[:1]).swapaxes(0, 1))

    estimates = np.array([d.frechet(clips(m, c, 20), clips(n, e, 40)) for _ in range(40)])
    plain = d.frechet_distance(*(d._gaussian(d._moments(clips(*g))) for g in ((m, c, 20), (n, e, 40))))
    assert estimates[:, 0].mean() == pytest.approx(truth, abs=0.15) and plain > truth + 0.5
    assert ((estimates[:, 1] < truth) & (truth < estimates[:, 2])).mean() > 0.85


def test_coverage_is_near_one_for_equal_distributions_and_else_the_share_of_modes():
    rng = np.random.default_rng(2)

    def clips(count, modes):
        return [rng.normal(size=(3, 4)) + 20 * (i % modes) for i in range(count)]

    for ours, theirs in ((30, 30), (12, 120), (120, 12)):
        assert d.coverage(clips(ours, 1), clips(theirs, 1)) > 0.85
        assert d.coverage(clips(ours, 2), clips(theirs, 4)) == pytest.approx(0.5, abs=0.1)
    alike = [[rng.normal(size=4) + 0.1 * rng.normal(size=(3, 4)) for _ in range(40)] for _ in range(2)]
    assert d.coverage(*alike) > 0.85  # although the nearest windows of a clip are its own
    # Here k = 2, and the windows of the same clip are not neighbours.
    assert np.mean([d.coverage(clips(60, 1), clips(12, 1)) for _ in range(12)]) > 0.93
    spread = [3 * rng.normal(size=(3, 4)) for _ in range(30)]
    assert d.coverage(spread, clips(30, 1)) < d.coverage(clips(30, 1), clips(30, 1))
