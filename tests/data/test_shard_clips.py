"""Preprocessed sets: crops equal slices of the stored samples, WebDataset reads the same, faults are reported."""

import json
import logging
import sys
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import webdataset

from avatar.commands import preprocess
from avatar.data.batch_schedule import UNIFORM, Placement
from avatar.data.bucketing import LengthBuckets
from avatar.data.shard_batches import VideoBatch
from avatar.data.shard_index import Filters
from avatar.data.shards import ShardClips
from avatar.data.tar import TarReader
from avatar.media.video_reader import Decord, PyAV, open_video
from avatar.models import bundle
from avatar.models.audio_encoders.log_mel import LogMel
from avatar.models.text_encoders.bytes import ByteTokenizer
from avatar.types import REGIONS, STATES
from tests.data.preprocess.videos import talk
from tests.data.shard_sets import AUDIO, STRIDE, TEXT, autoencoder, flac, mp4, png, sample, write_set
from tests.stages import ANY_DATA, composed, fitted

CPU = torch.device("cpu")
BUCKETS = LengthBuckets((1, 3, 6), (0.2, 0.4, 0.4), 12)
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore:This DataLoader will create"
)


def data(*urls, ranks: int = 1, rank: int = 0, **changes) -> ShardClips:
    """A data module after its setup."""
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
        "region_weights": dict.fromkeys(REGIONS, 1.0),
        "buckets": BUCKETS,
        "placement": UNIFORM,
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
def complete(tmp_path_factory):
    """Nine samples to train on, of three lengths, over two shards."""
    return write_set(tmp_path_factory.mktemp("sets") / "a", {"train": 9, "dev": 4}, frames=(25, 33, 41))


@pytest.fixture
def fresh(tmp_path):
    return write_set(tmp_path / "b", {"train": 6, "dev": 2}, frames=(25, 33))


def shard(folder, number: int = 0):
    return folder / "shards" / f"train-{number:06d}.tar"


def test_webdataset_reads_the_same_samples(complete):
    """Sequential reading gives the same samples as random access."""
    streamed = {}
    for path in sorted((complete / "shards").glob("train-*.tar")):
        for found in webdataset.WebDataset(str(path), shardshuffle=False).decode():
            streamed[found["__key__"]] = found
    module = data(complete)
    assert set(streamed) == {entry.key for entry in module.readers["train"].entries}
    for batch in module.train_dataloader():
        for n, key in enumerate(batch.keys):
            name, start = key.split("@")
            latents = streamed[name]["latent.npy"][:, 1 + int(start) :][:, : batch.latents.shape[2]]
            assert torch.equal(batch.latents[n], torch.from_numpy(latents).float())


def test_a_crop_is_a_slice_of_its_sample(complete):
    for batch in data(complete).train_dataloader():
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


def test_repeated_epochs_are_equal_and_later_batches_differ(complete):
    """A batch depends on its step, not on how often a loader was created."""
    module = data(complete)
    first = keys(module.train_dataloader())
    assert keys(module.train_dataloader()) == first
    module.start = 8
    assert not {tuple(batch) for batch in keys(module.train_dataloader())} & {tuple(batch) for batch in first}


@pytest.mark.parametrize("workers", [1, 3])  # more than shards
def test_workers_change_neither_number_nor_content_of_batches(complete, workers):
    """Lengths are not counted per worker, and workers without a shard work."""
    alone, shared = data(complete, steps=7), data(complete, steps=7, workers=workers)
    for one, other in zip(alone.train_dataloader(), shared.train_dataloader(), strict=True):
        assert one.keys == other.keys and torch.equal(one.latents, other.latents)


def test_shards_of_ranks_make_up_the_global_batch(complete):
    buckets = LengthBuckets((1, 3, 6), (0.2, 0.4, 0.4), 12, batch_multiple_of=2)
    alone = list(data(complete, buckets=buckets).train_dataloader())
    parts = [list(data(complete, buckets=buckets, ranks=2, rank=rank).train_dataloader()) for rank in (0, 1)]
    for batch, *ranks in zip(alone, *parts, strict=True):
        assert [part.latents.shape for part in ranks] == [(len(batch.keys) // 2, *batch.latents.shape[1:])] * 2
        for rank, part in enumerate(ranks):
            assert part.keys == batch.keys[rank::2] and torch.equal(part.latents, batch.latents[rank::2])


def test_resumed_batches_equal_those_of_an_uninterrupted_run(complete):
    module = data(complete)
    expected = list(module.train_dataloader())
    module.start, module.steps = 3, 5
    for one, other in zip(expected[3:], module.train_dataloader(), strict=True):
        assert one.keys == other.keys and torch.equal(one.conditioning.audio, other.conditioning.audio)


def test_several_sets_and_sizes_are_drawn_together(complete, tmp_path):
    other = write_set(tmp_path / "wide", {"train": 6, "dev": 1}, frames=(33,), sizes=((2, 1), (1, 1)))
    names, shapes = set(), set()
    for batch in data(complete, other, steps=30).train_dataloader():
        names |= {key.split("@")[0] for key in batch.keys}
        shapes.add((len(batch.keys), *batch.latents.shape[2:]))
    assert len(names) == 15
    assert {(12, 1, 1, 1), (6, 1, 2, 1), (4, 3, 1, 1), (2, 3, 2, 1)} <= shapes  # at most max_latents_per_batch


def test_text_features_are_padded_to_the_token_limit(tmp_path):
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


def test_features_of_another_encoder_are_computed_from_audio(tmp_path):
    """All but those of the last frame, whose window ends after the audio."""
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
    assert batch.conditioning.audio_mask[0, 0].tolist() == [True] * 5 + [False]  # its window includes frame 26


def test_states_are_read_or_derived_from_speech_with_short_pauses(tmp_path):
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


def test_placement_raises_the_shares_of_starts_and_changes(tmp_path):
    def make(key, frames, height, width):
        return sample(key, frames, height, width) | {"vad.npy": (np.arange(frames) > 60).astype(np.uint8)}

    folder = write_set(tmp_path / "p", {"train": 4, "dev": 1}, frames=(101,), make=make)
    buckets = LengthBuckets((2,), (1.0,), 40)

    def shares(placement: Placement) -> tuple[float, float]:
        batches = list(data(folder, buckets=buckets, placement=placement, steps=5).train_dataloader())
        starts = [key.endswith("@0") for batch in batches for key in batch.keys]
        changing = torch.cat([batch.conditioning.state for batch in batches]).diff(dim=1).ne(0).float().mean()
        return float(np.mean(starts)), float(changing)

    assert max(shares(UNIFORM)) < 0.15
    starts, changing = shares(Placement(starts=0.4, short=2, transitions=0.4))
    assert 0.3 < starts < 0.55 and 0.3 < changing < 0.55


def test_a_reference_from_the_clip_itself_is_marked(tmp_path):
    def make(key, frames, height, width):
        files = sample(key, frames, height, width)
        return files | {"meta.json": files["meta.json"] | {"reference": "inside" if key.endswith("0") else "outside"}}

    folder = write_set(tmp_path / "r", {"train": 2, "dev": 1}, make=make)
    for batch in data(folder).train_dataloader():
        assert all(("reference of its own" in key) == ("000@" in key) for key in batch.keys)


def moving_box(frames: int, left: float = 0.0) -> np.ndarray:
    """Boxes of a face that moves to the right, NaN in the middle."""
    start = left + np.linspace(0, 0.5, frames)
    box = np.stack([start, np.full(frames, 0.1), start + 0.4, np.full(frames, 0.8)], axis=1).astype(np.float32)
    box[frames // 2 : frames // 2 + 2] = np.nan
    return box


def share(box: np.ndarray, row: int, column: int, height: int, width: int) -> float:
    """Share of a box in one pixel, by sampled points."""
    if np.isnan(box).any():
        return 0.0
    y, x = ((at + (np.arange(200) + 0.5) / 200) / side for at, side in ((row, height), (column, width)))
    left, top, right, bottom = box
    return float((((left < x) & (x < right)).mean()) * ((top < y) & (y < bottom)).mean())


@pytest.mark.parametrize("mouths", ["found", "estimated"])
def test_masks_are_the_shares_of_latent_pixels_that_boxes_cover(tmp_path, mouths):
    """Averaged over the frames of each latent; missing mouths are estimated from faces."""

    def make(key, frames, height, width):
        files = sample(key, frames, height, width) | {"face.npy": moving_box(frames)}
        return files | {"lips.npy": moving_box(frames, left=0.1)} if mouths == "found" else files

    folder = write_set(tmp_path / "m", {"train": 2, "dev": 1}, sizes=((3, 4),), make=make)
    face, lips = moving_box(33), moving_box(33, left=0.1)
    if mouths == "estimated":
        width, height = (face[:, 2] - face[:, 0]) / 4, (face[:, 3] - face[:, 1]) / 3
        lips = np.stack([face[:, 0] + width, face[:, 3] - height, face[:, 2] - width, face[:, 3]], axis=1)
    left, top, right, bottom = face.T
    width, height = right - left, bottom - top
    eyes = np.stack([left + width / 10, top + height / 10, right - width / 10, top + height / 2], axis=1)
    boxes, covered = {"face": face, "lips": lips, "eyes": eyes}, False
    for batch in data(folder, buckets=LengthBuckets((3,), (1.0,), 72), steps=3).train_dataloader():
        assert batch.regions.shape == (2, 3, 3, 3, 4)
        for n, key in enumerate(batch.keys):
            first = int(key.split("@")[1])
            for m, name in enumerate(REGIONS):
                for l in range(3):
                    frames = range(1 + STRIDE * (first + l), 1 + STRIDE * (first + l + 1))
                    expected = [np.mean([share(boxes[name][f], 1, c, 3, 4) for f in frames]) for c in range(4)]
                    np.testing.assert_allclose(batch.regions[n, m, l, 1], expected, atol=1e-2)
                    covered |= max(expected) > 0.2
    assert covered


def test_samples_without_boxes_have_empty_masks(complete, tmp_path):
    def make(key, frames, height, width):
        files = sample(key, frames, height, width)
        return files | {"face.npy": moving_box(frames)} if key.endswith(("1", "3")) else files

    some = write_set(tmp_path / "some", {"train": 4, "dev": 2}, make=make)
    module = data(complete, some)
    assert module.regions == set(REGIONS) and data(complete).regions == set()
    message = {}
    for batch in module.train_dataloader():
        message |= dict(zip(batch.keys, batch.regions.flatten(1).any(dim=1).tolist(), strict=True))
    assert {key.split("@")[0] for key, known in message.items() if known} <= {"train-some-001", "train-some-003"}
    assert any(message.values()) and not all(message.values())
    assert data(some, train="dev", filters=Filters({"motion": [None, 1.0]}, "keep")).regions == set(REGIONS)


def test_regions_of_older_sets_follow_their_face_detector(fresh):
    path = fresh / "index.json"
    index = json.loads(path.read_text())
    for detectors, regions in (({"face": {"_target_": "mine"}}, set(REGIONS)), ({"face": None}, set())):
        path.write_text(json.dumps(index | {"config": {"detectors": detectors}}))
        assert data(fresh).regions == regions


def test_eyes_are_estimated_in_sets_that_do_not_list_them(fresh):
    path = fresh / "index.json"
    index = json.loads(path.read_text())
    for shard in index["shards"]:
        for entry in shard["samples"]:
            entry["regions"] = ["face", "lips"]
    path.write_text(json.dumps(index))
    assert data(fresh).regions == {"face", "lips", "eyes"}


@pytest.mark.parametrize("region", REGIONS)
def test_region_weights_without_masks_are_rejected_first(fresh, tmp_path, region):
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


def test_captions_are_encoded_once_per_reader(tmp_path):
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


def test_missing_audio_is_masked(tmp_path):
    def make(key, frames, height, width):
        files = sample(key, frames, height, width)
        return files | {"meta.json": files["meta.json"] | {"repairs": ["no_audio"]}}

    folder = write_set(tmp_path / "n", {"train": 2, "dev": 1}, make=make)
    assert not any(batch.conditioning.audio_mask.any() for batch in data(folder).train_dataloader())


# Errors before the first step.


def test_latents_of_another_autoencoder_are_rejected(complete):
    with pytest.raises(ValueError, match=r"latents of autoencoder \w+; expected autoencoder \w+: pass the one"):
        data(complete, autoencoder=autoencoder(0.5))


def test_sets_with_and_without_latents_are_rejected(complete, tmp_path):
    def make(key, frames, height, width):
        files = sample(key, frames, height, width)
        return files | {"meta.json": files["meta.json"] | {"latent": None}}

    bare = write_set(tmp_path / "bare", {"train": 2, "dev": 1}, make=make)
    with pytest.raises(ValueError, match="bare has no latents, as others have"):
        data(complete, bare)
    assert data(bare).readers["train"].decoder.pictures == "video"


def test_filters_bound_scores_and_keep_or_drop_unmeasured_samples(tmp_path):
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
    with pytest.raises(ValueError, match=r"filters of beauty for .*; expected scores motion, sync"):
        numbers({"beauty": [0.9, None]}, "keep")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "bounds", [{"motion": [0.1]}, {"motion": [0.3, 0.1]}, {"motion": ["a", None]}, {"motion": 0.1}]
)
def test_invalid_bounds_are_rejected(bounds):
    with pytest.raises(ValueError, match="minimum, maximum"):
        Filters(bounds, "keep")


def test_missing_and_unfinished_sets_are_rejected(fresh, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        data(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"split 'train2' of .*; expected one of dev, train"):
        data(fresh, train="train2")
    (fresh / "index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no index.json, so the set is not finished; run"):
        data(fresh)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda index: index | {"schema": 99}, "schema 99"),
        (lambda index: {"schema": 1}, "not an index of schema 1"),
        (lambda index: json.loads(json.dumps(index).replace("train-b-000", "train-v1.5-000")), "key 'train-v1.5-000'"),
        (lambda index: json.loads(json.dumps(index).replace("train-b-000", "train-b-001")), "the same key twice"),
        (lambda index: json.loads(json.dumps(index).replace("frames", "length")), "without its size"),
    ],
    ids=["schema", "nothing", "dot", "twice", "no size"],
)
def test_an_invalid_index_is_rejected(fresh, change, message):
    path = fresh / "index.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=message):
        data(fresh)


def test_other_errors_are_reported_before_the_first_step(complete):
    with pytest.raises(ValueError, match="got 8 ranks; expected at most 4"):
        data(complete, train="dev", ranks=8, buckets=LengthBuckets((1,), (1.0,), 24, batch_multiple_of=8))
    with pytest.raises(ValueError, match="a multiple of 2 ranks"):
        data(complete, ranks=2)
    with pytest.raises(ValueError, match=r"crops of 11 latents; expected at most 10, .*'train'"):
        data(complete, buckets=LengthBuckets((11,), (1.0,), 24))
    large = write_set(complete.parent / "large", {"train": 1, "dev": 1}, sizes=((4, 5),))
    expected = r"expected at least 120 for 1 clip.* of 6 latents of 20 pixels: raise it"
    with pytest.raises(ValueError, match=expected):
        data(complete, large)
    with pytest.raises(ValueError, match="expected on_error raise or skip"):
        data(complete, on_error="ignore")
    with pytest.raises(ValueError, match="different folders"):
        data(complete, complete)


# Errors during training.


@pytest.mark.parametrize(
    "boxes", [np.zeros((32, 4), np.float32), np.zeros((33, 8), np.float32), np.full((33, 4), np.inf, np.float32)]
)
def test_invalid_boxes_are_reported(tmp_path, boxes):
    folder = write_set(tmp_path / "d", {"train": 1, "dev": 1}, make=lambda *of: sample(*of) | {"face.npy": boxes})
    with pytest.raises(ValueError, match=r"train-d-000 of .*expected"):
        list(data(folder).train_dataloader())


def test_boxes_of_regions_without_weight_are_not_read(tmp_path):
    boxes = {"face.npy": np.full((33, 4), np.inf, np.float32)}
    folder = write_set(tmp_path / "d", {"train": 1, "dev": 1}, make=lambda *of: sample(*of) | boxes)
    for batch in data(folder, region_weights=dict.fromkeys(REGIONS, 0.0)).train_dataloader():
        assert not batch.regions.any()


def damage(path, how: str) -> None:
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "cut off":
        path.write_bytes(content[: len(content) // 2])
    elif how == "flipped":  # inside the latents of the first sample
        at = content.index(b"latent.npy") + 512
        path.write_bytes(content[:at] + bytes(128) + content[at + 128 :])


@pytest.mark.parametrize("how", ["gone", "cut off", "flipped"])
def test_unreadable_samples_are_reported_or_skipped_and_counted(fresh, caplog, how):
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
    assert f"samples, {len(skips)} times:" in summary and all(key in summary for key in bad)

    if how == "flipped":  # found only when it is read
        with pytest.raises(ValueError, match=r"train-b-000 of .*train-000000\.tar: .*restore it"):
            list(data(fresh, steps=16).train_dataloader())
    else:
        with pytest.raises(ValueError, match=r"train-000000\.tar (is missing|has .* by its index).*restore them"):
            data(fresh)


def test_substitutes_are_equal_on_any_number_of_ranks_and_workers(fresh):
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


def test_a_shard_that_disappears_during_training_is_reported(fresh):
    module = data(fresh, steps=40)
    batches = iter(module.train_dataloader())
    next(batches)
    shard(fresh, 1).unlink()
    with pytest.raises(ValueError, match=r"train-b-00\d of .*train-000001\.tar: .*No such file.*on_error=skip"):
        list(batches)


def test_a_set_without_readable_samples_stops_the_run(fresh):
    module = data(fresh, on_error="skip")
    for number in (0, 1):
        shard(fresh, number).unlink()
    with pytest.raises(ValueError, match="20 unreadable samples in a row"):
        next(iter(module.train_dataloader()))


def test_held_out_clips_are_the_starts_of_dev_clips(complete):
    batch = data(complete).held_out(2, CPU)
    assert batch.keys == ["dev-a-000@0", "dev-a-002@0"] and batch.latents.shape[2] == 6


# Videos, encoded during training.

SIDE, FRAMES = 32, 29
BLOCKS = np.random.default_rng(0).integers(0, 255, (FRAMES, SIDE // 8, SIDE // 8, 3))
SCENE = BLOCKS.repeat(8, 1).repeat(8, 2).astype(np.uint8)


def pixels():
    """A small autoencoder of pixels, with half of the previous latent added to each latent."""
    torch.manual_seed(0)
    target = "avatar.models.autoencoders.causal_conv.CausalConvAutoencoder"
    net = bundle.new({"_target_": target, "channels": 4, "widths": [4, 4]}).eval()
    encode = net.encode

    def encode_with_memory(video):
        latents = encode(video)
        return torch.cat([latents[:, :, :1], latents[:, :, 1:] + 0.5 * latents[:, :, :-1]], 2)

    net.encode = encode_with_memory
    return net


@pytest.fixture(scope="module")
def footage(tmp_path_factory):
    """Samples with one video and its latents, and the autoencoder."""
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


def test_readers_return_equal_frames_and_report_damage():
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


def test_pyav_reads_widths_that_decord_misreads():
    film = mp4(np.full((3, 16, 48, 3), 90, np.uint8))
    assert open_video(film).read(0, 3).shape == (3, 16, 48, 3)


def test_pyav_is_the_fallback_without_decord(monkeypatch):
    monkeypatch.setitem(sys.modules, "decord", None)
    assert isinstance(open_video(mp4(SCENE)), PyAV)


@pytest.mark.parametrize("history", [0, 1])
def test_videos_give_the_same_latents_as_preprocessing(footage, history):
    """With enough history; all other fields are equal."""
    folder, net = footage
    buckets = LengthBuckets((1, 3), (0.5, 0.5), 96)
    of = {"autoencoder": net, "buckets": buckets, "steps": 6}
    latents, video = (data(folder, pictures=name, history=history, **of) for name in ("latents", "video"))
    for expected, batch in zip(latents.train_dataloader(), video.train_dataloader(), strict=True):
        assert isinstance(batch, VideoBatch)
        encoded = video.on_after_batch_transfer(batch, 0)
        assert encoded.keys == expected.keys and torch.equal(encoded.regions, expected.regions)
        assert encoded.regions.shape == (len(encoded.keys), len(REGIONS), *encoded.latents.shape[2:])
        assert encoded.regions.any()
        torch.testing.assert_close(encoded.conditioning.reference, expected.conditioning.reference)
        assert torch.equal(encoded.conditioning.audio, expected.conditioning.audio)
        starts = torch.tensor([int(key.split("@")[1]) for key in encoded.keys])
        same = [torch.allclose(x, y, atol=1e-4) for x, y in zip(encoded.latents, expected.latents, strict=True)]
        assert same == [history == 1 or int(start) == 0 for start in starts]


def test_latents_are_preferred_to_videos(footage):
    folder, net = footage
    assert data(folder, autoencoder=net, buckets=LengthBuckets((1,), (1.0,), 24)).readers["train"].decoder.pictures == (
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
def test_image_to_video_conditioning_is_in_every_batch(footage, pictures):
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


def test_frame_sizes_other_than_multiples_of_the_stride_are_rejected(footage, tmp_path):
    folder = write_set(tmp_path / "odd", {"train": 1, "dev": 1}, sizes=((12, 16),))
    with pytest.raises(ValueError, match=r"is 12 × 16; expected multiples of 8 .*preprocess with rules.multiple=8"):
        data(folder, autoencoder=footage[1], pictures="video")


def test_a_truncated_tar_gives_complete_samples_or_none(tmp_path):
    """For every end: no sample lacks files after the cut."""
    files = {name: name.encode() * 100 for name in ("a.npy", "meta.json", "txt")}
    folder = write_set(tmp_path / "c", {"train": 2}, shards=1, make=lambda *_: files)
    content = shard(folder).read_bytes()
    expected, parts = {}, frozenset(files)
    for end in range(0, len(content) + 1, 256):
        shard(folder).write_bytes(content[:end])
        for key in ("train-c-000", "train-c-001"):
            try:
                found = TarReader().read(shard(folder), key, parts)
            except ValueError as error:
                assert "shard" in str(error)
            else:
                assert found == files
                expected.setdefault(key, end)
    assert 2000 < expected["train-c-000"] < expected["train-c-001"] < len(content)


def test_a_tar_header_with_a_negative_size_is_rejected(tmp_path):
    folder = write_set(tmp_path / "n", {"train": 1}, shards=1, make=lambda *_: {"a.npy": b"a", "txt": b"b"})
    header = tarfile.TarInfo("train-n-000.a.npy").tobuf(tarfile.GNU_FORMAT)
    size = b"\xff" * 10 + b"\xfe\x00"  # -512 in base 256
    header = header[:124] + size + header[136:148] + b" " * 8 + header[156:]
    checksum = f"{sum(header):06o}\0 ".encode()
    shard(folder).write_bytes(header[:148] + checksum + header[156:])
    with pytest.raises(ValueError, match=r"cut off|damaged"):
        TarReader().read(shard(folder), "train-n-000", frozenset(("txt",)))


@pytest.mark.parametrize(
    "meta, message",
    [
        ([], "expected the fields of a sample"),
        (5, "expected the fields of a sample"),
        ({"latent": ["a"]}, "fingerprint of an autoencoder"),
        ({"latent": None, "repairs": 5}, "expected a list"),
        ({}, "no latent"),
    ],
    ids=str,
)
def test_metadata_of_other_types_is_reported(tmp_path, meta, message):
    folder = write_set(tmp_path / "m", {"train": 1, "dev": 1}, make=lambda *of: sample(*of) | {"meta.json": meta})
    with pytest.raises(ValueError, match=rf"m-000 of .*{message}"):
        data(folder, pictures="video")
        next(iter(data(folder, pictures="video").train_dataloader()))


def test_bugs_of_encoders_are_not_skipped(tmp_path):
    def fail(prompts):
        raise ValueError("a bug")

    folder, text = write_set(tmp_path / "e", {"train": 1, "dev": 1}), ByteTokenizer(96)
    object.__setattr__(text, "encode", fail)
    with pytest.raises(RuntimeError, match="the text encoder failed"):
        list(data(folder, text=text, on_error="skip").train_dataloader())


def test_preprocessed_latents_and_videos_give_equal_batches(tmp_path):
    """From talking videos to batches; the schedule does not depend on what is read."""
    talk(tmp_path / "talk.mov")
    changes = ["rules.shortest_s=1.0", "rules.longest_s=1.2", "rules.preset=ultrafast", "workers=0"]
    changes += ["splits={train: 1.0, dev: 0, test: 0}", "encode='${shipped}'", f"out={tmp_path / 'set'}"]
    changes.append("detectors.face={_target_: tests.data.preprocess.test_clips.FaceWithMouth}")
    preprocess.preprocess(composed("preprocess", f"source='{tmp_path}/*.mov'", "folder=/tmp", *changes))
    net = bundle.load("data/nano/autoencoder.safetensors")
    of = {"dev": "train", "autoencoder": net, "audio": LogMel(), "buckets": LengthBuckets((2,), (1.0,), 384)}
    latents, video = (data(tmp_path / "set", pictures=name, steps=3, **of) for name in (None, "video"))
    assert latents.readers["train"].decoder.pictures == "latents" and latents.regions == set(REGIONS)
    for stored, batch in zip(latents.train_dataloader(), video.train_dataloader(), strict=True):
        encoded = video.on_after_batch_transfer(batch, 0)
        assert encoded.keys == stored.keys and len(stored.keys) == 2
        assert torch.equal(encoded.regions, stored.regions)
        assert stored.regions[:, :2].sum(dim=(0, 2, 3, 4)).min() > 0  # the eyes of these faces are above the frame
        torch.testing.assert_close(encoded.latents, stored.latents, atol=5e-3, rtol=5e-3)
        torch.testing.assert_close(encoded.conditioning.reference, stored.conditioning.reference, atol=5e-3, rtol=5e-3)
