"""Every kind of file that is known to be trouble, and what it must come to: a reason, or a repair."""

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
from tests.data.preprocess.films import EVENTS, HEIGHT, RULES, WIDTH, beeps, lamp, scene, speech, talk, write

GRID = np.arange(60) / 25
TURN = [0, 1 << 16, 0, -1 << 16, 0, 0, WIDTH << 16, 0, 1 << 30]  # a quarter to the right


def make(name: str, folder: Path) -> Path:
    path, seconds = folder / f"{name}.mov", 2.4
    pictures, sound = scene(GRID), speech(seconds)
    match name:
        case "silent picture":
            return write(path, pictures, None)
        case "vfr":  # as a phone films: 30 Hz that lags now and then
            steps = np.where(np.arange(72) % 9 == 4, 0.066, 0.033)
            times = np.cumsum(np.concatenate([[0], steps]))
            times = times[times < seconds - 0.04]
            return write(path.with_suffix(".mkv"), scene(times), sound, times=times)
        case "rotated":
            data = bytearray(talk(path).read_bytes())
            matrix = data.index(b"tkhd") + 44  # of the first track
            data[matrix : matrix + 36] = b"".join(entry.to_bytes(4, "big", signed=True) for entry in TURN)
            path.write_bytes(data)
        case "late audio":
            return write(path, pictures, sound[11_200:], audio_at=0.7)
        case "early audio":
            times = GRID[5:]
            return write(path.with_suffix(".mkv"), pictures[5:], sound, times=times)
        case "gap":
            parts = [start / 16_000 for start in range(0, len(sound), 1024)]
            left = [number for number, time in enumerate(parts) if not 0.7 < time < 1.0]
            pieces = np.concatenate([sound[1024 * number : 1024 * (number + 1)] for number in left])
            return write(path.with_suffix(".mkv"), pictures, pieces, audio_times=[parts[number] for number in left])
        case "overlap":  # from the 15th packet on, all is 50 ms late, for a part of it came twice
            starts = [1024 * number - 800 * (number >= 14) for number in range(38)]
            pieces = np.concatenate([sound[start : start + 1024] for start in starts])
            return write(path.with_suffix(".mkv"), pictures, pieces, audio_times=[start / 16_000 for start in starts])
        case "antiphase":
            return write(path, pictures, np.stack([sound, -sound]))
        case "stereo":
            return write(path, pictures, np.stack([sound, 0.5 * sound]))
        case "frame count":  # an AVI whose header says 90 frames
            data = bytearray(
                write(path.with_suffix(".avi"), pictures, sound, codec="mpeg4", options={"q": "2"}).read_bytes()
            )
            length = data.index(b"strh") + 8 + 32
            assert int.from_bytes(data[length : length + 4], "little") == 60
            data[length : length + 4] = (90).to_bytes(4, "little")
            path.with_suffix(".avi").write_bytes(data)
        case "truncated":  # its index stands first, so that it opens
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
            return write(path, pictures, 0 * sound)
        case "clipped":
            return write(path, pictures, np.clip(8 * sound, -1, 1))
        case "frozen":
            return write(path, scene(np.zeros(60)), sound)
        case "nan":
            broken = sound.copy()
            broken[20_000] = np.nan
            return write(path, pictures, broken, audio_codec="pcm_f32le")
        case "odd size":
            return write(path, scene(GRID, 65, 97), sound, pixels="yuv444p")
        case "10 bit":
            return write(
                path.with_suffix(".mkv"), pictures, sound, codec="ffv1", pixels="yuv420p10le", options={"g": "1"}
            )
        case "8 kHz":
            return write(path, pictures, speech(seconds, 8_000), audio_rate=8_000)
        case "48 kHz AAC":
            file = path.with_suffix(".mp4")
            return write(file, pictures, np.stack([speech(seconds, 48_000)] * 2), audio_rate=48_000, audio_codec="aac")
        case "text":
            path.with_suffix(".mp4").write_text("This is not a film.\n" * 50)
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
            return write(path, scene(np.arange(144) / 60), sound, rate=60)
        case "sound only":  # a WAV under the name of a film
            write(path.with_suffix(".mkv"), pictures[:2], sound)
            return sound_only(path)
        case "sound ends early":
            return write(path, pictures, sound[:20_000])
        case "sound ends late":
            return write(path, pictures, np.concatenate([sound, 0.1 * sound[:3_200]]))
        case "latin-1 caption":
            path.with_suffix(".txt").write_bytes("schön".encode("latin-1"))
            return talk(path)
        case "broken JSON":
            path.with_suffix(".json").write_text("{caption: hello}")
            return talk(path)
        case "tiny":
            return write(path, scene(GRID, 6, 96), sound)
        case "large":
            return write(path, scene(GRID[:30], 520, 522), sound[:19_200])
        case "damaged":  # in one picture's data, which the decoder paints over
            with av.open(str(talk(path))) as file:
                packet = [packet for packet in file.demux(video=0) if packet.size][31]
            data = bytearray(path.read_bytes())
            middle = packet.pos + packet.size // 2
            data[middle : middle + 16] = np.random.default_rng(0).bytes(16)
            path.write_bytes(data)
    return path


def sound_only(path: Path) -> Path:
    from scipy.io import wavfile

    wavfile.write(path.with_suffix(".wav"), 16_000, speech(2.4))
    path.with_suffix(".mkv").unlink()
    return path.with_suffix(".wav").rename(path)


REJECTED = {
    "silent picture": "no_audio",
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
    "sound only": "no_video",
    "sound ends early": "av_length",
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
    "sound ends late": {"av_length"},
    "large": {"resized", "odd_size"},
}


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Name → the file, made when first asked for."""
    folder, made = tmp_path_factory.mktemp("filme mit ä"), {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = make(name, folder)
            if not made[name].exists():
                made[name] = next(made[name].parent.glob(f"{name}.[am][vkp][iv4]"))
        return made[name]

    return get


def staged(path: Path, staging: Path, rules: Rules = RULES, tools: Models | None = None):
    (source,) = find(str(path))
    before = path.read_bytes()
    line = stage(source, staging, rules, tools or Models())
    assert path.read_bytes() == before  # the user's
    return line, staging / source.key


@pytest.mark.parametrize("name", REJECTED)
def test_a_bad_file_is_rejected_with_its_reason(name, films, tmp_path):
    line, folder = staged(films(name), tmp_path)
    assert (line["status"], line["reason"]) == ("rejected", REJECTED[name]), line["detail"]
    assert line["reason"] in REJECTS and line["detail"]
    assert [file.name for file in folder.iterdir()] == ["line.json"]  # nothing of it is kept


@pytest.mark.parametrize("name", REPAIRED)
def test_a_mendable_file_is_mended_and_picture_and_sound_stay_together(name, films, tmp_path):
    line, folder = staged(films(name), tmp_path)
    assert line["status"] == "accepted", line["detail"]
    assert {made["code"] for made in line["repairs"]} == REPAIRED[name]
    (video,), (audio,) = folder.glob("*.video.mp4"), folder.glob("*.audio.flac")
    frames, rate = read_video(video)
    assert rate == 25 and len(frames) % 4 == 1
    assert len(read_audio(audio)) == 640 * len(frames)
    assert frames.shape[1] % 8 == frames.shape[2] % 8 == 0
    if name == "wide pixels":
        assert frames.shape[1:3] == (HEIGHT, 2 * WIDTH)
    if name == "rotated":
        assert frames.shape[1:3] == (WIDTH, HEIGHT)
        assert frames[0, WIDTH // 2, 2, 1] > frames[0, WIDTH // 2, 2, 0] + 60  # the green foot is at the left
        assert frames[0, WIDTH // 2, -3, 1] < frames[0, WIDTH // 2, -3, 0] + 30
        frames = np.rot90(frames, 1, axes=(1, 2))
        lit = frames[:, 2:10, 2:10].mean(axis=(1, 2, 3)) > 170
        on = (np.flatnonzero(lit[1:] & ~lit[:-1]) + 1) / 25
    else:
        on = lamp(video)
    events = np.array(EVENTS)[: 1 if name == "large" else 3] - (0.2 if name == "early audio" else 0.0)
    slack = 0.05 if name in ("vfr", "60 Hz") else 0.001  # a frame of either rate
    assert on == pytest.approx(events, abs=slack)
    heard = events[1:] if name == "late audio" else events  # whose first beep was cut off
    assert beeps(audio) == pytest.approx(heard, abs=0.01)


def test_sources_without_sound_are_kept_over_silence_if_asked(films, tmp_path):
    rules = Rules(**{**RULES.__dict__, "no_audio": "keep"})
    line, folder = staged(films("silent picture"), tmp_path, rules)
    assert line["status"] == "accepted" and line["audio"]["sha256"] is None
    (clip,) = line["clips"]
    assert clip["scores"]["loudness_db"] is None and clip["scores"]["speech"] is None
    assert not read_audio(next(folder.glob("*.audio.flac"))).any()


def test_a_file_that_goes_away_is_told(tmp_path, films):
    path = shutil.copy(films("schöne Grüße (1)"), tmp_path / "gone.mov")
    (source,) = find(str(path))
    Path(path).unlink()
    line = stage(source, tmp_path / "staging", RULES, Models())
    assert line["reason"] == "unreadable"
