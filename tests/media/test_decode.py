"""Decoding of images, audio and video in the formats of users' files."""

import os
import wave
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from avatar.media.decode import read_audio, read_image, read_video
from avatar.media.mp4_writer import Mp4Writer

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def tone(rate: int, seconds: float = 1.0, hz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def write_audio(path, channels: np.ndarray, rate: int, codec: str, form: str = "fltp"):
    """Write channels `c s` in the container of the path's suffix."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout={1: "mono", 2: "stereo"}[len(channels)])
        samples = channels if form.endswith("p") else channels.T.reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format=form, layout=stream.layout.name)
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        for packet in stream.encode(frame) + stream.encode(None):
            container.mux(packet)
    return path


@pytest.mark.parametrize(
    ("suffix", "codec", "rate", "count", "slack"),
    [
        ("wav", "pcm_s16le", 8_000, 1, 0),
        ("wav", "pcm_s16le", 44_100, 2, 0),
        ("flac", "flac", 16_000, 1, 0),
        ("flac", "flac", 48_000, 2, 0),
        ("mp3", "libmp3lame", 44_100, 2, 1200),
        ("ogg", "libopus", 48_000, 1, 400),
        ("m4a", "aac", 44_100, 2, 1200),
        ("mkv", "aac", 22_050, 1, 1600),
    ],
)
def test_audio_of_every_format_keeps_its_length_pitch_and_level(tmp_path, suffix, codec, rate, count, slack):
    path = tmp_path / f"größe und laut.{suffix}"  # with a space and umlauts
    audio = read_audio(write_audio(path, np.stack([tone(rate)] * count), rate, codec))
    assert audio.dtype == np.float32
    assert abs(len(audio) - 16_000) <= slack  # coders pad to complete packets
    middle = audio[4_000:12_000]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    assert np.argmax(spectrum) * 2 == 440  # bins of 2 Hz
    assert np.sqrt(np.mean(middle**2)) == pytest.approx(0.5 / np.sqrt(2), rel=0.05)


def test_mono_audio_at_16_khz_is_unchanged(tmp_path):
    noise = np.random.default_rng(0).integers(-20_000, 20_000, 4_000).astype(np.int16)
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(noise.tobytes())
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav"), noise.astype(np.float32) / 32_768)


def test_stereo_is_averaged_and_one_channel_may_be_silent(tmp_path):
    left = tone(16_000)
    path = write_audio(tmp_path / "a.wav", np.stack([left, 0 * left]), 16_000, "pcm_f32le", "flt")
    np.testing.assert_allclose(read_audio(path), left / 2, atol=1e-6)


def test_stereo_in_anti_phase_is_rejected(tmp_path):
    left = tone(16_000)
    path = write_audio(tmp_path / "a.wav", np.stack([left, -0.9 * left]), 16_000, "pcm_f32le", "flt")
    with pytest.raises(ValueError, match="anti-phase"):
        read_audio(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_samples_are_rejected(tmp_path, bad):
    samples = tone(16_000)
    samples[8_000] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        read_audio(write_audio(tmp_path / "a.wav", samples[None], 16_000, "pcm_f32le", "flt"))


def test_an_audio_stream_without_samples_is_rejected(tmp_path):
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
    with pytest.raises(ValueError, match="without samples"):
        read_audio(tmp_path / "a.wav")


def test_a_missing_audio_or_video_stream_is_reported(tmp_path):
    with av.open(str(tmp_path / "mute.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = 64
        for packet in stream.encode(av.VideoFrame(64, 64, "yuv420p")) + stream.encode(None):
            container.mux(packet)
    with pytest.raises(ValueError, match="no audio stream"):
        read_audio(tmp_path / "mute.mp4")
    with pytest.raises(ValueError, match="no video stream"):
        read_video(write_audio(tmp_path / "a.wav", tone(16_000)[None], 16_000, "pcm_f32le", "flt"))


@pytest.mark.parametrize("read", [read_audio, read_video, lambda path: read_image(path, 64)])
@pytest.mark.parametrize("name", ["empty.mp4", "text.mp4", "text.txt", "noise.png", "noise.wav", "folder", "missing"])
def test_other_files_are_rejected_with_one_line_and_their_path(tmp_path, read, name):
    path = tmp_path / name
    noise = np.random.default_rng(0).bytes(5_000)
    if name == "folder":
        path.mkdir()
    elif name != "missing":
        path.write_bytes({"empty": b"", "text": b"not a video\n" * 50, "noise": noise}[path.stem])
    with pytest.raises(FileNotFoundError if name == "missing" else ValueError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "expected" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_and_a_device_are_rejected(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        read_audio(tmp_path)
    with pytest.raises(ValueError, match="is not a regular file"):
        read_image(os.devnull, 64)


def sample_image(height: int, width: int) -> Image.Image:
    """An image that is red above and blue below; its left tenth is green."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2], pixels[height // 2 :], pixels[:, : width // 10] = RED, BLUE, GREEN
    return Image.fromarray(pixels)


def near(pixel: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool(np.abs(pixel.astype(int) - colour).max() <= 4)


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "tiff", "jpg"])
def test_a_square_image_is_resized_without_a_note(tmp_path, suffix):
    sample_image(200, 200).save(tmp_path / f"ein bild.{suffix}", quality=95)
    pixels, note = read_image(tmp_path / f"ein bild.{suffix}", 64)
    assert pixels.shape == (64, 64, 3)
    assert pixels.dtype == np.uint8
    assert note == ""
    assert near(pixels[10, 40], RED)
    assert near(pixels[50, 40], BLUE)
    assert near(pixels[50, 2], GREEN)


def test_tall_images_are_cropped_above_and_wide_ones_in_the_middle(tmp_path):
    sample_image(400, 200).save(tmp_path / "tall.png")
    pixels, note = read_image(tmp_path / "tall.png", 64)
    assert near(pixels[60, 40], RED)
    assert "upper 200 x 200 of 200 x 400" in note

    sample_image(200, 400).save(tmp_path / "wide.png")
    pixels, note = read_image(tmp_path / "wide.png", 64)
    assert near(pixels[2, 0], RED)  # the green tenth is cropped
    assert near(pixels[60, 63], BLUE)
    assert "middle 200 x 200 of 400 x 200" in note


def test_downscaling_averages_pixels(tmp_path):
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    pixels, _ = read_image(tmp_path / "a.png", 64)
    assert near(pixels[32, 32], (128, 128, 128))


def test_small_images_are_enlarged_with_a_note(tmp_path):
    sample_image(20, 20).save(tmp_path / "a.png")
    pixels, note = read_image(tmp_path / "a.png", 64)
    assert pixels.shape == (64, 64, 3)
    assert "enlarged from 20 to 64" in note


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the image is at its right
    sample_image(200, 200).save(tmp_path / "a.jpg", exif=exif, quality=95)
    pixels, note = read_image(tmp_path / "a.jpg", 64)
    assert near(pixels[40, 60], RED)
    assert near(pixels[40, 4], BLUE)
    assert near(pixels[2, 32], GREEN)
    assert "EXIF" in note


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white_with_a_note(tmp_path, mode):
    image = sample_image(100, 100).convert("RGBA")
    image.putalpha(Image.fromarray(np.repeat(np.uint8([[0, 255]]), 50, axis=1).repeat(100, axis=0)))
    image.convert(mode).save(tmp_path / "a.png")
    pixels, note = read_image(tmp_path / "a.png", 100)
    assert near(pixels[50, 20], WHITE)
    assert not near(pixels[50, 80], WHITE)
    assert "white" in note


def test_the_first_frame_of_a_gif_is_read(tmp_path):
    frames = [sample_image(100, 100).convert("P"), Image.new("P", (100, 100))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    pixels, note = read_image(tmp_path / "a.gif", 64)
    assert near(pixels[10, 40], RED)
    assert "first of 2 frames" in note


def test_16_bit_grey_is_scaled(tmp_path):
    Image.fromarray(np.full((64, 64), 32_896, np.uint16)).save(tmp_path / "a.png")
    assert near(read_image(tmp_path / "a.png", 64)[0][32, 32], (128, 128, 128))


def test_a_truncated_image_is_rejected(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:5_000])
    with pytest.raises(ValueError, match="can't be read as image"):
        read_image(tmp_path / "a.jpg", 64)


@pytest.fixture
def short_video(tmp_path):
    """Three frames of the sample image, with audio."""
    with Mp4Writer(tmp_path / "video.mp4", 64) as writer:
        writer.write(np.stack([np.asarray(sample_image(64, 64))] * 3), tone(16_000, 3 / 25))
    return tmp_path / "video.mp4"


def test_the_first_frame_of_a_video_is_read_as_an_image(short_video):
    pixels, note = read_image(short_video, 64)
    assert pixels[10, 40, 0] > 200
    assert pixels[50, 40, 2] > 200
    assert "video" in note


def test_all_frames_and_the_frame_rate_of_a_video_are_read(short_video):
    frames, rate = read_video(short_video)
    assert frames.shape == (3, 64, 64, 3)
    assert rate == 25


def test_the_rotation_in_the_header_of_a_video_is_applied(short_video):
    data = bytearray(short_video.read_bytes())
    matrix = data.index(b"tkhd") + 44  # of the first track, the video's
    quarter_turn_right = [0, 1 << 16, 0, -1 << 16, 0, 0, 64 << 16, 0, 1 << 30]
    data[matrix : matrix + 36] = b"".join(entry.to_bytes(4, "big", signed=True) for entry in quarter_turn_right)
    short_video.write_bytes(data)
    frames, _ = read_video(short_video)
    assert frames[0, 40, 60, 0] > 200  # the upper part is at the right
    assert frames[0, 40, 4, 2] > 200
