"""Codes of rejections, which exclude a source or a clip, and of repairs, conversions that were applied to a source."""

REJECTS = {
    "empty": "the file has no bytes",
    "unreadable": "the file is missing, or may not be read",
    "corrupt": "the file can't be opened, or can't be decoded completely",
    "no_video": "the file has no video stream",
    "no_audio": "the file has no audio",
    "frame_count": "the header claims another length than the file has",
    "resolution": "the frame size changes within the stream",
    "nonfinite": "the audio has samples that are NaN or infinite",
    "antiphase": "the channels cancel each other when averaged",
    "silent": "the level of the complete audio is below the limit",
    "clipped": "too many samples are at full scale",
    "av_length": "video and audio end too far apart",
    "too_short": "too few frames in the source, or between two cuts",
    "too_small": "the frame has fewer pixels than the autoencoder's stride",
    "crop": "the annotated window exceeds the frame, which may have been cropped to it already",
    "frozen": "the video does not change for too long",
    "no_face": "no face, or no face detector",
    "multi_face": "more than one face",
    "bad_caption": "the sidecar or the caption is invalid",
    "overlap": "the annotated span overlaps an earlier one",
    "duplicate": "the audio is the same as that of an earlier source",
}

REPAIRS = {
    "vfr": "variable frame rate, resampled by time stamps",
    "frame_rate": "constant frame rate other than 25 Hz, resampled by time stamps",
    "rotated": "rotated by the display matrix, which is then removed",
    "interlaced": "deinterlaced",
    "aspect": "scaled to square pixels",
    "pixel_format": "converted to 8 bits, 4:2:0, limited range",
    "cropped": "cropped to the annotated window",
    "resized": "scaled down to the configured size",
    "odd_size": "cropped to a multiple of the autoencoder's stride",
    "start_offset": "audio that starts before or after the video, cut or preceded by silence",
    "audio_gap": "gaps between audio time stamps filled with silence",
    "audio_overlap": "repeated audio for the same time stamps dropped",
    "downmix": "channels averaged",
    "sample_rate": "audio resampled",
    "av_length": "the longer one of video and audio cut at the end of the other",
    "no_audio": "silence in place of missing audio, by rules.no_audio=keep",
}


class Rejected(Exception):
    """A source, or a part of one, that can't be used.

    Args:
        code: a key of REJECTS.
        detail: what was found, for the status line.
    """

    def __init__(self, code: str, detail: str):
        assert code in REJECTS, code
        super().__init__(f"{code}: {detail}")
        self.code, self.detail = code, detail

    def __reduce__(self):
        return Rejected, (self.code, self.detail)


def repair(code: str, detail: str) -> dict[str, str]:
    """A repair as it is stored in the status line of a source; `code` is a key of REPAIRS."""
    assert code in REPAIRS, code
    return {"code": code, "detail": detail}
