"""Pictures that need no change are taken over bit for bit, where that is sure to be right; else they are encoded."""

import json
from dataclasses import replace

import av
import decord
import numpy as np
import pytest

from avatar.data.preprocess.clips import VideoClip
from avatar.data.preprocess.copying import Copied, copy, cuts
from avatar.data.preprocess.detectors import Detections
from avatar.data.preprocess.pipeline import stage
from avatar.data.preprocess.probe import probe
from avatar.data.preprocess.rules import Models
from avatar.data.preprocess.sources import find
from avatar.media.decode import read_video
from tests.data.preprocess.films import RULES, scene, speech, write

FRAMES = 120
GRAIN = np.random.default_rng(0).integers(-12, 12, (FRAMES, 64, 96, 3))
TWO_SECONDS = replace(RULES, longest_s=2.0)  # 49 frames


def film(folder, x264: str, suffix: str = ".mov", **changes):
    """A film with enough grain that each frame is unlike the others, coded as told."""
    pictures = np.clip(scene(np.arange(FRAMES) / 25) + GRAIN, 0, 255).astype(np.uint8)
    options = {"preset": "fast", "crf": "20", "x264-params": x264}
    return write(folder / f"film{suffix}", pictures, speech(FRAMES / 25), options=options, **changes)


def clips(path, staging, rules=TWO_SECONDS):
    """Start, frames, how the pictures were made, and the file of each clip."""
    (source,) = find(str(path))
    line = stage(source, staging, rules, Models())
    accepted = sorted((c for c in line["clips"] if c["status"] == "accepted"), key=lambda c: c["start_s"])
    folder = staging / source.key
    for clip in accepted:
        assert json.loads((folder / f"{clip['stem']}.meta.json").read_text())["pictures"] == clip["pictures"]
    return [(round(25 * c["start_s"]), c["frames"], c["pictures"], folder / f"{c['stem']}.video.mp4") for c in accepted]


@pytest.mark.parametrize("suffix", [".mov", ".mkv"])
def test_copied_frames_are_the_sources_own_in_any_order_of_reading(tmp_path, suffix):
    path = film(tmp_path, "bframes=3:b-adapt=0:keyint=50:min-keyint=50:scenecut=0", suffix)
    found = clips(path, tmp_path / "staging")
    assert [clip[:3] for clip in found] == [(0, 49, "copied"), (50, 49, "copied")]  # a clip starts with a key frame
    before, _ = read_video(path)
    for start, length, _, video in found:
        frames, rate = read_video(video)
        assert rate == 25 and (frames == before[start : start + length]).all()
        reader = decord.VideoReader(str(video))
        assert len(reader) == length
        order = [length - 1, 3, length // 2, 0]
        assert (reader.get_batch(order).asnumpy() == frames[order]).all()
        assert reader.get_frame_timestamp(0)[0] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    "x264",
    [
        "bframes=5:b-pyramid=normal:keyint=40:open-gop=1",  # key frames before which frames need the group before
        "bframes=3:keyint=45:intra-refresh=1",  # points to recover at that are no pictures to begin with
        "bframes=4:b-adapt=0:b-pyramid=none:keyint=50:min-keyint=50:scenecut=0",  # every fifth, hardly ever 1 + 4 k
    ],
)
def test_streams_that_cant_be_cut_without_loss_are_encoded(tmp_path, x264):
    path = film(tmp_path, x264)
    found = clips(path, tmp_path / "staging")
    assert found and {clip[2] for clip in found} == {"encoded"}
    assert sum(clip[1] for clip in found) >= 97  # of 120 frames
    for *_, length, _, video in found:
        reader = decord.VideoReader(str(video))
        frames, _ = read_video(video)
        assert (reader.get_batch([length - 1, 3]).asnumpy() == frames[[length - 1, 3]]).all()


def test_a_clip_that_starts_between_key_frames_is_encoded_up_to_the_next_one(tmp_path):
    path = film(tmp_path, "bframes=0:keyint=80:min-keyint=80:scenecut=0")
    found = clips(path, tmp_path / "staging")
    assert [clip[:3] for clip in found] == [(0, 49, "copied"), (49, 29, "encoded"), (80, 37, "copied")]
    assert (read_video(found[-1][3])[0] == read_video(path)[0][80:117]).all()


def test_the_rule_may_want_all_pictures_encoded(tmp_path):
    path = film(tmp_path, "bframes=0:keyint=50")
    assert {clip[2] for clip in clips(path, tmp_path / "a", replace(TWO_SECONDS, pictures="encode"))} == {"encoded"}
    assert {clip[2] for clip in clips(path, tmp_path / "b", replace(TWO_SECONDS, side=32))} == {"encoded"}


def test_a_clip_ends_before_a_packet_that_makes_no_frame():
    shown = [av.VideoFrame(16, 16, "yuv420p") for _ in range(9)]
    pictures = Copied(np.array([1, 5, 9]))
    for picture in [*shown[:7], shown[6], shown[7]]:
        pictures.take(picture)
    assert pictures.frames == 5


def test_a_film_that_has_lost_frames_since_is_named(tmp_path):
    path = film(tmp_path, "keyint=10")
    cut = cuts(path, probe(path))
    assert cut is not None
    last = VideoClip(
        tmp_path / "last", 50, FRAMES - 49, 0, "copied", None, 0, 0.0, Detections(None, None, 0, None, None)
    )
    with pytest.raises(OSError, match=r"film\.mov has fewer frames than when it was probed"):
        copy(path, [last], cut)
