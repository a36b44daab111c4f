"""Batches depend only on (seed, step), for any shard of them; placement follows its shares."""

from collections import Counter

import numpy as np
import pytest
import torch

from avatar.data.batch_schedule import ANYWHERE, AT_START, ON_CHANGE, UNIFORM, BatchSchedule, Placement, changes, place
from avatar.data.bucketing import BatchShard, LengthBuckets, check_ranks
from avatar.data.encoded_clips import EncodedClips
from avatar.data.puppet_latents import GLOBAL_BATCHES, LatentBatches
from avatar.models.audio_encoders.log_mel import LogMel
from avatar.models.text_encoders.bytes import ByteTokenizer
from avatar.types import REGIONS, Batch
from tests.stages import composed

BUCKETS = LengthBuckets((1, 3, 6), (1.0, 1.0, 2.0), 24)
SIZES = np.array([(6, 1, 1), (8, 1, 1), (2, 1, 1), (7, 2, 1), (9, 2, 1), (6, 1, 1), (12, 1, 1), *4 * [(6, 1, 1)]])
STEPS = 400


def plan(seed: int = 1, steps: int = STEPS, buckets: LengthBuckets = BUCKETS, placement: Placement = UNIFORM):
    return BatchSchedule(SIZES, buckets, placement, seed, steps)


plan_batches = [plan().batch(step) for step in range(STEPS)]


def message(draws) -> list[tuple]:
    return [(draw.sample, draw.length, draw.kind, draw.rng().random()) for draw in draws]


def test_a_batch_depends_only_on_seed_and_step():
    forwards, backwards, longer = plan(), plan(), plan(steps=3 * STEPS)
    expected = [message(forwards.batch(step)) for step in range(60)]
    assert [message(backwards.batch(step)) for step in reversed(range(60))] == expected[::-1]
    assert [message(longer.batch(step)) for step in range(60)] == expected
    assert [message(plan(seed=2).batch(step)) for step in range(60)] != expected


def test_batches_have_one_bucket_and_a_bounded_size():
    for step in range(STEPS):
        draws = plan_batches[step]
        (length,) = {draw.length for draw in draws}
        ((height, width),) = {tuple(SIZES[draw.sample, 1:]) for draw in draws}
        assert len(draws) == 24 // (length * height * width)
        assert all(SIZES[draw.sample, 0] >= length for draw in draws)


def test_lengths_follow_their_weights_and_samples_are_uniform():
    lengths = Counter(draws[0].length for draws in plan_batches)
    assert np.allclose([lengths[n] / STEPS for n in (1, 3, 6)], (0.25, 0.25, 0.5), atol=0.07)
    long = Counter(draw.sample for draws in plan_batches for draw in draws if draw.length == 6)
    assert set(long) == {0, 1, *range(3, 11)}
    assert max(long.values()) < 1.35 * min(long.values())


def test_each_epoch_has_every_sample_once_in_another_order():
    orders: dict[tuple, list[int]] = {}
    for draws in plan_batches:
        orders.setdefault((draws[0].length, *SIZES[draws[0].sample, 1:]), []).extend(draw.sample for draw in draws)
    assert len(orders) == 6
    for samples in orders.values():
        n = len(set(samples))
        epochs = [tuple(samples[i : i + n]) for i in range(0, len(samples) - n, n)]
        assert len(epochs) > 5 and all(len(set(epoch)) == n for epoch in epochs)
        assert len(set(epochs)) > 1


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_split_batches_evenly_and_their_number_can_change(ranks):
    """Steps 0 … 9 on one rank, 10 … on several: nothing is repeated or left out."""
    buckets = LengthBuckets((1, 3, 6), (1.0, 1.0, 2.0), 48, batch_multiple_of=4)
    check_ranks(buckets, ranks)
    first, again = plan(buckets=buckets), plan(buckets=buckets)
    alone = [message(first.batch(step)) for step in range(25)]
    for step in range(10, 25):
        parts = [message(again.batch(step)[rank::ranks]) for rank in range(ranks)]
        assert len({len(part) for part in parts}) == 1
        assert len({draw[1] for part in parts for draw in part}) == 1  # the same bucket on all of them
        assert sorted(draw for part in parts for draw in part) == sorted(alone[step])


def test_batches_that_ranks_cannot_split_evenly_are_rejected():
    with pytest.raises(ValueError, match=r"3 ranks × 1 micro-batches.*set buckets\.batch_multiple_of=3"):
        check_ranks(LengthBuckets((1,), (1.0,), 24, batch_multiple_of=2), 3)
    with pytest.raises(ValueError, match=r"2 ranks × 3 micro-batches.*set buckets\.batch_multiple_of=6"):
        check_ranks(LengthBuckets((1,), (1.0,), 24, batch_multiple_of=4, accumulate=3), 2)
    with pytest.raises(ValueError, match="got 4 ranks; expected at most 3"):
        check_ranks(LengthBuckets((1,), (1.0,), 24, batch_multiple_of=4), 4, samples=3)
    with pytest.raises(ValueError, match=r"max_latents_per_batch=24; expected at least 32 for 4 clip.* of 8 latents"):
        LengthBuckets((8,), (1.0,), 24, batch_multiple_of=4)
    with pytest.raises(ValueError, match="expected numbers of at least 0"):
        LengthBuckets((1, 2), (1.0, -1.0), 24)
    with pytest.raises(ValueError, match="batch_multiple_of=0"):
        LengthBuckets((1,), (1.0,), 24, batch_multiple_of=0)


def test_description_of_the_global_batch():
    message = LengthBuckets((3, 8), (0.2, 0.8), 192, batch_multiple_of=4, accumulate=2).describe_batch(ranks=2)
    clips = "64 clips of 3 latents or 24 clips of 8 latents"
    assert message == f"global batch: {clips}, on 2 ranks × 2 micro-batches"
    of_sizes = LengthBuckets((3, 8), (0.2, 0.8), 512, batch_multiple_of=2).describe_batch(1, {4, 9, 16})
    assert of_sizes == "global batch: 10 to 42 clips of 3 latents or 4 to 16 clips of 8 latents"


def test_ranks_and_micro_batches_partition_every_batch():
    shards = [BatchShard(rank, ranks=3, accumulate=2) for rank in range(3)]
    for step in range(4):
        taken = []
        for turn in range(2):
            parts = [shard.locate(2 * step + turn) for shard in shards]
            assert [batch for batch, _ in parts] == [step] * 3
            taken += [clip for _, part in parts for clip in range(12)[part]]
        assert sorted(taken) == list(range(12))


def test_batches_are_at_most_max_latents_per_batch():
    buckets = LengthBuckets((1, 24), (0.5, 0.5), 12288, batch_multiple_of=8)
    buckets.check_area(64)  # 64 x 64 pixels
    with pytest.raises(ValueError, match=rf"expected at least {8 * 24 * 65} for 8 clip.* of 24 latents of 65 pixels"):
        buckets.check_area(65)
    for area in (1, 50, 64):
        counts = [buckets.count(length, area) for length in buckets.lengths]
        assert all(
            count * length * area <= 12288 and count % 8 == 0 < count
            for count, length in zip(counts, buckets.lengths, strict=True)
        )


def test_batches_of_large_models_fit_64_ranks():
    cfg = composed(
        "train", "experiment=large/teacher", "data.urls=x", "data.buckets.batch_multiple_of=64", "accumulate=1"
    )
    buckets = LengthBuckets(**{k: v for k, v in cfg.data.buckets.items() if k != "_target_"})
    buckets.check_area(60 * 104)
    assert buckets.count(20, 60 * 104) == 64


def test_a_length_that_no_sample_reaches_is_rejected():
    with pytest.raises(ValueError, match=r"crops of 13 latents; expected at most 12"):
        plan(buckets=LengthBuckets((13,), (1.0,), 24))


def test_kinds_follow_their_shares_where_possible():
    placement, rng = Placement(starts=0.3, short=2, transitions=0.5), np.random.default_rng(0)

    def shares(length: int) -> list[float]:
        kinds = placement.kinds(rng, length, 4000)
        return [float((kinds == kind).mean()) for kind in (AT_START, ON_CHANGE, ANYWHERE)]

    assert np.allclose(shares(1), (0.3, 0, 0.7), atol=0.03)
    assert np.allclose(shares(2), (0.3, 0.5, 0.2), atol=0.03)
    assert np.allclose(shares(5), (0, 0.5, 0.5), atol=0.03)


def test_schedules_follow_their_placement():
    placed = plan(placement=Placement(starts=0.5, short=1))
    kinds = [draw.kind for step in range(100) for draw in placed.batch(step) if draw.length == 1]
    assert 0.4 < np.mean(np.array(kinds) == AT_START) < 0.6


@pytest.mark.parametrize("length", [2, 3, 7])
def test_crops_over_a_change_contain_it(length):
    state, rng = np.array([1, 3, 3, 3, 1, 1, 2]), np.random.default_rng(0)
    at = changes(state)
    assert at.tolist() == [1, 4, 6]
    starts = Counter(place(ON_CHANGE, rng, length, 7, at, 0) for _ in range(300))
    assert all(len(set(state[start : start + length])) > 1 and start + length <= 7 for start in starts)
    reachable = {start for start in range(8 - length) if len(set(state[start : start + length])) > 1}
    assert set(starts) == reachable


def test_other_crops_are_at_the_start_or_anywhere():
    rng, none = np.random.default_rng(0), np.array([], int)
    assert place(AT_START, rng, 2, 7, np.array([3]), 4) == 0
    assert place(ANYWHERE, rng, 2, 7, np.array([3]), 4) == 4
    assert place(ON_CHANGE, rng, 2, 7, none, 4) == 4


def test_substitutes_are_deterministic_and_of_the_same_bucket():
    (draw, *_) = plan_batches[3]
    others = [draw.substitute(attempt) for attempt in range(1, 400)]
    assert {other.length for other in others} == {draw.length}
    assert {other.sample for other in others} == set(draw.pool.tolist())
    assert [other.sample for other in others] == [draw.substitute(n).sample for n in range(1, 400)]


@pytest.mark.parametrize("shares", [(0.6, 0.6), (-0.1, 0.2)])
def test_invalid_shares_are_rejected(shares):
    with pytest.raises(ValueError, match="a sum of at most 1"):
        Placement(starts=shares[0], transitions=shares[1])


# Batches of puppet clips, with the same placement.

AUDIO, TEXT = LogMel(mels=2), ByteTokenizer(8)


def puppets(state: np.ndarray) -> EncodedClips:
    """Clips of random numbers in these states."""
    n, k = state.shape
    labels = torch.zeros(n, 3, k, dtype=torch.long)
    labels[:, 0] = torch.from_numpy(state)
    return EncodedClips(
        latents=torch.randn(n, 2, k, 1, 1),
        references=torch.randn(n, 4, 2, 1, 1),
        swapped=torch.randn(n, 4, 2, 1, 1),
        reference_at=torch.linspace(0, k - 1, 4).long().expand(n, 4),
        features=torch.randn(n, 2, AUDIO.left_context + 4 * k + AUDIO.right_context, AUDIO.dim),
        other=torch.ones(n, dtype=torch.bool),
        text=torch.ones(1, 4, dtype=torch.long),
        captioned=torch.zeros(n, k, dtype=torch.long),
        labels=labels,
        intensity=torch.zeros(n, k),
        regions=torch.zeros(n, len(REGIONS), k, 1, 1),
    )


STATE = np.ones((8, 20), int)
STATE[2, 15:] = STATE[5, 3:] = 2
CLIPS = puppets(STATE)


def draw_batches(placement: Placement = UNIFORM, steps: int = 30, shard: BatchShard = GLOBAL_BATCHES) -> list[Batch]:
    batches = LatentBatches(CLIPS, LengthBuckets((2,), (1.0,), 32), AUDIO, TEXT, 1, 0, steps, placement, shard)
    return [batches[i] for i in range(steps)]


def test_placement_of_puppet_crops_follows_its_shares():
    def shares(placement: Placement) -> tuple[float, float]:
        batches = draw_batches(placement)
        starts = [key.endswith("@0") for batch in batches for key in batch.keys]
        changing = torch.cat([batch.conditioning.state for batch in batches]).diff(dim=1).ne(0).float().mean()
        return float(np.mean(starts)), float(changing)

    starts, changing = shares(UNIFORM)
    assert starts < 0.1 and changing < 0.05
    starts, changing = shares(Placement(starts=0.25, short=2, transitions=0.5))
    assert 0.2 < starts < 0.32 and 0.44 < changing < 0.56


def test_crops_are_placed_over_changes_of_every_label():
    clips = puppets(np.ones((8, 20), int))
    clips.labels[3, 2, 9:13] = 4  # a gesture
    clips.labels[6, 1, 16:] = 2  # an emotion
    loader = LatentBatches(clips, LengthBuckets((4,), (1.0,), 64), AUDIO, TEXT, 1, 0, 20, Placement(transitions=1.0))
    crops = {key for i in range(20) for key in loader[i].keys}
    assert {key.split("@")[0] for key in crops} == {"3", "6"}
    for key in crops:
        n, start = map(int, key.split("@"))
        assert len(clips.labels[n, :, start : start + 4].T.unique(dim=0)) > 1


def test_uniform_placement_draws_no_random_numbers():
    for step, batch in enumerate(draw_batches(steps=6)):
        rng = np.random.default_rng([1, step])
        rng.choice((2,), p=[1.0])
        which, start = rng.integers(8, size=16), rng.integers(19, size=16)
        assert batch.keys == [f"{n}@{s}" for n, s in zip(which, start, strict=True)]


def test_ranks_split_batches_of_puppets():
    placement = Placement(starts=0.25, short=2, transitions=0.5)
    parts = [draw_batches(placement, 6, BatchShard(rank, 2)) for rank in (0, 1)]
    for batch, even, odd in zip(draw_batches(placement, 6), *parts, strict=True):
        assert even.keys == batch.keys[0::2] and odd.keys == batch.keys[1::2]
        assert torch.equal(odd.latents, batch.latents[1::2])
