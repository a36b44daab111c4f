"""Media from the user's files: images, speech and video, in any format that Pillow or PyAV reads.

What comes out is always the same: square RGB images of a wanted size, mono float32 audio at 16 kHz, RGB frames.
What was done to an image on the way is told in words, since the user may want to do it better. A file that can't be
read as it was meant raises UserError (FileNotFoundError if there is none) with a message of one line.
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

# A downmix that keeps less of the channels' energy than this has cancelled itself out. Independent channels keep
# 1 / channels, one silent channel of two a half.
LEAST_DOWNMIX_ENERGY = 0.01

# FFmpeg reads any text file as a film of a terminal.
TEXT_CODECS = {"ansi", "bintext", "xbin", "idf"}


def read_image(path: str | Path, size: int) -> tuple[UInt8[np.ndarray, "h w 3"], str]:
    """A picture as a square of `size` pixels, and a note of what that cost ("" if nothing worth saying).

    Tall pictures keep their upper part, where the face is; wide ones their middle. Of an animation or a video the first
    frame counts.
    """
    image, notes = _open_image(path)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        notes.append("laid on white where it was transparent")
    image = image.convert("RGB")

    width, height = image.size
    side = min(width, height)
    left = (width - side) // 2
    if width != height:
        kept = "upper" if height > width else "middle"
        notes.append(f"cropped to the {kept} {side} x {side} of {width} x {height} pixels")
    if side < size:
        notes.append(f"enlarged from {side} to {size} pixels, so it will look soft")
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, 0, left + side, side))
    return np.asarray(image).copy(), "; ".join(notes)


def read_audio(path: str | Path) -> Float32[np.ndarray, " s"]:
    """The first audio stream of a file, from its own start: mono, 16 kHz, full scale at 1; channels are averaged.

    Raises:
        UserError: no audio in it, samples that are not finite, or channels in anti-phase that cancel when averaged.
    """
    file = _existing(path, "an audio or video file")
    planar = av.AudioResampler(format="fltp")
    to_clock = av.AudioResampler(format="fltp", layout="mono", rate=SAMPLE_RATE)
    pieces: list[np.ndarray] = []
    of_channels = of_mono = 0.0  # energies
    try:
        with av.open(str(file)) as container:
            if not container.streams.audio:
                raise UserError(f"{path} has no audio stream; wanted a file with sound, e.g. a WAV of the speech")
            for decoded in container.decode(audio=0):
                for frame in planar.resample(decoded):
                    channels = frame.to_ndarray()
                    if not np.isfinite(channels).all():
                        raise UserError(
                            f"{path} has samples that are NaN or infinite ({frame.time or 0.0:.2f} s in); "
                            "wanted finite ones: export it again, best as 16-bit WAV"
                        )
                    mono = channels.mean(axis=0)
                    of_channels += float(np.square(channels, dtype=np.float64).mean(axis=0).sum())
                    of_mono += float(np.square(mono, dtype=np.float64).sum())
                    pieces += _resampled(to_clock, mono, frame.sample_rate)
    except av.error.FFmpegError as error:
        raise UserError(_unreadable(path, "audio", error)) from error
    if not pieces:
        raise UserError(f"{path} has an audio stream without samples; wanted some sound: record or export it again")
    pieces += [frame.to_ndarray()[0] for frame in to_clock.resample(None)]
    if of_mono < LEAST_DOWNMIX_ENERGY * of_channels:
        raise UserError(
            f"{path} has channels in anti-phase: averaging them keeps {of_mono / of_channels:.1%} of the sound, "
            f"wanted at least {LEAST_DOWNMIX_ENERGY:.0%}; flip the sign of one channel or give a single one"
        )
    return np.concatenate(pieces)


def read_video(path: str | Path) -> tuple[UInt8[np.ndarray, "f h w 3"], float]:
    """All frames of a short video, turned upright, and its mean frame rate in Hz; nothing is resampled in time."""
    file = _existing(path, "a video file")
    try:
        with av.open(str(file)) as container:
            if not _has_pictures(container):
                raise UserError(f"{path} has no video stream; wanted a file with pictures, e.g. an MP4")
            frame_rate = container.streams.video[0].average_rate
            frames = [_upright(frame) for frame in container.decode(video=0)]
    except av.error.FFmpegError as error:
        raise UserError(_unreadable(path, "video", error)) from error
    if not frames or not frame_rate:
        raise UserError(f"{path} has {len(frames)} frames at {frame_rate} Hz; wanted at least one and a frame rate")
    return np.stack(frames), float(frame_rate)


def _open_image(path: str | Path) -> tuple[Image.Image, list[str]]:
    """The first frame, upright, at 8 bits a channel."""
    file, notes = _existing(path, "an image"), []
    try:
        with Image.open(file) as image:
            frames = getattr(image, "n_frames", 1)  # formats of Pillow with a single frame have no such attribute
            if frames > 1:
                notes.append(f"first of {frames} frames")
            if image.getexif().get(0x0112, 1) != 1:
                notes.append("turned upright as its EXIF data says")
            image = ImageOps.exif_transpose(image)
    except Image.UnidentifiedImageError:
        return _first_frame(path, file), ["first frame of a video"]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(_unreadable(path, "image", error)) from error
    if image.mode.startswith("I;16"):  # 16-bit grey, which Pillow would clip at 255 instead of scaling
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise UserError(f"{path} has pixels of mode {image.mode}, with no known white; wanted 8 or 16 bits a channel")
    return image, notes


def _first_frame(path: str | Path, file: Path) -> Image.Image:
    try:
        with av.open(str(file)) as container:
            if _has_pictures(container):
                for frame in container.decode(video=0):
                    return Image.fromarray(_upright(frame))
    except av.error.FFmpegError as error:
        raise UserError(_unreadable(path, "image", error)) from error
    raise UserError(_unreadable(path, "image", "no picture in it"))


def _has_pictures(container: av.container.InputContainer) -> bool:
    return bool(container.streams.video) and container.streams.video[0].codec_context.name not in TEXT_CODECS


def _upright(frame: av.VideoFrame) -> np.ndarray:
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)  # both count counter-clockwise


def _resampled(resampler: av.AudioResampler, mono: np.ndarray, sample_rate: int) -> list[np.ndarray]:
    frame = av.AudioFrame.from_ndarray(mono[None], format="fltp", layout="mono")
    frame.sample_rate = sample_rate
    return [out.to_ndarray()[0] for out in resampler.resample(frame)]


def _existing(path: str | Path, wanted: str) -> Path:
    """The absolute path, which FFmpeg can't mistake for a URL; raises where there is no file that can be opened."""
    file = Path(path).absolute()
    if not file.exists():
        raise MissingFileError(f"no file {path}; wanted {wanted}: check the path (it is taken from {Path.cwd()})")
    if not file.is_file():
        raise UserError(f"{path} is {'a folder' if file.is_dir() else 'not a regular file'}; wanted {wanted}")
    try:
        file.open("rb").close()
    except OSError as error:
        raise UserError(f"{path} can't be opened ({error.strerror}), wanted {wanted}; mend its permissions") from error
    return file


def _unreadable(path: str | Path, kind: str, error: object) -> str:
    reason = getattr(error, "strerror", None) or str(error)
    size = Path(path).stat().st_size
    return f"{path} ({size} bytes) can't be read as {kind} ({reason}), wanted a whole one; export it again"
