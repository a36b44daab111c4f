"""Why a source, or a part of one, can't be used, and what was mended on the way: one code for each."""

REJECTS = {
    "empty": "the file has no bytes",
    "unreadable": "the file is gone, or may not be read",
    "corrupt": "it can't be opened or decoded to its end",
    "no_video": "there is no picture stream in it",
    "no_audio": "there is no sound in it",
    "frame_count": "it claims another length than it holds",
    "resolution": "the size of the picture changes on the way",
    "nonfinite": "the sound has samples that are NaN or infinite",
    "antiphase": "the channels cancel each other when averaged",
    "silent": "the sound is below the limit as a whole",
    "clipped": "too many samples are at full scale",
    "av_length": "picture and sound end too far from each other",
    "too_short": "too few frames, of the source or between two cuts",
    "too_small": "the picture has fewer pixels than the autoencoder's stride",
    "crop": "the annotated window reaches out of the picture, which may have been cropped to it already",
    "frozen": "the picture stands still for too long",
    "no_face": "no face, or no detector to find one",
    "multi_face": "more than one face",
    "bad_caption": "its sidecar or caption can't be used",
    "overlap": "the annotated span lies partly in an earlier one",
    "duplicate": "the same sound as an earlier source's",
}

REPAIRS = {
    "vfr": "variable frame rate, resampled by time stamps",
    "frame_rate": "constant frame rate other than the clock's, resampled by time stamps",
    "rotated": "turned upright as the display matrix says, which is then gone",
    "interlaced": "deinterlaced",
    "aspect": "pixels made square",
    "pixel_format": "converted to 8 bits, 4:2:0, limited range",
    "cropped": "cropped as the annotation says",
    "resized": "scaled down to the wanted size",
    "odd_size": "cropped to a multiple of the autoencoder's stride",
    "start_offset": "sound that starts before or after the picture, cut or preceded by silence",
    "audio_gap": "silence put where sound is missing between time stamps",
    "audio_overlap": "sound that came twice for the same time stamps taken once",
    "downmix": "channels averaged",
    "sample_rate": "sound resampled",
    "av_length": "the longer one of picture and sound cut at the other's end",
    "no_audio": "silence put where there is no sound, as asked",
}


class Rejected(Exception):
    """A source or a part of one that can't be used, with a code of REJECTS and what was found."""

    def __init__(self, code: str, detail: str):
        assert code in REJECTS, code
        super().__init__(f"{code}: {detail}")
        self.code, self.detail = code, detail

    def __reduce__(self):
        return Rejected, (self.code, self.detail)


def repair(code: str, detail: str) -> dict[str, str]:
    """What was mended, as it stands in a source's line."""
    assert code in REPAIRS, code
    return {"code": code, "detail": detail}
