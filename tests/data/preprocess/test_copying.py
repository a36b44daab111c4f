"""Videos that need no change are copied bit for bit if the stream can be cut without loss, else encoded."""

import json
from dataclasses import replace

import av
import decord
import numpy as np
import pytest

from avatar.data.preprocess.clips import VideoClip
from avatar.data.preprocess.copying import CopiedVideo, copy_clips, find_cut_points
from avatar.data.preprocess.detectors import Detections
from avatar.data.preprocess.pipeline import stage
from avatar.data.preprocess.probe import probe
from avatar.data.preprocess.rules import Models
from avatar.data.preprocess.sources import find
from avatar.media.decode import read_video
from tests.data.preprocess.videos import RULES, scene, speech, write

FRAMES = 120
GRAIN = np.random.default_rng(0).integers(-12, 12, (FRAMES, 64, 96, 3))
TWO_SECONDS = replace(RULES, longest_s=2.0)  # 49 frames


def make_video(folder, x264: str, suffix: str = ".mov", **changes):
    """A video with enough grain that all frames differ, encoded with these x264 settings."""
    frames = np.clip(scene(np.arange(FRAMES) / 25) + GRAIN, 0, 255).astype(np.uint8)
    options = {"preset": "fast", "crf": "20", "x264-params": x264}
    return write(folder / f"video{suffix}", frames, speech(FRAMES / 25), options=options, **changes)


def clips(path, staging, rules=TWO_SECONDS):
    """Start, frames, method and file of the video of each clip."""
    (source,) = find(str(path))
    line = stage(source, staging, rules, Models())
    accepted = sorted((c for c in line["clips"] if c["status"] == "accepted"), key=lambda c: c["start_s"])
    folder = staging / source.key
    for clip in accepted:
        assert json.loads((folder / f"{clip['stem']}.meta.json").read_text())["pictures"] == clip["pictures"]
    return [(round(25 * c["start_s"]), c["frames"], c["pictures"], folder / f"{c['stem']}.video.mp4") for c in accepted]


@pytest.mark.parametrize("suffix", [".mov", ".mkv"])
def test_copied_frames_equal_the_sources_in_any_reading_order(tmp_path, suffix):
    path = make_video(tmp_path, "bframes=3:b-adapt=0:keyint=50:min-keyint=50:scenecut=0", suffix)
    found = clips(path, tmp_path / "staging")
    assert [clip[:3] for clip in found] == [(0, 49, "copied"), (50, 49, "copied")]  # clips start at key frames
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
        "bframes=5:b-pyramid=normal:keyint=40:open-gop=1",  # frames before a key frame need the previous group
        "bframes=3:keyint=45:intra-refresh=1",  # recovery points that are not IDR frames
        "bframes=4:b-adapt=0:b-pyramid=none:keyint=50:min-keyint=50:scenecut=0",  # cuts every 5 frames, rarely 1 + 4 k
    ],
)
def test_streams_that_cannot_be_cut_without_loss_are_encoded(tmp_path, x264):
    path = make_video(tmp_path, x264)
    found = clips(path, tmp_path / "staging")
    assert found and {clip[2] for clip in found} == {"encoded"}
    assert sum(clip[1] for clip in found) >= 97  # of 120 frames
    for *_, length, _, video in found:
        reader = decord.VideoReader(str(video))
        frames, _ = read_video(video)
        assert (reader.get_batch([length - 1, 3]).asnumpy() == frames[[length - 1, 3]]).all()


def test_clip_that_starts_between_key_frames_is_encoded_up_to_the_next_key_frame(tmp_path):
    path = make_video(tmp_path, "bframes=0:keyint=80:min-keyint=80:scenecut=0")
    found = clips(path, tmp_path / "staging")
    assert [clip[:3] for clip in found] == [(0, 49, "copied"), (49, 29, "encoded"), (80, 37, "copied")]
    assert (read_video(found[-1][3])[0] == read_video(path)[0][80:117]).all()


def test_videos_are_encoded_if_rules_or_resizing_require_it(tmp_path):
    path = make_video(tmp_path, "bframes=0:keyint=50")
    assert {clip[2] for clip in clips(path, tmp_path / "a", replace(TWO_SECONDS, pictures="encode"))} == {"encoded"}
    assert {clip[2] for clip in clips(path, tmp_path / "b", replace(TWO_SECONDS, side=32))} == {"encoded"}


def test_copied_clip_ends_before_a_packet_without_a_frame():
    frames = [av.VideoFrame(16, 16, "yuv420p") for _ in range(9)]
    video = CopiedVideo(np.array([1, 5, 9]))
    for frame in [*frames[:7], frames[6], frames[7]]:
        video.push(frame)
    assert video.frames == 5


def test_source_that_became_shorter_is_named(tmp_path):
    path = make_video(tmp_path, "keyint=10")
    cut_points = find_cut_points(path, probe(path))
    assert cut_points is not None
    last = VideoClip(
        tmp_path / "last", 50, FRAMES - 49, 0, "copied", None, 0, 0.0, Detections(None, None, 0, None, None)
    )
    with pytest.raises(OSError, match=r"video\.mov has fewer frames than when it was probed"):
        copy_clips(path, [last], cut_points)
