"""MP4 files: content, codecs, and what is left after a kill, an error or a full disk."""

import contextlib
import signal
import subprocess
import sys

import av
import av.error
import numpy as np
import pytest

from avatar.media.decode import read_audio, read_video
from avatar.media.mp4_writer import Mp4Writer


def frames(count: int, first: int = 0, size: tuple[int, int] = (64, 64)) -> np.ndarray:
    """Grey frames, each lighter by two levels than the one before."""
    levels = np.uint8(20 + 2 * np.arange(first, first + count))
    return np.broadcast_to(levels[:, None, None, None], (count, *size, 3)).copy()


def silence(count: int) -> np.ndarray:
    return np.zeros(640 * count, np.float32)


def names(folder) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def playable_frames(path) -> int:
    """The number of frames that a player shows of a truncated file; it skips damaged packets."""
    count = 0
    with av.open(str(path)) as container:
        for packet in container.demux(video=0):
            with contextlib.suppress(av.error.InvalidDataError):
                count += len(packet.decode())
    return count


# A writer in another process: python -c SCRIPT folder
SCRIPT = """
import os, resource, signal, sys
import numpy as np
from avatar.media.mp4_writer import Mp4Writer

def stream(folder, stop, count=100):
    with Mp4Writer(folder + "/out.mp4", 64) as writer:
        for i in range(count):
            noise = np.random.default_rng(i).integers(0, 255, (1, 64, 64, 3), np.uint8)
            writer.write(noise, np.zeros(640, np.float32))
        stop()
"""


def run(folder, stop: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", SCRIPT + stop, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("chunk", [1, 7])
def test_frames_and_audio_are_complete_in_order_and_synchronous(tmp_path, chunk):
    loud = silence(70)
    loud[640 * 35 : 640 * 36] = 0.5 * np.sin(np.arange(640) / 3).astype(np.float32)
    with Mp4Writer(tmp_path / "a b" / "größe.mp4", 64) as writer:
        for i in range(0, 70, chunk):
            writer.write(frames(chunk, i), loud[640 * i : 640 * (i + chunk)])
    decoded, rate = read_video(writer.path)
    assert rate == 25
    assert decoded.shape == (70, 64, 64, 3)
    np.testing.assert_allclose(decoded.mean((1, 2, 3)), frames(70).mean((1, 2, 3)), atol=4)
    audio = read_audio(writer.path)
    assert len(audio) / 640 == pytest.approx(70, abs=2)  # AAC comes in packets of 1.6 frames
    assert np.argmax(np.abs(audio) > 0.1) / 640 == pytest.approx(35, abs=0.1)
    assert names(writer.path.parent) == ["größe.mp4"]


def test_the_codecs_and_the_index_are_those_that_browsers_play(tmp_path):
    with Mp4Writer(tmp_path / "a.mp4", (48, 64)) as writer:
        writer.write(frames(30, size=(48, 64)), silence(30))
    with av.open(str(writer.path)) as container:
        video, audio = container.streams.video[0].codec_context, container.streams.audio[0].codec_context
        assert (video.name, video.pix_fmt, video.height, video.width) == ("h264", "yuv420p", 48, 64)
        assert (audio.name, audio.sample_rate, audio.layout.name) == ("aac", 16_000, "mono")
        assert container.duration / 1e6 == pytest.approx(30 / 25, abs=0.05)
        assert container.streams.video[0].start_time == 0
    data = writer.path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # the index first, and only one
    assert b"moof" not in data


def test_saturated_colours_are_preserved(tmp_path):
    colours = np.uint8([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]])
    images = np.broadcast_to(colours[:, None, None], (4, 64, 64, 3)).copy()
    with Mp4Writer(tmp_path / "a.mp4", 64) as writer:
        writer.write(images, silence(4))
    decoded, _ = read_video(writer.path)
    assert np.abs(decoded[:, 32, 32].astype(int) - colours).max() <= 8


def test_the_partial_file_of_a_killed_process_plays(tmp_path):
    assert (
        run(tmp_path, "stream(sys.argv[1], lambda: os.kill(os.getpid(), signal.SIGKILL))").returncode == -signal.SIGKILL
    )
    assert names(tmp_path) == ["out.partial.mp4"]
    assert playable_frames(tmp_path / "out.partial.mp4") >= 80
    assert len(read_audio(tmp_path / "out.partial.mp4")) >= 80 * 640


def test_the_file_is_complete_after_ctrl_c(tmp_path):
    done = run(tmp_path, "stream(sys.argv[1], lambda: os.kill(os.getpid(), signal.SIGINT))")
    assert "KeyboardInterrupt" in done.stderr
    assert names(tmp_path) == ["out.mp4"]
    assert len(read_video(tmp_path / "out.mp4")[0]) == 100


def test_the_file_stays_partial_after_another_error_with_a_warning(tmp_path, caplog):
    with pytest.raises(ZeroDivisionError), Mp4Writer(tmp_path / "out.mp4", 64) as writer:
        writer.write(frames(30), silence(30))
        raise ZeroDivisionError
    assert names(tmp_path) == ["out.partial.mp4"]
    assert "out.partial.mp4" in caplog.text
    assert len(read_video(writer.partial)[0]) == 30


# 100 frames take 239 kB before `close` and 267 kB after it. PyAV reports a full disk, except at the last write.
@pytest.mark.parametrize(("limit", "least"), [(100_000, 30), (255_000, 90)])
def test_a_full_disk_gives_one_line_and_keeps_the_partial_file(tmp_path, limit, least):
    done = run(
        tmp_path,
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "try:\n    stream(sys.argv[1], lambda: None)\nexcept OSError as error:\n    print(error)",
    )
    assert done.stdout.startswith(f"can't write {tmp_path / 'out.mp4'} (")
    assert done.stdout.count("\n") == 1
    assert names(tmp_path) == ["out.partial.mp4"]
    assert playable_frames(tmp_path / "out.partial.mp4") >= least


def test_a_full_disk_while_the_index_is_moved_keeps_the_partial_file(tmp_path, monkeypatch):
    def full(*paths):
        paths[1].write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("avatar.media.mp4_writer._copy_index_first", full)
    with (
        pytest.raises(OSError, match=r"No space left on device\) after 30 frames"),
        Mp4Writer(tmp_path / "a.mp4", 64) as w,
    ):
        w.write(frames(30), silence(30))
    assert names(tmp_path) == ["a.partial.mp4"]
    assert len(read_video(w.partial)[0]) == 30


def test_an_existing_file_is_overwritten_on_request_only(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="choose another name"):
        Mp4Writer(tmp_path / "a.mp4", 64)
    with Mp4Writer(tmp_path / "a.mp4", 64, overwrite=True) as writer:
        writer.write(frames(2), silence(2))
        assert (tmp_path / "a.mp4").read_bytes() == b"mine"
    assert len(read_video(tmp_path / "a.mp4")[0]) == 2


def test_a_file_created_in_the_meantime_is_not_overwritten(tmp_path):
    with pytest.raises(FileExistsError), Mp4Writer(tmp_path / "a.mp4", 64) as writer:
        writer.write(frames(2), silence(2))
        (tmp_path / "a.mp4").write_bytes(b"mine")
    assert (tmp_path / "a.mp4").read_bytes() == b"mine"
    assert len(read_video(writer.partial)[0]) == 2


def test_an_older_partial_file_is_kept(tmp_path):
    (tmp_path / "a.partial.mp4").write_bytes(b"of a killed run")
    with Mp4Writer(tmp_path / "a.mp4", 64) as writer:
        writer.write(frames(2), silence(2))
    assert writer.partial.name == "a.partial-2.mp4"
    assert names(tmp_path) == ["a.mp4", "a.partial.mp4"]


def test_no_file_is_left_without_frames(tmp_path):
    with pytest.raises(ValueError, match="no frame"), Mp4Writer(tmp_path / "a.mp4", 64):
        pass
    with pytest.raises(KeyboardInterrupt), Mp4Writer(tmp_path / "a.mp4", 64):
        raise KeyboardInterrupt
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("path", "size"), [("a.mp4", 63), ("a.mp4", (64, 33)), ("a.mp4", (33, 64)), ("a.mp4", 0), ("a.avi", 64)]
)
def test_invalid_sizes_and_names_are_rejected_before_a_file_is_created(tmp_path, path, size):
    with pytest.raises(ValueError, match=r"got .*; expected"):
        Mp4Writer(tmp_path / path, size)
    assert names(tmp_path) == []


def test_a_folder_that_is_not_writable_is_reported(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"can't write .* choose another"):
        Mp4Writer(tmp_path / "file" / "a.mp4", 64)


@pytest.mark.parametrize(("images", "audio"), [(frames(2), silence(3)), (frames(2, size=(64, 32)), silence(2))])
def test_frames_of_another_size_and_audio_of_another_length_are_rejected(tmp_path, images, audio):
    with (
        pytest.raises(ValueError, match="expected 64 x 64 pixels and 640 samples"),
        Mp4Writer(tmp_path / "a.mp4", 64) as w,
    ):
        w.write(images, audio)
    assert names(tmp_path) == []
