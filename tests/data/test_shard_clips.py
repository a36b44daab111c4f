"""Prepared sets: crops are slices of what the shards hold, WebDataset reads the same, and trouble has a name."""

import json
import logging
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import webdataset

from avatar.commands import preprocess
from avatar.data.batch_schedule import EVENLY, Placement
from avatar.data.bucketing import LengthBuckets
from avatar.data.shard_index import Filters
from avatar.data.shard_samples import Footage
from avatar.data.shards import ShardClips
from avatar.data.tar import Tars
from avatar.media.video_reader import Decord, PyAV, open_video
from avatar.models import bundle
from avatar.models.audio_encoders.log_mel import LogMel
from avatar.models.text_encoders.bytes import ByteTokenizer
from avatar.types import REGIONS, STATES
from tests.data.preprocess.films import talk
from tests.data.shard_sets import AUDIO, STRIDE, TEXT, autoencoder, flac, mp4, png, sample, write_set
from tests.stages import ANY_DATA, composed, fitted

CPU = torch.device("cpu")
BUCKETS = LengthBuckets((1, 3, 6), (0.2, 0.4, 0.4), 12)
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore:This DataLoader will create"
)


def data(*urls, ranks: int = 1, rank: int = 0, **changes) -> ShardClips:
    """A data module that is set up."""
    arguments = {
        "train": "train",
        "dev": "dev",
        "filters": Filters(None, "keep"),
        "pictures": None,
        "autoencoder": autoencoder(),
        "audio": AUDIO,
        "text": TEXT,
        "pause": 4,
        "history": 2,
        "region_weights": {"face": 1.0, "lips": 1.0},
        "buckets": BUCKETS,
        "placement": EVENLY,
        "on_error": "raise",
        "steps": 8,
        "seed": 1,
        "workers": 0,
    }
    module = ShardClips([str(url) for url in urls], **arguments | changes)
    if ranks > 1:
        module.trainer = SimpleNamespace(world_size=ranks, global_rank=rank)  # pyright: ignore
    module.check(ranks)
    module.setup("fit")
    return module


def keys(loader) -> list[list[str]]:
    return [batch.keys for batch in loader]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Nine samples to train on, of three lengths, over two shards."""
    return write_set(tmp_path_factory.mktemp("sets") / "a", {"train": 9, "dev": 4}, frames=(25, 33, 41))


@pytest.fixture
def fresh(tmp_path):
    return write_set(tmp_path / "b", {"train": 6, "dev": 2}, frames=(25, 33))


def shard(folder, number: int = 0):
    return folder / "shards" / f"train-{number:06d}.tar"


def test_webdataset_reads_the_shards_that_are_trained_on(whole):
    """The same samples by a stream from the first byte to the last, and by place."""
    streamed = {}
    for path in sorted((whole / "shards").glob("train-*.tar")):
        for found in webdataset.WebDataset(str(path), shardshuffle=False).decode():
            streamed[found["__key__"]] = found
    module = data(whole)
    assert set(streamed) == {entry.key for entry in module.readers["train"].entries}
    for batch in module.train_dataloader():
        for n, key in enumerate(batch.keys):
            name, start = key.split("@")
            latents = streamed[name]["latent.npy"][:, 1 + int(start) :][:, : batch.latents.shape[2]]
            assert torch.equal(batch.latents[n], torch.from_numpy(latents).float())


def test_a_crop_is_a_slice_of_its_sample(whole):
    for batch in data(whole).train_dataloader():
        length = batch.latents.shape[2]
        for n, key in enumerate(batch.keys):
            name, start = key.split("@")
            first, entry = int(start), sample(name, {0: 25, 1: 33, 2: 41}[int(name[-3:]) % 3])
            part = slice(1 + first, 1 + first + length)  # latent 0 is the first frame's
            assert np.array_equal(batch.latents[n].numpy(), entry["latent.npy"][:, part].astype(np.float32))
            cond = batch.conditioning
            assert np.array_equal(cond.reference[n].numpy(), entry["ref_latent.npy"].astype(np.float32))
            features = torch.from_numpy(entry["afeat.npy"][:, 0].astype(np.float32))
            for l in range(length):
                at = 1 + STRIDE * (first + l) - AUDIO.left_context + np.arange(AUDIO.tokens(STRIDE))
                expected = [features[i] if 0 <= i < len(features) else AUDIO.silence[0] for i in at]
                assert torch.equal(cond.audio[n, 0, l], torch.stack(expected))
                assert bool(cond.audio_mask[n, 0, l]) == (at[-1] < len(features))
            ids, mask = TEXT.encode([entry["txt"]])
            assert torch.equal(cond.text[n], ids) and torch.equal(cond.text_mask[n], mask)
            assert (cond.state[n] == STATES.index("speaking")).all()
            assert not cond.audio_mask[n, 1].any() and not batch.regions[n].any()
            assert not (cond.emotion[n].any() or cond.gesture[n].any() or cond.text_event[n].any())


def test_a_second_look_at_the_same_batches_sees_the_same_and_later_ones_are_others(whole):
    """Against replayed epochs: what a step draws depends on the step, not on how often somebody began."""
    module = data(whole)
    first = keys(module.train_dataloader())
    assert keys(module.train_dataloader()) == first
    module.start = 8
    assert not {tuple(batch) for batch in keys(module.train_dataloader())} & {tuple(batch) for batch in first}


@pytest.mark.parametrize("workers", [1, 3])  # more than there are shards
def test_workers_change_neither_the_number_of_batches_nor_what_is_in_them(whole, workers):
    """Against lengths that count by worker, and against workers without a shard."""
    alone, shared = data(whole, steps=7), data(whole, steps=7, workers=workers)
    for one, other in zip(alone.train_dataloader(), shared.train_dataloader(), strict=True):
        assert one.keys == other.keys and torch.equal(one.latents, other.latents)


def test_ranks_take_equal_parts_of_the_batches_of_one(whole):
    buckets = LengthBuckets((1, 3, 6), (0.2, 0.4, 0.4), 12, batch_multiple_of=2)
    alone = list(data(whole, buckets=buckets).train_dataloader())
    parts = [list(data(whole, buckets=buckets, ranks=2, rank=rank).train_dataloader()) for rank in (0, 1)]
    for batch, *ranks in zip(alone, *parts, strict=True):
        assert [part.latents.shape for part in ranks] == [(len(batch.keys) // 2, *batch.latents.shape[1:])] * 2
        for rank, part in enumerate(ranks):
            assert part.keys == batch.keys[rank::2] and torch.equal(part.latents, batch.latents[rank::2])


def test_batches_started_later_are_those_that_would_have_come(whole):
    module = data(whole)
    expected = list(module.train_dataloader())
    module.start, module.steps = 3, 5
    for one, other in zip(expected[3:], module.train_dataloader(), strict=True):
        assert one.keys == other.keys and torch.equal(one.conditioning.audio, other.conditioning.audio)


def test_several_sets_and_sizes_are_drawn_together(whole, tmp_path):
    other = write_set(tmp_path / "wide", {"train": 6, "dev": 1}, frames=(33,), sizes=((2, 1), (1, 1)))
    seen, shapes = set(), set()
    for batch in data(whole, other, steps=30).train_dataloader():
        seen |= {key.split("@")[0] for key in batch.keys}
        shapes.add((len(batch.keys), *batch.latents.shape[2:]))
    assert len(seen) == 15
    assert {(12, 1, 1, 1), (6, 1, 2, 1), (4, 3, 1, 1), (2, 3, 2, 1)} <= shapes  # within the budget


def test_a_text_of_features_is_padded_to_the_room_that_the_encoder_gives(tmp_path):
    def make(key, frames, height, width):
        files = sample(key, frames, height, width)
        words = int(key[-1]) + 1
        return files | {"text.npy": np.arange(100, 100 + words)} if words < 3 else {**files, "txt": ""}

    folder = write_set(tmp_path / "t", {"train": 3, "dev": 1}, make=make)
    for batch in data(folder).train_dataloader():
        for n, key in enumerate(batch.keys):
            words = (int(key.split("@")[0][-1]) + 1) % 3
            expected = torch.zeros(96, dtype=torch.long)
            expected[:words] = torch.arange(100, 100 + words)
            assert torch.equal(batch.conditioning.text[n, 0], expected)
            assert torch.equal(batch.conditioning.text_mask[n, 0], expected > 0)


def test_features_of_another_encoder_are_made_from_the_sound(tmp_path):
    """All but the last frame's, which would hear a silence that isn't there."""
    sound = np.random.default_rng(0).integers(-3000, 3000, 27 * 640).astype(np.int16)
    folder = write_set(
        tmp_path / "o",
        {"train": 1, "dev": 1},
        frames=(27,),
        make=lambda *of: sample(*of) | {"audio.flac": flac(sound)},
    )
    other = LogMel(mels=10)
    batch = next(iter(data(folder, audio=other, buckets=LengthBuckets((6,), (1.0,), 6)).train_dataloader()))
    features = other.encode(torch.from_numpy(sound / np.float32(2**15)))
    for l in range(5):
        at = slice(1 + STRIDE * l, 1 + STRIDE * (l + 1) + other.right_context)
        assert torch.equal(batch.conditioning.audio[0, 0, l, other.left_context :], features[at])
    assert batch.conditioning.audio_mask[0, 0].tolist() == [True] * 5 + [False]  # it hears frame 26


def test_states_come_from_their_file_or_from_speech_with_short_pauses(tmp_path):
    vad = np.ones(33, np.uint8)
    vad[9:13], vad[17:33] = 0, 0  # a pause of four frames, then an end

    def make(key, frames, height, width):
        files = sample(key, frames, height, width) | {"vad.npy": vad}
        return files | {"state.npy": np.full(frames, 3, np.uint8)} if key.endswith("1") else files

    folder = write_set(tmp_path / "s", {"train": 2, "dev": 1}, make=make)
    buckets = LengthBuckets((8,), (1.0,), 16)
    for pause, spoken in ((4, [1, 1, 1, 1, 0, 0, 0, 0]), (3, [1, 1, 0, 1, 0, 0, 0, 0]), (None, [0] * 8)):
        batch = next(iter(data(folder, pause=pause, buckets=buckets).train_dataloader()))
        for key, state in zip(batch.keys, batch.conditioning.state.tolist(), strict=True):
            assert state == ([3] * 8 if "001@" in key else spoken)


def test_short_first_clips_and_changes_of_state_are_sampled_on_purpose(tmp_path):
    def make(key, frames, height, width):
        return sample(key, frames, height, width) | {"vad.npy": (np.arange(frames) > 60).astype(np.uint8)}

    folder = write_set(tmp_path / "p", {"train": 4, "dev": 1}, frames=(101,), make=make)
    buckets = LengthBuckets((2,), (1.0,), 40)

    def shares(placement: Placement) -> tuple[float, float]:
        batches = list(data(folder, buckets=buckets, placement=placement, steps=5).train_dataloader())
        starts = [key.endswith("@0") for batch in batches for key in batch.keys]
        changing = torch.cat([batch.conditioning.state for batch in batches]).diff(dim=1).ne(0).float().mean()
        return float(np.mean(starts)), float(changing)

    assert max(shares(EVENLY)) < 0.15
    starts, changing = shares(Placement(starts=0.4, short=2, transitions=0.4))
    assert 0.3 < starts < 0.55 and 0.3 < changing < 0.55


def test_a_reference_from_the_clip_itself_is_said_to_be(tmp_path):
    def make(key, frames, height, width):
        files = sample(key, frames, height, width)
        return files | {"meta.json": files["meta.json"] | {"reference": "inside" if key.endswith("0") else "outside"}}

    folder = write_set(tmp_path / "r", {"train": 2, "dev": 1}, make=make)
    for batch in data(folder).train_dataloader():
        assert all(("reference of its own" in key) == ("000@" in key) for key in batch.keys)


def moving_box(frames: int, left: float = 0.0) -> np.ndarray:
    """A face that moves to the right and, in the middle, isn't seen."""
    start = left + np.linspace(0, 0.5, frames)
    box = np.stack([start, np.full(frames, 0.1), start + 0.4, np.full(frames, 0.8)], axis=1).astype(np.float32)
    box[frames // 2 : frames // 2 + 2] = np.nan
    return box


def share(box: np.ndarray, row: int, column: int, height: int, width: int) -> float:
    """Of one pixel, by counting points."""
    if np.isnan(box).any():
        return 0.0
    y, x = ((at + (np.arange(200) + 0.5) / 200) / side for at, side in ((row, height), (column, width)))
    left, top, right, bottom = box
    return float((((left < x) & (x < right)).mean()) * ((top < y) & (y < bottom)).mean())


@pytest.mark.parametrize("mouths", ["found", "estimated"])
def test_a_crops_masks_are_the_shares_of_its_latents_pixels_that_the_boxes_cover(tmp_path, mouths):
    """Averaged over each latent's frames; a mouth that nobody looked for is taken for a part of the face."""

    def make(key, frames, height, width):
        files = sample(key, frames, height, width) | {"face.npy": moving_box(frames)}
        return files | {"lips.npy": moving_box(frames, left=0.1)} if mouths == "found" else files

    folder = write_set(tmp_path / "m", {"train": 2, "dev": 1}, sizes=((3, 4),), make=make)
    face, lips = moving_box(33), moving_box(33, left=0.1)
    if mouths == "estimated":
        width, height = (face[:, 2] - face[:, 0]) / 4, (face[:, 3] - face[:, 1]) / 3
        lips = np.stack([face[:, 0] + width, face[:, 3] - height, face[:, 2] - width, face[:, 3]], axis=1)
    boxes, seen = {"face": face, "lips": lips}, False
    for batch in data(folder, buckets=LengthBuckets((3,), (1.0,), 72), steps=3).train_dataloader():
        assert batch.regions.shape == (2, 2, 3, 3, 4)
        for n, key in enumerate(batch.keys):
            first = int(key.split("@")[1])
            for m, name in enumerate(REGIONS):
                for l in range(3):
                    frames = range(1 + STRIDE * (first + l), 1 + STRIDE * (first + l + 1))
                    expected = [np.mean([share(boxes[name][f], 1, c, 3, 4) for f in frames]) for c in range(4)]
                    np.testing.assert_allclose(batch.regions[n, m, l, 1], expected, atol=1e-2)
                    seen |= max(expected) > 0.2
    assert seen


def test_where_some_have_masks_the_others_count_evenly(whole, tmp_path):
    def make(key, frames, height, width):
        files = sample(key, frames, height, width)
        return files | {"face.npy": moving_box(frames)} if key.endswith(("1", "3")) else files

    some = write_set(tmp_path / "some", {"train": 4, "dev": 2}, make=make)
    module = data(whole, some)
    assert module.regions == {"face", "lips"} and data(whole).regions == set()
    message = {}
    for batch in module.train_dataloader():
        message |= dict(zip(batch.keys, batch.regions.flatten(1).any(dim=1).tolist(), strict=True))
    assert {key.split("@")[0] for key, known in message.items() if known} <= {"train-some-001", "train-some-003"}
    assert any(message.values()) and not all(message.values())
    assert data(some, train="dev", filters=Filters({"motion": [None, 1.0]}, "keep")).regions == {"face", "lips"}


def test_of_sets_that_were_prepared_before_the_face_detector_tells(fresh):
    path = fresh / "index.json"
    index = json.loads(path.read_text())
    for detectors, regions in (({"face": {"_target_": "mine"}}, {"face", "lips"}), ({"face": None}, set())):
        path.write_text(json.dumps(index | {"config": {"detectors": detectors}}))
        assert data(fresh).regions == regions


@pytest.mark.parametrize("region", ["face", "lips"])
def test_a_region_that_no_sample_has_a_mask_of_is_refused_before_anything_else(fresh, tmp_path, region):
    with pytest.raises(
        ValueError,
        match=rf"region_weights\.{region}=3.0, but no training sample .* set objective\.region_weights\.{region}=0, or",
    ):
        fitted(
            "train",
            tmp_path / "run",
            "data=shards",
            f"data.urls='{fresh}'",
            "objective.region_weights.lips=0.0",
            f"objective.region_weights.{region}=3.0",
            "data.buckets.max_latents_per_batch=24",
            tiny=ANY_DATA,
        )


def test_captions_are_encoded_once_by_each_reader(tmp_path):
    """UMT5 is slow on a CPU."""

    def make(key, frames, height, width):
        return sample(key, frames, height, width) | {"txt": "one for all"}

    folder, text = write_set(tmp_path / "t", {"train": 6, "dev": 1}, make=make), ByteTokenizer(96)
    asked, encode = [], text.encode
    object.__setattr__(text, "encode", lambda prompts: asked.extend(prompts) or encode(prompts))
    batches = list(data(folder, text=text).train_dataloader())
    assert asked == ["one for all"]
    (expected,), _ = encode(["one for all"])
    assert all(torch.equal(ids[0], expected) for batch in batches for ids in batch.conditioning.text)


def test_silence_that_stands_for_no_sound_is_masked(tmp_path):
    def make(key, frames, height, width):
        files = sample(key, frames, height, width)
        return files | {"meta.json": files["meta.json"] | {"repairs": ["no_audio"]}}

    folder = write_set(tmp_path / "n", {"train": 2, "dev": 1}, make=make)
    assert not any(batch.conditioning.audio_mask.any() for batch in data(folder).train_dataloader())


# What is wrong before the first step.


def test_latents_of_another_autoencoder_are_refused(whole):
    with pytest.raises(ValueError, match=r"latents of autoencoder \w+, but got autoencoder \w+; pass the one"):
        data(whole, autoencoder=autoencoder(0.5))


def test_a_set_without_latents_beside_one_with_them_is_refused(whole, tmp_path):
    def make(key, frames, height, width):
        files = sample(key, frames, height, width)
        return files | {"meta.json": files["meta.json"] | {"latent": None}}

    bare = write_set(tmp_path / "bare", {"train": 2, "dev": 1}, make=make)
    with pytest.raises(ValueError, match="bare has no latents, as others have"):
        data(whole, bare)
    assert data(bare).readers["train"].recipe.pictures == "video"


def test_filters_bound_scores_and_what_has_none_is_the_users_choice(tmp_path):
    folder = write_set(
        tmp_path / "f", {"train": 6, "dev": 6}, scores=lambda n: {"motion": n / 10, "sync": None if n % 2 else 0.5}
    )

    def numbers(bounds, unmeasured) -> list[int]:
        module = data(folder, filters=Filters(bounds, unmeasured))
        return [int(entry.key[-3:]) for entry in module.readers["train"].entries]

    assert sorted(numbers({"motion": [0.2, None]}, "keep")) == [2, 3, 4, 5]
    assert sorted(numbers({"motion": [None, 0.2]}, "keep")) == [0, 1, 2]
    assert sorted(numbers({"motion": [0.2, 0.4], "sync": [0.4, None]}, "drop")) == [2, 4]
    assert sorted(numbers({"motion": [0.2, 0.4], "sync": [0.4, None]}, "keep")) == [2, 3, 4]
    with pytest.raises(ValueError, match=r"none of the 6 samples of split 'train'.*widen"):
        numbers({"motion": [0.9, None]}, "keep")
    with pytest.raises(ValueError, match=r"no score beauty in .*; filter by any of motion, sync"):
        numbers({"beauty": [0.9, None]}, "keep")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "bounds", [{"motion": [0.1]}, {"motion": [0.3, 0.1]}, {"motion": ["a", None]}, {"motion": 0.1}]
)
def test_bounds_that_are_none_are_refused(bounds):
    with pytest.raises(ValueError, match="wanted"):
        Filters(bounds, "keep")


def test_sets_that_are_not_there_or_not_finished_are_refused(fresh, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        data(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no split 'train2' in .*, only dev, train"):
        data(fresh, train="train2")
    (fresh / "index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no index.json, which a finished set has; run"):
        data(fresh)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda index: index | {"schema": 99}, "schema 99"),
        (lambda index: {"schema": 1}, "no index of schema 1"),
        (lambda index: json.loads(json.dumps(index).replace("train-b-000", "train-v1.5-000")), "key 'train-v1.5-000'"),
        (lambda index: json.loads(json.dumps(index).replace("train-b-000", "train-b-001")), "the same key twice"),
        (lambda index: json.loads(json.dumps(index).replace("frames", "length")), "without its size"),
    ],
    ids=["schema", "nothing", "dot", "twice", "no size"],
)
def test_an_index_that_is_another_is_refused(fresh, change, message):
    path = fresh / "index.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=message):
        data(fresh)


def test_other_mistakes_are_told_before_the_first_step(whole):
    with pytest.raises(ValueError, match="8 ranks for 4 samples"):
        data(whole, train="dev", ranks=8, buckets=LengthBuckets((1,), (1.0,), 24, batch_multiple_of=8))
    with pytest.raises(ValueError, match=r"on 2 ranks"):
        data(whole, ranks=2)
    with pytest.raises(ValueError, match=r"crops of 11 latents.*'train' has 10"):
        data(whole, buckets=LengthBuckets((11,), (1.0,), 24))
    large = write_set(whole.parent / "large", {"train": 1, "dev": 1}, sizes=((4, 5),))
    expected = r"can't hold 1 clip.* of 6 latents of 20 pixels; raise it to .*max_latents_per_batch=120,"
    with pytest.raises(ValueError, match=expected):
        data(whole, large)
    with pytest.raises(ValueError, match="wanted raise or skip"):
        data(whole, on_error="ignore")
    with pytest.raises(ValueError, match="each once"):
        data(whole, whole)


# What goes wrong on the way.


@pytest.mark.parametrize(
    "boxes", [np.zeros((32, 4), np.float32), np.zeros((33, 8), np.float32), np.full((33, 4), np.inf, np.float32)]
)
def test_boxes_that_are_none_are_named(tmp_path, boxes):
    folder = write_set(tmp_path / "d", {"train": 1, "dev": 1}, make=lambda *of: sample(*of) | {"face.npy": boxes})
    with pytest.raises(ValueError, match=r"train-d-000 of .*wanted"):
        list(data(folder).train_dataloader())


def test_boxes_of_regions_that_do_not_count_are_not_looked_at(tmp_path):
    boxes = {"face.npy": np.full((33, 4), np.inf, np.float32)}
    folder = write_set(tmp_path / "d", {"train": 1, "dev": 1}, make=lambda *of: sample(*of) | boxes)
    for batch in data(folder, region_weights={"face": 0.0, "lips": 0.0}).train_dataloader():
        assert not batch.regions.any()


def damage(path, how: str) -> None:
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "cut off":
        path.write_bytes(content[: len(content) // 2])
    elif how == "flipped":  # inside the latents of its first sample
        at = content.index(b"latent.npy") + 512
        path.write_bytes(content[:at] + bytes(128) + content[at + 128 :])


@pytest.mark.parametrize("how", ["gone", "cut off", "flipped"])
def test_trouble_while_training_is_named_or_skipped_and_counted(fresh, caplog, how):
    before = data(fresh, on_error="skip", steps=16)
    expected = list(before.train_dataloader())
    damage(shard(fresh), how)
    module = data(fresh, on_error="skip", steps=16)
    with caplog.at_level(logging.WARNING):
        batches = list(module.train_dataloader())
        module.teardown("fit")
    bad = {key for line in caplog.messages if line.startswith("skipped train") for key in [line.split()[1]]}
    own = {f"train-b-{n:03d}" for n in (0, 2, 4)}
    assert bad == {"gone": own, "cut off": bad & own, "flipped": {"train-b-000"}}[how] and bad
    for was, now in zip(expected, batches, strict=True):
        assert was.latents.shape == now.latents.shape
        for old, new in zip(was.keys, now.keys, strict=True):
            assert old == new if old.split("@")[0] not in bad else new.split("@")[0] not in bad
    drawn = sum(key.split("@")[0] in bad for batch in expected for key in batch.keys)
    skips = [line for line in caplog.messages if line.startswith("skipped train")]
    assert len(skips) >= drawn > 0 and all("train-000000.tar" in line for line in skips)
    summary = caplog.messages[-1]
    assert f"skipped {len(skips)} times" in summary and all(key in summary for key in bad)

    if how == "flipped":  # which is seen by who reads it
        with pytest.raises(ValueError, match=r"train-b-000 of .*train-000000\.tar: .*restore it"):
            list(data(fresh, steps=16).train_dataloader())
    else:
        with pytest.raises(ValueError, match=r"train-000000\.tar (is gone|has .* by its index).*restore them"):
            data(fresh)


def test_substitutes_are_the_same_on_another_number_of_ranks_and_workers(fresh):
    damage(shard(fresh), "cut off")
    buckets = LengthBuckets((1, 3, 6), (0.2, 0.4, 0.4), 12, batch_multiple_of=2)
    alone = keys(data(fresh, on_error="skip", buckets=buckets).train_dataloader())
    parts = [
        keys(data(fresh, on_error="skip", buckets=buckets, ranks=2, rank=rank, workers=rank).train_dataloader())
        for rank in (0, 1)
    ]
    assert [batch[0::2] for batch in alone] == parts[0] and [batch[1::2] for batch in alone] == parts[1]


def test_skips_in_workers_are_counted(fresh):
    damage(shard(fresh), "flipped")
    alone, shared = (data(fresh, on_error="skip", steps=10, workers=workers) for workers in (0, 2))
    for module in (alone, shared):
        list(module.train_dataloader())
    counts = [module.readers["train"].faults.sum(0) for module in (alone, shared)]
    assert counts[0].sum() > 0 and torch.equal(*counts)


def test_a_shard_that_vanishes_while_training_is_named(fresh):
    module = data(fresh, steps=40)
    batches = iter(module.train_dataloader())
    next(batches)
    shard(fresh, 1).unlink()
    with pytest.raises(ValueError, match=r"train-b-00\d of .*train-000001\.tar: .*No such file.*on_error=skip"):
        list(batches)


def test_a_set_in_which_nothing_can_be_read_ends_the_run(fresh):
    module = data(fresh, on_error="skip")
    for number in (0, 1):
        shard(fresh, number).unlink()
    with pytest.raises(ValueError, match="20 samples in a row"):
        next(iter(module.train_dataloader()))


def test_held_out_clips_are_the_beginnings_of_dev(whole):
    batch = data(whole).held_out(2, CPU)
    assert batch.keys == ["dev-a-000@0", "dev-a-002@0"] and batch.latents.shape[2] == 6


# Videos, encoded while training.

SIDE, FRAMES = 32, 29
BLOCKS = np.random.default_rng(0).integers(0, 255, (FRAMES, SIDE // 8, SIDE // 8, 3))
SCENE = BLOCKS.repeat(8, 1).repeat(8, 2).astype(np.uint8)


def pixels():
    """A small autoencoder of pixels, whose latents have half of the one before in them."""
    torch.manual_seed(0)
    target = "avatar.models.autoencoders.causal_conv.CausalConvAutoencoder"
    net = bundle.new({"_target_": target, "channels": 4, "widths": [4, 4]}).eval()
    encode = net.encode

    def remembering(video):
        latents = encode(video)
        return torch.cat([latents[:, :, :1], latents[:, :, 1:] + 0.5 * latents[:, :, :-1]], 2)

    net.encode = remembering
    return net


@pytest.fixture(scope="module")
def footage(tmp_path_factory):
    """One film many times, with latents that were made of it, and the autoencoder."""
    net = pixels()
    film = mp4(SCENE)
    frames = open_video(film).read(0, FRAMES)
    video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        latents = {"latent.npy": net.encode(video)[0].numpy(), "ref_latent.npy": net.encode(video[:, :, :1])[0].numpy()}

    def make(key, frame_count, height, width):
        files = sample(key, frame_count, height, width, net) | latents | {"face.npy": moving_box(frame_count)}
        return files | {"video.mp4": film, "ref.png": png(frames[0])}

    folder = tmp_path_factory.mktemp("films") / "v"
    return write_set(folder, {"train": 3, "dev": 1}, frames=(FRAMES,), sizes=((SIDE, SIDE),), make=make), net


def test_readers_give_the_same_pictures_and_say_what_they_can_not_read():
    film = mp4(SCENE)
    first, second = open_video(film), PyAV(film)
    assert isinstance(first, Decord)
    for start, stop in ((0, FRAMES), (3, 9), (28, 29)):
        assert np.array_equal(first.read(start, stop), second.read(start, stop))
    assert np.abs(first.read(0, FRAMES).astype(int) - SCENE).mean() < 12
    for broken in (film[: len(film) // 2], b"no film", b""):
        for opened in (open_video, PyAV):
            with pytest.raises(ValueError, match="video"):
                opened(broken).read(0, FRAMES)
    for reader in (first, second):
        with pytest.raises(ValueError, match="video of 29 frames; expected at least 30"):
            reader.read(2, 30)


def test_pyav_reads_the_widths_that_decord_gets_wrong():
    film = mp4(np.full((3, 16, 48, 3), 90, np.uint8))
    assert open_video(film).read(0, 3).shape == (3, 16, 48, 3)


def test_pyav_reads_where_decord_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "decord", None)
    assert isinstance(open_video(mp4(SCENE)), PyAV)


@pytest.mark.parametrize("history", [0, 1])
def test_videos_give_the_latents_that_preparing_would_have_given(footage, history):
    """Where the autoencoder sees what came before; and all else is the same."""
    folder, net = footage
    buckets = LengthBuckets((1, 3), (0.5, 0.5), 96)
    of = {"autoencoder": net, "buckets": buckets, "steps": 6}
    latents, video = (data(folder, pictures=name, history=history, **of) for name in ("latents", "video"))
    for expected, batch in zip(latents.train_dataloader(), video.train_dataloader(), strict=True):
        assert isinstance(batch, Footage)
        made = video.on_after_batch_transfer(batch, 0)
        assert made.keys == expected.keys and torch.equal(made.regions, expected.regions)
        assert made.regions.shape == (len(made.keys), len(REGIONS), *made.latents.shape[2:])
        assert made.regions.any()
        torch.testing.assert_close(made.conditioning.reference, expected.conditioning.reference)
        assert torch.equal(made.conditioning.audio, expected.conditioning.audio)
        starts = torch.tensor([int(key.split("@")[1]) for key in made.keys])
        same = [torch.allclose(x, y, atol=1e-4) for x, y in zip(made.latents, expected.latents, strict=True)]
        assert same == [history == 1 or int(start) == 0 for start in starts]


def test_latents_are_preferred_to_videos(footage):
    folder, net = footage
    assert data(folder, autoencoder=net, buckets=LengthBuckets((1,), (1.0,), 24)).readers["train"].recipe.pictures == (
        "latents"
    )


def test_held_out_videos_are_encoded(footage):
    folder, net = footage
    batch = data(folder, autoencoder=net, pictures="video", buckets=LengthBuckets((7,), (1.0,), 112)).held_out(2, CPU)
    assert batch.latents.shape == (1, 4, 7, 4, 4)


class Brightness:
    """The simplest image encoder."""

    fingerprint = "brightness"

    dim = 1

    def encode(self, pictures):
        return pictures.mean((1, 2, 3, 4))[:, None, None]


@pytest.mark.parametrize("pictures", ["latents", "video"])
def test_image_to_video_networks_are_told_of_the_reference_in_every_batch(footage, pictures):
    folder, net = footage
    lengths = LengthBuckets((1,), (1.0,), 24)
    module = data(folder, autoencoder=net, pictures=pictures, buckets=lengths, image=Brightness())
    batches = [
        module.on_after_batch_transfer(next(iter(module.train_dataloader())), 0),
        module.held_out(1, CPU),
    ]
    for batch in batches:
        cond = batch.conditioning
        assert cond.concat_latents.shape == (len(batch.keys), 4 + 4, *batch.latents.shape[2:])
        torch.testing.assert_close(cond.image, Brightness().encode(net.decode(cond.reference)))


def test_sizes_that_the_autoencoder_can_not_take_are_refused(footage, tmp_path):
    folder = write_set(tmp_path / "odd", {"train": 1, "dev": 1}, sizes=((12, 16),))
    with pytest.raises(ValueError, match=r"is 12 × 16, .*multiples of 8; prepare with rules.multiple=8"):
        data(folder, autoencoder=footage[1], pictures="video")


def test_a_cut_off_tar_gives_whole_samples_or_none(tmp_path):
    """Wherever it ends: never a sample that lacks what stood behind the cut."""
    files = {name: name.encode() * 100 for name in ("a.npy", "meta.json", "txt")}
    folder = write_set(tmp_path / "c", {"train": 2}, shards=1, make=lambda *_: files)
    content = shard(folder).read_bytes()
    expected, wanted = {}, frozenset(files)
    for end in range(0, len(content) + 1, 256):
        shard(folder).write_bytes(content[:end])
        for key in ("train-c-000", "train-c-001"):
            try:
                found = Tars().read(shard(folder), key, wanted)
            except ValueError as error:
                assert "shard" in str(error)
            else:
                assert found == files
                expected.setdefault(key, end)
    assert 2000 < expected["train-c-000"] < expected["train-c-001"] < len(content)


def test_what_is_prepared_is_read_alike_from_latents_and_videos(tmp_path):
    """From talking videos to batches; the order has nothing to do with what is read."""
    talk(tmp_path / "talk.mov")
    changes = ["rules.shortest_s=1.0", "rules.longest_s=1.2", "rules.preset=ultrafast", "workers=0"]
    changes += ["splits={train: 1.0, dev: 0, test: 0}", "encode='${shipped}'", f"out={tmp_path / 'set'}"]
    changes.append("detectors.face={_target_: tests.data.preprocess.test_clips.FaceWithMouth}")
    preprocess.preprocess(composed("preprocess", f"source='{tmp_path}/*.mov'", "folder=/tmp", *changes))
    net = bundle.load("data/nano/autoencoder.safetensors")
    of = {"dev": "train", "autoencoder": net, "audio": LogMel(), "buckets": LengthBuckets((2,), (1.0,), 384)}
    latents, video = (data(tmp_path / "set", pictures=name, steps=3, **of) for name in (None, "video"))
    assert latents.readers["train"].recipe.pictures == "latents" and latents.regions == {"face", "lips"}
    for stored, batch in zip(latents.train_dataloader(), video.train_dataloader(), strict=True):
        made = video.on_after_batch_transfer(batch, 0)
        assert made.keys == stored.keys and len(stored.keys) == 2
        assert torch.equal(made.regions, stored.regions) and stored.regions.sum(dim=(0, 2, 3, 4)).min() > 0
        torch.testing.assert_close(made.latents, stored.latents, atol=5e-3, rtol=5e-3)
        torch.testing.assert_close(made.conditioning.reference, stored.conditioning.reference, atol=5e-3, rtol=5e-3)
