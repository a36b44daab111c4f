"""Decoding of media files: images, audio and video in any format that Pillow or PyAV reads.

The output has a fixed form: square RGB images of a given size, mono float32 audio at 16 kHz, RGB frames. `read_image`
also returns a note of the changes that it made. Files that cannot be decoded raise UserError, missing ones
MissingFileError, each with a message of one line.
"""

from pathlib import Path

import av
import av.container
import av.error
import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageOps

from avatar.errors import MissingFileError, UserError
from avatar.types import SAMPLE_RATE

# Share of the channels' energy that a downmix keeps: below this, the channels cancel each other. Independent channels
# keep 1 / channels; two channels keep a half if one is silent.
MIN_DOWNMIX_ENERGY = 0.01

# FFmpeg decodes any text file as a video of a terminal.
TEXT_CODECS = {"ansi", "bintext", "xbin", "idf"}


def read_image(path: str | Path, size: int) -> tuple[UInt8[np.ndarray, "h w 3"], str]:
    """Read an image, crop it to a square and resize it. Returns the pixels and a note of the changes ("": none).

    Tall images are cropped to their upper part, where the face is, wide ones to their middle. The image of an animation
    or a video is its first frame.

    Args:
        path: of an image or a video.
        size: height and width of the output in pixels.

    Raises:
        UserError: the file cannot be decoded as an image, or its pixels have no known range.
        MissingFileError: the file does not exist.
    """
    image, notes = _open_image(path)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        notes.append("composited on white where it was transparent")
    image = image.convert("RGB")

    width, height = image.size
    side = min(width, height)
    left = (width - side) // 2
    if width != height:
        part = "upper" if height > width else "middle"
        notes.append(f"cropped to the {part} {side} x {side} of {width} x {height} pixels")
    if side < size:
        notes.append(f"enlarged from {side} to {size} pixels, so it looks blurred")
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, 0, left + side, side))
    return np.asarray(image).copy(), "; ".join(notes)


def read_audio(path: str | Path) -> Float32[np.ndarray, " s"]:
    """Read the first audio stream of a file, average its channels and resample it to 16 kHz; full scale is 1.

    Args:
        path: of an audio or video file.

    Raises:
        UserError: the file cannot be decoded as audio, has no samples, has samples that are not finite, or its channels
            are in anti-phase and cancel when averaged.
        MissingFileError: the file does not exist.
    """
    file = _require_file(path, "an audio or video file")
    planar = av.AudioResampler(format="fltp")
    resampler = av.AudioResampler(format="fltp", layout="mono", rate=SAMPLE_RATE)
    resampled: list[np.ndarray] = []
    channel_energy = mono_energy = 0.0
    try:
        with av.open(str(file)) as container:
            if not container.streams.audio:
                raise UserError(f"got {path}, which has no audio stream; expected speech: choose a file with audio")
            for decoded in container.decode(audio=0):
                for frame in planar.resample(decoded):
                    channels = frame.to_ndarray()
                    if not np.isfinite(channels).all():
                        raise UserError(
                            f"got {path}, which has samples that are NaN or infinite, at {frame.time or 0.0:.2f} s; "
                            "expected finite ones: export it again, best as 16-bit WAV"
                        )
                    mono = channels.mean(axis=0)
                    channel_energy += float(np.square(channels, dtype=np.float64).mean(axis=0).sum())
                    mono_energy += float(np.square(mono, dtype=np.float64).sum())
                    resampled += _resample(resampler, mono, frame.sample_rate)
    except av.error.FFmpegError as error:
        raise UserError(_read_error(path, "audio", error)) from error
    if not resampled:
        raise UserError(f"got {path}, an audio stream without samples; expected speech: record or export it again")
    resampled += [frame.to_ndarray()[0] for frame in resampler.resample(None)]
    if mono_energy < MIN_DOWNMIX_ENERGY * channel_energy:
        raise UserError(
            f"got {path}, whose channels are in anti-phase: their average keeps {mono_energy / channel_energy:.1%} of "
            f"the energy; expected at least {MIN_DOWNMIX_ENERGY:.0%}: flip the sign of one channel or export only one"
        )
    return np.concatenate(resampled)


def read_video(path: str | Path) -> tuple[UInt8[np.ndarray, "f h w 3"], float]:
    """Read all frames of a short video, rotated upright, and its mean frame rate in Hz; no frame rate conversion.

    Raises:
        UserError: the file cannot be decoded as video, or has no frames or no frame rate.
        MissingFileError: the file does not exist.
    """
    file = _require_file(path, "a video file")
    try:
        with av.open(str(file)) as container:
            if not _has_video(container):
                raise UserError(f"got {path}, which has no video stream; expected a video: choose one, such as an MP4")
            frame_rate = container.streams.video[0].average_rate
            frames = [_upright(frame) for frame in container.decode(video=0)]
    except av.error.FFmpegError as error:
        raise UserError(_read_error(path, "video", error)) from error
    if not frames or not frame_rate:
        raise UserError(
            f"got {path}, which has {len(frames)} frames at {frame_rate} Hz; expected at least one frame and a frame "
            "rate: export it again"
        )
    return np.stack(frames), float(frame_rate)


def _open_image(path: str | Path) -> tuple[Image.Image, list[str]]:
    """The first frame, upright, with 8 bits per channel, and the notes."""
    file, notes = _require_file(path, "an image"), []
    try:
        with Image.open(file) as image:
            frames = getattr(image, "n_frames", 1)  # not an attribute of Pillow's formats with a single frame
            if frames > 1:
                notes.append(f"first of {frames} frames")
            if image.getexif().get(0x0112, 1) != 1:
                notes.append("rotated upright by its EXIF data")
            image = ImageOps.exif_transpose(image)
    except Image.UnidentifiedImageError:
        return _read_first_frame(path, file), ["first frame of a video"]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(_read_error(path, "image", error)) from error
    if image.mode.startswith("I;16"):  # 16-bit grey: Pillow would clip it at 255 instead of scaling it
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise UserError(
            f"got {path} with pixels of mode {image.mode}, whose range is unknown; expected 8 or 16 bits per channel: "
            "export it again, as PNG"
        )
    return image, notes


def _read_first_frame(path: str | Path, file: Path) -> Image.Image:
    try:
        with av.open(str(file)) as container:
            if _has_video(container):
                for frame in container.decode(video=0):
                    return Image.fromarray(_upright(frame))
    except av.error.FFmpegError as error:
        raise UserError(_read_error(path, "image", error)) from error
    raise UserError(_read_error(path, "image", "it contains no image"))


def _has_video(container: av.container.InputContainer) -> bool:
    return bool(container.streams.video) and container.streams.video[0].codec_context.name not in TEXT_CODECS


def _upright(frame: av.VideoFrame) -> np.ndarray:
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)  # both count counter-clockwise


def _resample(resampler: av.AudioResampler, mono: np.ndarray, sample_rate: int) -> list[np.ndarray]:
    frame = av.AudioFrame.from_ndarray(mono[None], format="fltp", layout="mono")
    frame.sample_rate = sample_rate
    return [out.to_ndarray()[0] for out in resampler.resample(frame)]


def _require_file(path: str | Path, expected: str) -> Path:
    """The absolute path, which FFmpeg cannot take for a URL; raises UserError unless the file can be opened."""
    file = Path(path).absolute()
    if not file.exists():
        raise MissingFileError(
            f"got {path}, which does not exist; expected {expected}: check the path, relative to {Path.cwd()}"
        )
    if not file.is_file():
        kind = "a folder" if file.is_dir() else "not a regular file"
        raise UserError(f"got {path}, which is {kind}; expected {expected}: choose another path")
    try:
        file.open("rb").close()
    except OSError as error:
        raise UserError(
            f"got {path}, which can't be opened ({error.strerror}); expected {expected}: change its permissions"
        ) from error
    return file


def _read_error(path: str | Path, kind: str, error: object) -> str:
    reason = getattr(error, "strerror", None) or str(error)
    size = Path(path).stat().st_size
    return (
        f"got {path} ({size} bytes), which can't be read as {kind} ({reason}); expected a valid file: export it again"
    )
