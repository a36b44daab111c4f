"""Shots, clips of complete groups of frames, their files and their scores."""

import json
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from PIL import Image

from avatar.data.preprocess import scores
from avatar.data.preprocess.detectors import DetectionTracker, Detectors
from avatar.data.preprocess.encoding import Encoders
from avatar.data.preprocess.pipeline import stage
from avatar.data.preprocess.rules import Models
from avatar.data.preprocess.sources import Source, Span, find
from avatar.media.decode import read_audio, read_video
from avatar.models.text_encoders.bytes import ByteTokenizer
from tests.data.preprocess.videos import EVENTS, RULES, scene, speech, talk, write


def stage_video(path, tmp_path, rules=RULES, models=None, spans=None):
    source = Source(path.name, path, spans) if spans else find(str(path))[0]
    line = stage(source, tmp_path / "staging", rules, models or Models())
    return line, tmp_path / "staging" / source.key


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return talk(tmp_path_factory.mktemp("video") / "video.mov")


@pytest.fixture(scope="module")
def two_shots(tmp_path_factory):
    """A cut at frame 33 of 70."""
    frames = np.concatenate([scene(np.arange(33) / 25), scene(np.arange(37) / 25, tint=90)])
    return write(tmp_path_factory.mktemp("video") / "shots.mov", frames, speech(2.8))


def test_clips_end_at_cuts_and_have_complete_groups_of_frames(two_shots, tmp_path):
    line, folder = stage_video(two_shots, tmp_path)
    assert [(clip["start_s"] * 25, clip["frames"], clip["shot"]) for clip in line["clips"]] == [(0, 33, 0), (33, 37, 1)]
    frames, _ = read_video(folder / "0000033.video.mp4")
    assert len(frames) == 37
    assert np.abs(frames[0].astype(int) - scene([0.0], tint=90)[0]).mean() < 4


@pytest.mark.parametrize("stride, lengths", [(4, [29, 29]), (8, [25, 25]), (1, [30, 30])])
def test_long_shots_are_split_into_clips_by_stride(video, tmp_path, stride, lengths):
    line, folder = stage_video(video, tmp_path, replace(RULES, longest_s=1.2, temporal_stride=stride))
    accepted = [clip for clip in line["clips"] if clip["status"] == "accepted"]
    assert [clip["frames"] for clip in accepted] == lengths
    assert [clip["start_s"] * 25 for clip in accepted] == pytest.approx([0, lengths[0]])
    assert len(read_video(folder / f"{lengths[0]:07d}.video.mp4")[0]) == lengths[1]


def test_only_shots_that_are_too_short_are_rejected(two_shots, tmp_path):
    line, folder = stage_video(two_shots, tmp_path, replace(RULES, shortest_s=1.5))
    assert [(clip["status"], clip.get("reason")) for clip in line["clips"]] == [
        ("rejected", "too_short"),
        ("accepted", None),
    ]
    assert not list(folder.glob("0000000.*"))


def test_audio_of_a_clip_matches_its_frames(video, tmp_path):
    _, folder = stage_video(video, tmp_path, replace(RULES, longest_s=1.2))
    audio = read_audio(folder / "0000029.audio.flac")
    assert np.abs(audio - speech(2.4)[29 * 640 :][: len(audio)]).max() < 1e-4  # 16 bits


def test_reference_is_from_another_clip_of_the_same_shot(video, two_shots, tmp_path):
    _, folder = stage_video(video, tmp_path, replace(RULES, longest_s=1.2))
    for stem, start in (("0000000", 29), ("0000029", 0)):
        assert json.loads((folder / f"{stem}.meta.json").read_text())["reference"] == "outside"
        with Image.open(folder / f"{stem}.ref.png") as image:
            assert np.abs(np.asarray(image).astype(int) - scene([start / 25])[0]).mean() < 4
    _, folder = stage_video(two_shots, tmp_path)
    assert json.loads((folder / "0000033.meta.json").read_text())["reference"] == "inside"
    assert not list(folder.glob("*.first.png"))


def test_spans_are_cropped_and_labelled_separately_and_overlaps_rejected(video, tmp_path):
    crop = (0.5, 0.25, 0.75, 0.75)  # of 64: from (32, 16), 48 x 48
    spans = (
        Span(1.2, 2.4, "ann", "left", crop, {"dover": 0.5}),
        Span(0.0, 1.1, "bob"),
        Span(0.88, 2.0, "eve"),
        Span(2.28, 9.0, "eve"),
    )
    line, folder = stage_video(video, tmp_path, spans=spans)
    found = {clip["start_s"]: clip for clip in line["clips"]}
    assert (found[0.88]["reason"], found[2.28]["reason"]) == ("overlap", "overlap")
    first, second = found[0.0], found[1.2]
    assert (first["person_id"], first["frames"], first["width"]) == ("bob", 25, 96)
    assert (second["person_id"], second["frames"], second["width"], second["height"]) == ("ann", 29, 48, 48)
    assert second["scores"]["dover"] == 0.5 and "dover" not in first["scores"]
    assert (folder / "0000030.txt").read_text() == "left"
    frames, _ = read_video(folder / "0000030.video.mp4")
    assert np.abs(frames[0].astype(int) - scene([1.2])[0, 16:64, 32:80]).mean() < 5


def test_window_that_exceeds_the_frame_is_rejected(video, tmp_path):
    line, _ = stage_video(video, tmp_path, spans=(Span(crop=(1.0, 0.0, 0.6, 0.6)),))  # to 1.6 of 1.5 heights
    assert (line["status"], line["reason"]) == ("rejected", "crop")


@pytest.mark.parametrize("changes", [{"colours": 1}, {"colours": 5}, {"pixels": "yuvj420p"}, {"pixels": "yuv444p"}])
def test_colours_are_preserved(tmp_path, changes):
    path = talk(tmp_path / "video.mov", seconds=1.2, **changes)
    _, folder = stage_video(path, tmp_path)
    before, after = read_video(path)[0][0].astype(int), read_video(folder / "0000000.video.mp4")[0][0]
    assert np.abs(before - after).mean() < 2.5
    matrix, color_range = color_tags(folder / "0000000.video.mp4")
    assert matrix == changes.get("colours", 2) and color_range != 2  # 2: full range


def color_tags(path) -> tuple[int, int]:
    with av.open(str(path)) as file:
        context = file.streams.video[0].codec_context
        return context.colorspace, context.color_range


@pytest.mark.parametrize("cosine, sine", [(0, 1), (-1, 0), (0, -1)])
def test_every_rotation_of_the_display_matrix_is_applied_once(tmp_path, cosine, sine):
    path = talk(tmp_path / "video.mov", seconds=1.2)
    data = bytearray(path.read_bytes())
    matrix, one = data.index(b"tkhd") + 44, 1 << 16
    entries = (cosine * one, sine * one, 0, -sine * one, cosine * one, 0, 0, 0, 1 << 30)
    data[matrix : matrix + 36] = b"".join(entry.to_bytes(4, "big", signed=True) for entry in entries)
    path.write_bytes(data)
    line, folder = stage_video(path, tmp_path)
    assert [repair["code"] for repair in line["repairs"]] == ["rotated"]
    before, after = read_video(path)[0][0].astype(int), read_video(folder / "0000000.video.mp4")[0][0]
    assert before.shape == after.shape and np.abs(before - after).mean() < 2.5


def test_output_is_deterministic(video, tmp_path):
    contents = []
    for place in ("one", "two"):
        _, folder = stage_video(video, tmp_path / place, replace(RULES, longest_s=1.2))
        contents.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert contents[0] == contents[1] and len(contents[0]) == 11


def test_staged_source_is_reused_unless_it_changed(tmp_path):
    path = talk(tmp_path / "video.mov", seconds=1.2)
    _, folder = stage_video(path, tmp_path)
    inode = (folder / "line.json").stat().st_ino
    stage_video(path, tmp_path)
    assert (folder / "line.json").stat().st_ino == inode
    (tmp_path / "video.txt").write_text("a ball")
    stage_video(path, tmp_path)
    assert (folder / "line.json").stat().st_ino != inode
    assert (folder / "0000000.txt").read_text() == "a ball"


class Face:
    """Detects `count` equal faces, with the lamp at the estimated mouth."""

    def __init__(self, count: int = 1):
        self.count = count

    def __call__(self, frame: np.ndarray) -> np.ndarray:
        return np.array([[0.0, -0.5, 0.3, 0.25]] * self.count, np.float32).reshape(-1, 4)


class FaceWithMouth(Face):
    """Detects the same face, with its mouth away from the estimated position, and no mouth while the lamp is lit."""

    def __call__(self, frame: np.ndarray) -> np.ndarray:
        mouth = [np.nan] * 4 if frame[:8, :8].mean() > 170 else [0.4, 0.5, 0.6, 0.7]
        return np.hstack([super().__call__(frame), np.array([mouth] * self.count, np.float32).reshape(-1, 4)])


class Bodies:
    """Detects two bodies of two joints, the second with more confidence; none while the lamp is lit."""

    points = 2

    def __call__(self, frame: np.ndarray) -> np.ndarray:
        if frame[:8, :8].mean() > 170:
            return np.zeros((0, 2, 3), np.float32)
        return np.array([[[0.1, 0.1, 0.4], [0.2, 0.2, 0.4]], [[0.5, 0.5, 0.9], [np.nan] * 3]], np.float32)


def test_most_confident_body_is_stored_and_null_without_a_detector(video, tmp_path):
    _, folder = stage_video(video, tmp_path / "null")
    assert json.loads((folder / "0000000.meta.json").read_text())["body"] is None
    assert not list(folder.glob("*.body.npy"))
    _, folder = stage_video(video, tmp_path / "two", models=Models(Detectors(body=Bodies())))
    bodies = np.load(folder / "0000000.body.npy")
    assert bodies.shape == (57, 2, 3) and bodies.dtype == np.float32
    np.testing.assert_allclose(bodies[0], [[0.5, 0.5, 0.9], [np.nan] * 3])
    lit = [any(event <= frame / 25 + 1e-6 < event + 0.2 for event in EVENTS) for frame in range(57)]
    assert (np.isnan(bodies).all(axis=(1, 2)) == lit).all()
    meta = json.loads((folder / "0000000.meta.json").read_text())
    assert meta["body"] == {"points": 2} and meta["faces"] is None


def test_faces_are_null_without_a_detector_and_rejected_by_rule(video, tmp_path):
    line, folder = stage_video(video, tmp_path / "null")
    assert line["clips"][0]["scores"]["sync_proxy"] is None
    assert json.loads((folder / "0000000.meta.json").read_text())["faces"] is None
    assert not list(folder.glob("*.face.npy"))
    rules = replace(RULES, faces="reject")
    assert stage_video(video, tmp_path / "a", rules)[0]["reason"] == "no_face"
    assert stage_video(video, tmp_path / "b", rules, Models(Detectors(Face(0))))[0]["reason"] == "no_face"
    assert stage_video(video, tmp_path / "c", rules, Models(Detectors(Face(2))))[0]["reason"] == "multi_face"
    line, folder = stage_video(video, tmp_path / "d", rules, Models(Detectors(Face())))
    assert np.load(folder / "0000000.face.npy").shape == (57, 4)
    assert line["status"] == "accepted"
    line, folder = stage_video(video, tmp_path / "e", RULES, Models(Detectors(Face(0))))
    assert np.isnan(np.load(folder / "0000000.face.npy")).all() and line["clips"][0]["scores"]["sync_proxy"] is None


def test_mouths_are_stored_if_the_detector_finds_them(video, tmp_path):
    def stage_with(place, detector=None):
        line, folder = stage_video(video, tmp_path / place, models=Models(Detectors(detector)))
        meta = json.loads((folder / "0000000.meta.json").read_text())
        assert meta["regions"] == line["clips"][0]["regions"]
        return line["clips"][0], folder

    without, folder = stage_with("none")
    assert without["regions"] == []
    estimated, folder = stage_with("face", Face())
    assert estimated["regions"] == ["face", "lips", "eyes"] and not list(folder.glob("*.lips.npy"))
    no_face, folder = stage_with("gone", Face(0))
    assert no_face["regions"] == [] and np.isnan(np.load(folder / "0000000.face.npy")).all()
    found, folder = stage_with("mouth", FaceWithMouth())
    assert found["regions"] == ["face", "lips", "eyes"]
    faces, mouths = (np.load(folder / f"0000000.{name}.npy") for name in ("face", "lips"))
    np.testing.assert_allclose(faces[0], [0.0, -0.5, 0.3, 0.25])
    np.testing.assert_allclose(mouths[0], [0.4, 0.5, 0.6, 0.7])
    lit = [any(event <= frame / 25 + 1e-6 < event + 0.2 for event in EVENTS) for frame in range(57)]
    assert (np.isnan(mouths).all(axis=1) == lit).all() and mouths.dtype == np.float32


def test_mouth_motion_is_measured_at_the_detected_mouth():
    moving, still = np.zeros((2, 64, 96, 3), np.uint8), np.zeros((2, 64, 96, 3), np.uint8)
    moving[1, 34:42, 40:56] = 200  # within the detected mouth, outside of the estimated one
    for frames, detector, moves in ((moving, FaceWithMouth(), True), (moving, Face(), False), (still, Face(), False)):
        tracker = DetectionTracker(Detectors(detector))
        for frame in frames:
            tracker.push(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv420p"))
        motion = tracker.detections(2).mouth_motion
        assert motion is not None and np.isnan(motion[0]) and (motion[1] > 10) == moves


@pytest.mark.parametrize(
    "box, message",
    [
        ([0, 0, 0, 0, 0], r"boxes of shape \(1, 5\) .*expected \[faces, 4\]"),
        ([0.2, 0.2, np.inf, 0.4], r"boxes \[\[.*inf.*expected left ≤ right"),
        ([0.4, 0.2, 0.2, 0.4], "expected left ≤ right and top ≤ bottom"),
        ([0.2, np.nan, 0.4, 0.4], "expected left ≤ right and top ≤ bottom"),
        ([0.2, 0.2, 0.4, 0.4, 0.2, 0.4, 0.4, 0.2], "expected left ≤ right and top ≤ bottom"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_invalid_boxes_of_a_detector_raise_an_error(box, message):
    tracker = DetectionTracker(Detectors(lambda frame: np.array([box], np.float32)))
    with pytest.raises(ValueError, match=message):
        tracker.push(
            av.VideoFrame.from_ndarray(np.zeros((64, 96, 3), np.uint8), format="rgb24").reformat(format="yuv420p")
        )


def test_scores_of_scorers_are_stored_and_undefined_ones_null(video, tmp_path):
    scorers = {"length": lambda frames, samples: len(frames) + len(samples) / 1e6, "none": lambda frames, samples: None}
    line, _ = stage_video(video, tmp_path, models=Models(scorers=scorers))
    assert line["clips"][0]["scores"]["length"] == pytest.approx(57 + 57 * 640 / 1e6)
    assert line["clips"][0]["scores"]["none"] is None


class Stripes(torch.nn.Module):
    """Autoencoder whose latents are means over 4 frames and 8 x 8 pixels."""

    temporal_stride, spatial_stride, channels = 4, 8, 3

    fingerprint = "stripes"

    def encode(self, video):
        following = (
            torch.nn.functional.avg_pool3d(video[:, :, 1:], (4, 8, 8))
            if video.shape[2] > 1
            else video[:, :, :0, ::8, ::8]
        )
        return torch.cat([torch.nn.functional.avg_pool3d(video[:, :, :1], (1, 8, 8)), following], dim=2)

    def decode(self, latents):
        raise NotImplementedError

    def encoder_stream(self):
        raise NotImplementedError

    def decoder_stream(self):
        raise NotImplementedError


class Levels:
    """Audio encoder whose features are mean levels over the previous, the current and the next frame."""

    dim, left_context, right_context, silence = 1, 1, 1, torch.zeros(1, 1)
    hop_frames, left_samples, lookahead_samples, num_layers = 1, 640, 640, 1

    def encode(self, samples):
        level = torch.nn.functional.pad(samples.reshape(-1, 640).square().mean(dim=1).sqrt(), (1, 1))
        return (level[:-2] + level[1:-1] + level[2:])[:, None] / 3

    def interior(self, samples):
        raise NotImplementedError

    def tokens(self, stride):
        raise NotImplementedError

    def window(self, features, stride):
        raise NotImplementedError

    @property
    def fingerprint(self):
        return "levels"


def test_encodings_are_of_the_stored_clip_and_the_surrounding_audio(video, tmp_path):
    (video.parent / "video.txt").write_text("a ball")
    try:
        models = Models(encoders=Encoders(Stripes(), Levels(), ByteTokenizer(32)))
        _, folder = stage_video(video, tmp_path, replace(RULES, longest_s=1.2), models)
    finally:
        (video.parent / "video.txt").unlink()
    stem = folder / "0000029"
    latent = np.load(f"{stem}.latent.npy")
    assert latent.shape == (3, 8, 8, 12) and latent.dtype == np.float16
    frames, _ = read_video(f"{stem}.video.mp4")
    assert latent[0, 1, 0, 0] == pytest.approx(frames[1:5, :8, :8, 0].mean() / 127.5 - 1, abs=2e-3)
    assert np.load(f"{stem}.ref_latent.npy").shape == (3, 1, 8, 12)
    features = np.load(f"{stem}.afeat.npy")
    complete = Levels().encode(torch.from_numpy(speech(2.4)))
    assert features.shape == (29, 1, 1)
    assert np.abs(features[:, 0] - complete[29:58].numpy()).max() < 2e-4  # in fp16, edges included
    assert len(np.load(f"{stem}.text.npy")) == len("a ball") + 1
    meta = json.loads((folder / "0000029.meta.json").read_text())
    assert meta["latent"] == {"autoencoder": "stripes"} and meta["audio_features"] == "levels"


def test_caption_that_the_text_encoder_rejects_is_rejected(tmp_path):
    path = talk(tmp_path / "video.mov", seconds=1.2)
    path.with_suffix(".txt").write_text("far too long for it")
    assert (
        stage_video(path, tmp_path, models=Models(encoders=Encoders(text=ByteTokenizer(8))))[0]["reason"]
        == "bad_caption"
    )


def test_strides_other_than_the_autoencoders_are_rejected():
    with pytest.raises(ValueError, match=r"rules\.temporal_stride"):
        Encoders(Stripes()).check(temporal_stride=8, multiple=8)


def test_sharpness_motion_and_longest_freeze():
    sharp = np.random.default_rng(0).integers(0, 255, (64, 64)).astype(np.uint8)
    blurred = (sharp.astype(int) + np.roll(sharp, 1, 0) + np.roll(sharp, 1, 1) + np.roll(sharp, (1, 1), (0, 1))) // 4
    assert scores.sharpness(blurred.astype(np.uint8)) < 0.3 * scores.sharpness(sharp)
    rng = np.random.default_rng(0)
    stats = [scores.FrameStats(rng.integers(0, 255, (3, 32, 32)).astype(np.uint8)) for _ in range(6)]
    assert scores.motion([stats[0]] * 5) == 0 and scores.motion(stats) > 0.2
    assert scores.longest_freeze([*stats, *[stats[0]] * 4, stats[1]]) == 4
    assert scores.motion(stats[:1]) is None


def test_speech_activity_detects_tones_in_noise():
    voiced = scores.speech_activity(speech(2.4))
    expected = np.zeros(60, bool)
    for first in (10, 30, 40):
        expected[first : first + 5] = True
    assert (voiced == expected).all()
    assert scores.speech_activity(0.3 * np.ones(6400, np.float32)).all()  # without a pause
    assert not scores.speech_activity(np.zeros(6400, np.float32)).any()


def test_sync_proxy_is_high_for_synchronous_audio_only():
    rng = np.random.default_rng(0)
    mouth = rng.random(100)
    audio = np.repeat(mouth, 640).astype(np.float32)
    assert scores.sync_proxy(audio, mouth) > 0.99
    assert abs(scores.sync_proxy(np.roll(audio, 640 * 7), mouth)) < 0.4
    mouth[20:] = np.nan
    assert scores.sync_proxy(audio, mouth) is None
