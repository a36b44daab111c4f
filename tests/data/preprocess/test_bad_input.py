"""Known kinds of problematic files: each is rejected with its reason, or repaired."""

import shutil
from pathlib import Path

import av
import numpy as np
import pytest

from avatar.data.preprocess.pipeline import stage
from avatar.data.preprocess.reasons import REJECTS
from avatar.data.preprocess.rules import Models, Rules
from avatar.data.preprocess.sources import find
from avatar.media.decode import read_audio, read_video
from tests.data.preprocess.videos import EVENTS, HEIGHT, RULES, WIDTH, beeps, lamp, scene, speech, talk, write

GRID = np.arange(60) / 25
TURN = [0, 1 << 16, 0, -1 << 16, 0, 0, WIDTH << 16, 0, 1 << 30]  # a quarter to the right


def make(name: str, folder: Path) -> Path:
    path, seconds = folder / f"{name}.mov", 2.4
    frames, audio = scene(GRID), speech(seconds)
    match name:
        case "no audio":
            return write(path, frames, None)
        case "vfr":  # as a phone records: 30 Hz with occasional delays
            steps = np.where(np.arange(72) % 9 == 4, 0.066, 0.033)
            times = np.cumsum(np.concatenate([[0], steps]))
            times = times[times < seconds - 0.04]
            return write(path.with_suffix(".mkv"), scene(times), audio, times=times)
        case "rotated":
            data = bytearray(talk(path).read_bytes())
            matrix = data.index(b"tkhd") + 44  # of the first track
            data[matrix : matrix + 36] = b"".join(entry.to_bytes(4, "big", signed=True) for entry in TURN)
            path.write_bytes(data)
        case "late audio":
            return write(path, frames, audio[11_200:], audio_at=0.7)
        case "early audio":
            times = GRID[5:]
            return write(path.with_suffix(".mkv"), frames[5:], audio, times=times)
        case "gap":
            parts = [start / 16_000 for start in range(0, len(audio), 1024)]
            left = [number for number, time in enumerate(parts) if not 0.7 < time < 1.0]
            pieces = np.concatenate([audio[1024 * number : 1024 * (number + 1)] for number in left])
            return write(path.with_suffix(".mkv"), frames, pieces, audio_times=[parts[number] for number in left])
        case "overlap":  # from the 15th packet on everything is 50 ms late, since a part is repeated
            starts = [1024 * number - 800 * (number >= 14) for number in range(38)]
            pieces = np.concatenate([audio[start : start + 1024] for start in starts])
            return write(path.with_suffix(".mkv"), frames, pieces, audio_times=[start / 16_000 for start in starts])
        case "antiphase":
            return write(path, frames, np.stack([audio, -audio]))
        case "stereo":
            return write(path, frames, np.stack([audio, 0.5 * audio]))
        case "frame count":  # an AVI whose header says 90 frames
            data = bytearray(
                write(path.with_suffix(".avi"), frames, audio, codec="mpeg4", options={"q": "2"}).read_bytes()
            )
            length = data.index(b"strh") + 8 + 32
            assert int.from_bytes(data[length : length + 4], "little") == 60
            data[length : length + 4] = (90).to_bytes(4, "little")
            path.with_suffix(".avi").write_bytes(data)
        case "truncated":  # its index comes first, so that it opens
            data = talk(path, container={"movflags": "faststart"}).read_bytes()
            path.write_bytes(data[: len(data) // 2])
        case "truncated index":
            data = talk(path).read_bytes()
            path.write_bytes(data[: len(data) // 2])
        case "truncated mkv":
            data = talk(path.with_suffix(".mkv")).read_bytes()
            path.with_suffix(".mkv").write_bytes(data[: len(data) // 2])
        case "too short":
            return talk(path, seconds=0.6)
        case "silence":
            return write(path, frames, 0 * audio)
        case "clipped":
            return write(path, frames, np.clip(8 * audio, -1, 1))
        case "frozen":
            return write(path, scene(np.zeros(60)), audio)
        case "nan":
            invalid = audio.copy()
            invalid[20_000] = np.nan
            return write(path, frames, invalid, audio_codec="pcm_f32le")
        case "odd size":
            return write(path, scene(GRID, 65, 97), audio, pixels="yuv444p")
        case "10 bit":
            return write(
                path.with_suffix(".mkv"), frames, audio, codec="ffv1", pixels="yuv420p10le", options={"g": "1"}
            )
        case "8 kHz":
            return write(path, frames, speech(seconds, 8_000), audio_rate=8_000)
        case "48 kHz AAC":
            file = path.with_suffix(".mp4")
            return write(file, frames, np.stack([speech(seconds, 48_000)] * 2), audio_rate=48_000, audio_codec="aac")
        case "text":
            path.with_suffix(".mp4").write_text("This is not a video.\n" * 50)
        case "garbage":
            path.with_suffix(".mp4").write_bytes(np.random.default_rng(0).bytes(20_000))
        case "empty":
            path.touch()
        case "schöne Grüße (1)":
            return talk(path)
        case "wide pixels":
            return talk(path, pixel_aspect=2)
        case "full range":
            return talk(path, pixels="yuvj420p")
        case "interlaced":
            return talk(path, options={"preset": "ultrafast", "x264-params": "tff=1:interlaced=1"})
        case "60 Hz":
            return write(path, scene(np.arange(144) / 60), audio, rate=60)
        case "audio only":  # a WAV file with the suffix of a video
            write(path.with_suffix(".mkv"), frames[:2], audio)
            return audio_only(path)
        case "audio ends early":
            return write(path, frames, audio[:20_000])
        case "audio ends late":
            return write(path, frames, np.concatenate([audio, 0.1 * audio[:3_200]]))
        case "latin-1 caption":
            path.with_suffix(".txt").write_bytes("schön".encode("latin-1"))
            return talk(path)
        case "broken JSON":
            path.with_suffix(".json").write_text("{caption: hello}")
            return talk(path)
        case "tiny":
            return write(path, scene(GRID, 6, 96), audio)
        case "large":
            return write(path, scene(GRID[:30], 520, 522), audio[:19_200])
        case "damaged":  # in the data of one frame, which the decoder conceals
            with av.open(str(talk(path))) as file:
                packet = [packet for packet in file.demux(video=0) if packet.size][31]
            data = bytearray(path.read_bytes())
            middle = packet.pos + packet.size // 2
            data[middle : middle + 16] = np.random.default_rng(0).bytes(16)
            path.write_bytes(data)
    return path


def audio_only(path: Path) -> Path:
    from scipy.io import wavfile

    wavfile.write(path.with_suffix(".wav"), 16_000, speech(2.4))
    path.with_suffix(".mkv").unlink()
    return path.with_suffix(".wav").rename(path)


REJECTED = {
    "no audio": "no_audio",
    "antiphase": "antiphase",
    "frame count": "frame_count",
    "truncated": "frame_count",
    "truncated index": "corrupt",
    "truncated mkv": "frame_count",
    "too short": "too_short",
    "silence": "silent",
    "clipped": "clipped",
    "frozen": "frozen",
    "nan": "nonfinite",
    "text": "corrupt",
    "garbage": "corrupt",
    "empty": "empty",
    "audio only": "no_video",
    "audio ends early": "av_length",
    "latin-1 caption": "bad_caption",
    "broken JSON": "bad_caption",
    "tiny": "too_small",
    "damaged": "corrupt",
}
REPAIRED = {
    "vfr": {"vfr"},
    "rotated": {"rotated"},
    "late audio": {"start_offset"},
    "early audio": {"start_offset"},
    "gap": {"audio_gap"},
    "overlap": {"audio_overlap"},
    "stereo": {"downmix"},
    "odd size": {"odd_size", "pixel_format"},
    "10 bit": {"pixel_format"},
    "8 kHz": {"sample_rate"},
    "48 kHz AAC": {"sample_rate", "downmix"},
    "schöne Grüße (1)": set(),
    "interlaced": {"interlaced"},
    "wide pixels": {"aspect"},
    "full range": {"pixel_format"},
    "60 Hz": {"frame_rate"},
    "audio ends late": {"av_length"},
    "large": {"resized", "odd_size"},
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Returns the file of a name, created at the first call."""
    folder, files = tmp_path_factory.mktemp("filme mit ä"), {}

    def get(name: str) -> Path:
        if name not in files:
            files[name] = make(name, folder)
            if not files[name].exists():
                files[name] = next(files[name].parent.glob(f"{name}.[am][vkp][iv4]"))
        return files[name]

    return get


def stage_file(path: Path, staging: Path, rules: Rules = RULES):
    (source,) = find(str(path))
    before = path.read_bytes()
    line = stage(source, staging, rules, Models())
    assert path.read_bytes() == before
    return line, staging / source.key


@pytest.mark.parametrize("name", REJECTED)
def test_invalid_file_is_rejected_with_its_reason(name, videos, tmp_path):
    line, folder = stage_file(videos(name), tmp_path)
    assert (line["status"], line["reason"]) == ("rejected", REJECTED[name]), line["detail"]
    assert line["reason"] in REJECTS and line["detail"]
    assert [file.name for file in folder.iterdir()] == ["line.json"]  # no other file is kept


@pytest.mark.parametrize("name", REPAIRED)
def test_repaired_file_keeps_video_and_audio_synchronous(name, videos, tmp_path):
    line, folder = stage_file(videos(name), tmp_path)
    assert line["status"] == "accepted", line["detail"]
    assert {repair["code"] for repair in line["repairs"]} == REPAIRED[name]
    (video,), (audio,) = folder.glob("*.video.mp4"), folder.glob("*.audio.flac")
    frames, rate = read_video(video)
    assert rate == 25 and len(frames) % 4 == 1
    assert len(read_audio(audio)) == 640 * len(frames)
    assert frames.shape[1] % 8 == frames.shape[2] % 8 == 0
    if name == "wide pixels":
        assert frames.shape[1:3] == (HEIGHT, 2 * WIDTH)
    if name == "rotated":
        assert frames.shape[1:3] == (WIDTH, HEIGHT)
        assert frames[0, WIDTH // 2, 2, 1] > frames[0, WIDTH // 2, 2, 0] + 60  # the green stripe is at the left
        assert frames[0, WIDTH // 2, -3, 1] < frames[0, WIDTH // 2, -3, 0] + 30
        frames = np.rot90(frames, 1, axes=(1, 2))
        lit = frames[:, 2:10, 2:10].mean(axis=(1, 2, 3)) > 170
        lamp_on = (np.flatnonzero(lit[1:] & ~lit[:-1]) + 1) / 25
    else:
        lamp_on = lamp(video)
    events = np.array(EVENTS)[: 1 if name == "large" else 3] - (0.2 if name == "early audio" else 0.0)
    tolerance = 0.05 if name in ("vfr", "60 Hz") else 0.001  # a frame of the source or of the grid
    assert lamp_on == pytest.approx(events, abs=tolerance)
    tones = events[1:] if name == "late audio" else events  # the audio starts after the first beep
    assert beeps(audio) == pytest.approx(tones, abs=0.01)


def test_no_audio_keep_accepts_sources_without_audio(videos, tmp_path):
    rules = Rules(**{**RULES.__dict__, "no_audio": "keep"})
    line, folder = stage_file(videos("no audio"), tmp_path, rules)
    assert line["status"] == "accepted" and line["audio"]["sha256"] is None
    (clip,) = line["clips"]
    assert clip["scores"]["loudness_db"] is None and clip["scores"]["speech"] is None
    assert not read_audio(next(folder.glob("*.audio.flac"))).any()


def test_deleted_source_is_rejected_as_unreadable(tmp_path, videos):
    path = shutil.copy(videos("schöne Grüße (1)"), tmp_path / "gone.mov")
    (source,) = find(str(path))
    Path(path).unlink()
    line = stage(source, tmp_path / "staging", RULES, Models())
    assert line["reason"] == "unreadable"
