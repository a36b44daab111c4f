"""One source, from its file to a folder of samples and a line that says what became of it.

    probe ─► reject ─► sound on the picture's axis ─► pictures on the grid ─► shots ─► clips ─► scores ─► encodings

The file is decoded once, a frame at a time; a clip is written while it goes by. The folder gets its name when all is
done, so that it is either whole or not there, and it is a function of the file, the rules and the tools alone.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from avatar.data.preprocess import copying, picture, samples, scores
from avatar.data.preprocess.clips import ClipWriter, Encoded, VideoClip
from avatar.data.preprocess.probe import Probe, probe
from avatar.data.preprocess.reasons import Rejected, repair
from avatar.data.preprocess.rules import Models, Rules
from avatar.data.preprocess.samples import Part, dumps
from avatar.data.preprocess.shots import CutDetector
from avatar.data.preprocess.sound import Sound, level_db, read_sound, silence
from avatar.data.preprocess.sources import Source, read_sidecar
from avatar.types import FRAME_RATE, SAMPLES_PER_FRAME


def stage(source: Source, staging: Path, rules: Rules, tools: Models) -> dict[str, Any]:
    """The source's line, from its folder `staging/KEY`, which is made if it isn't there or if the source has changed.

    Raises:
        OSError: the folder can't be written.
    """
    final, stamp = staging / source.key, source.stamp()
    if (line := staged(final)) is not None and line["stamp"] == stamp:
        return line
    temporary = staging / f".{source.key}.{os.getpid()}.tmp"
    temporary.mkdir(parents=True)
    try:
        line = {
            "key": source.key,
            "source": source.name,
            "stamp": stamp,
            **SourceProcessor(source, temporary, rules, tools).run(),
        }
        text = dumps(line)
        (temporary / "line.json").write_text(text, encoding="utf-8")
        if final.exists():
            shutil.rmtree(final)
        os.rename(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return json.loads(text)  # as a later run will read it


def staged(folder: Path) -> dict[str, Any] | None:
    """The line of a source's folder, if that is there."""
    path = folder / "line.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


class SourceProcessor:
    """The stages of one source, and what they found so far."""

    def __init__(self, source: Source, folder: Path, rules: Rules, tools: Models):
        self.source, self.folder, self.rules, self.tools = source, folder, rules, tools
        self.found: Probe | None = None
        self.sound = Sound(np.zeros(0, np.float32), None)
        self.repairs: list[dict[str, str]] = []
        self.clips: list[dict[str, Any]] = []  # one line each, accepted or not
        self._kept: list[tuple[VideoClip, Part]] = []
        self._cuts: copying.Cuts | None = None

    def run(self) -> dict[str, Any]:
        reason = detail = None
        try:
            self._make()
            accepted = [clip for clip in self.clips if clip["status"] == "accepted"]
            if not accepted:
                codes = Counter(clip["reason"] for clip in self.clips)
                code = codes.most_common(1)[0][0]
                raise Rejected(code, f"no clip is left: {', '.join(f'{n} {name}' for name, n in codes.items())}")
        except Rejected as rejected:
            reason, detail = rejected.code, rejected.detail
            for file in self.folder.iterdir():
                file.unlink()
        return {
            "status": "rejected" if reason else "accepted",
            "reason": reason,
            "detail": detail,
            "repairs": self.repairs,
            "probe": self.found.line() if self.found else None,
            "audio": {"offset_s": self.sound.offset_s, "clipped": self.sound.clipped, "sha256": self.sound.sha256},
            "clips": self.clips,
        }

    def _make(self) -> None:
        rules, path = self.rules, self.source.path
        sidecar = read_sidecar(path)
        found = self.found = probe(path)
        self.repairs += picture.timing_repairs(found)
        frames = round(found.seconds * FRAME_RATE)
        if frames < rules.shortest:
            raise Rejected("too_short", f"{found.seconds:.2f} s, wanted {rules.shortest} frames")
        if rules.faces == "reject" and self.tools.detectors.face is None:
            raise Rejected("no_face", "no face detector was given, and faces=reject")
        frames = self._hear(found, frames)
        parts = self._parts(found, frames, sidecar)
        self._cut(found, parts)
        for clip, part in self._kept:
            self._finish(clip, part)
        for file in self.folder.glob("*.first.png"):
            file.unlink()

    def _hear(self, found: Probe, frames: int) -> int:
        """Reads and judges the sound; gives the frames that picture and sound have in common."""
        rules = self.rules
        if not found.audio and rules.no_audio == "reject":
            raise Rejected("no_audio", "no sound stream")
        self.sound = read_sound(self.source.path, found.start_s) if found.audio else silence(frames / FRAME_RATE)
        self.repairs += self.sound.repairs
        if found.audio and (level := level_db(self.sound.samples)) < rules.silent_db:
            raise Rejected("silent", f"{level:.1f} dB of full scale, wanted {rules.silent_db}")
        if self.sound.clipped >= rules.clipped:
            raise Rejected(
                "clipped", f"{self.sound.clipped:.2%} of samples at full scale, wanted < {rules.clipped:.2%}"
            )
        sound_frames = len(self.sound.samples) / SAMPLES_PER_FRAME
        if abs(sound_frames - frames) > rules.av_length_s * FRAME_RATE:
            raise Rejected(
                "av_length", f"picture lasts {frames / FRAME_RATE:.2f} s, sound {sound_frames / FRAME_RATE:.2f} s"
            )
        if abs(sound_frames - frames) > 1:
            self.repairs.append(
                repair("av_length", f"sound ends {(sound_frames - frames) / FRAME_RATE:+.3f} s from the picture")
            )
        if 0 < frames - sound_frames <= 1:  # less than a frame is missing: silence, rather than a frame less
            missing = frames * SAMPLES_PER_FRAME - len(self.sound.samples)
            padded = np.pad(self.sound.samples, (0, missing))
            self.sound = Sound(padded, self.sound.sha256, self.sound.offset_s, self.sound.clipped, self.sound.repairs)
        return min(frames, len(self.sound.samples) // SAMPLES_PER_FRAME)

    def _parts(self, found: Probe, frames: int, sidecar: dict[str, Any]) -> list[Part]:
        """The spans that can be used, in the order of time; the others get their lines."""
        parts: list[Part] = []
        for span in sorted(self.source.spans, key=lambda span: span.start_s):
            start = max(round(span.start_s * FRAME_RATE), 0)
            end = frames if span.end_s is None else min(round(span.end_s * FRAME_RATE), frames)
            try:
                if parts and start < parts[-1].end:
                    raise Rejected("overlap", f"from {span.start_s:.2f} s, inside an earlier span")
                if end - start < self.rules.shortest:
                    raise Rejected("too_short", f"{max(end - start, 0)} frames from {span.start_s:.2f} s")
                form = picture.form_of(found, span.crop, self.rules.side, self.rules.multiple)
            except Rejected as rejected:
                self._refuse(start, max(end - start, 0), rejected)
                continue
            self.repairs += [made for made in form.repairs if made not in self.repairs]
            person, caption = span.person or sidecar["person_id"], span.caption or sidecar["caption"]
            parts.append(Part(start, end, person, caption, {**sidecar["scores"], **span.scores}, form))
        return parts

    def _cut(self, found: Probe, parts: Sequence[Part]) -> None:
        """Decodes the file up to the last part's end and makes the clips of its shots."""
        if not parts:
            return
        unchanged = self.rules.pictures == "copy" and any(not part.form.filters for part in parts)
        self._cuts = copying.cuts(self.source.path, found) if unchanged else None
        left, clip, shot = list(parts), None, -1
        part, former, cut = self._begun(left)
        begin, most = part.start, 0  # where the next clip starts; how long the one that is open may get
        for number, shown in enumerate(picture.pictures(self.source.path, found, parts[-1].end)):
            if number >= part.end:
                clip = self._close(clip, part)
                part, former, cut = self._begun(left)
                begin = part.start
            if number < part.start:
                continue
            formed = former(shown)
            look = scores.look(formed)
            if cut(look):
                clip, shot, begin = self._close(clip, part), shot + 1, number
            if number == begin:
                most, begin = self._reach(part, number)
                clip = self._writer(part, number, shot, most)
            if clip is not None:
                clip.take(formed, look)
                if clip.taken == most:
                    clip = self._close(clip, part)
        self._close(clip, part)
        if copied := [clip for clip, _ in self._kept if clip.pictures == "copied"]:
            assert self._cuts is not None
            copying.copy(self.source.path, copied, self._cuts)

    def _begun(self, left: list[Part]) -> tuple[Part, picture.FrameTransform, CutDetector]:
        """The next part, and what goes through its pictures."""
        part = left.pop(0)
        return part, picture.FrameTransform(part.form), CutDetector(self.rules.cut)

    def _reach(self, part: Part, start: int) -> tuple[int, int]:
        """The most frames of a clip that starts there, and where the next one of its shot does: if possible with a
        frame from which on pictures can be copied."""
        rules, last = self.rules, start + self.rules.longest
        if self._cuts is None or part.form.filters:
            return rules.longest, last
        first = start + rules.shortest + rules.temporal_stride
        after = self._cuts.start_between(first, last + rules.temporal_stride) or last
        return min(rules.longest, after - start), after

    def _writer(self, part: Part, start: int, shot: int, most: int) -> ClipWriter:
        rules, stem, lengths = self.rules, self.folder / f"{start:07d}", None
        if self._cuts is not None and not part.form.filters:
            lengths = self._cuts.lengths(start, most, rules.temporal_stride)
        if lengths is None:
            video = stem.with_name(f"{stem.name}.video.mp4")
            pictures = Encoded(video, rules.temporal_stride, rules.preset, rules.crf)
        else:
            pictures = copying.Copied(lengths)
        return ClipWriter(stem, start, shot, self.tools.detectors, pictures)

    def _close(self, writer: ClipWriter | None, part: Part) -> None:
        """Finishes a clip that is open, and judges it."""
        if writer is None:
            return
        clip = writer.close()
        try:
            self._judge(clip)
        except Rejected as rejected:
            self._reject(clip, rejected)
        else:
            self._kept.append((clip, part))

    def _judge(self, clip: VideoClip) -> None:
        rules = self.rules
        if clip.frames < rules.shortest:
            raise Rejected("too_short", f"{clip.frames} frames of a shot, wanted {rules.shortest}")
        if clip.still >= rules.frozen_s * FRAME_RATE:
            raise Rejected("frozen", f"{clip.still / FRAME_RATE:.2f} s without change, wanted < {rules.frozen_s}")
        if clip.seen.faces is not None and rules.faces == "reject":
            if clip.seen.most_faces > 1:
                raise Rejected("multi_face", f"{clip.seen.most_faces} faces")
            if without := int(np.isnan(clip.seen.faces).any(axis=1).sum()):
                raise Rejected("no_face", f"{without} of {clip.frames} frames without a face")

    def _finish(self, clip: VideoClip, part: Part) -> None:
        """All files of a sample; its reference is the first picture of the farthest other clip of the same shot."""
        others = [other for other, _ in self._kept if other.shot == clip.shot and other is not clip]
        reference = max(others, key=lambda other: abs(other.start - clip.start), default=clip)
        origin = {
            "source": self.source.name,
            "audio_offset_s": self.sound.offset_s if self.sound.sha256 else None,
            "repairs": sorted({made["code"] for made in self.repairs}),
        }
        try:
            self.clips.append(samples.write(clip, part, reference, self.sound, origin, self.tools))
        except Rejected as rejected:
            self._reject(clip, rejected)

    def _reject(self, clip: VideoClip, rejected: Rejected) -> None:
        for file in self.folder.glob(f"{clip.stem.name}.*"):
            if file != clip.first:  # which may be another's reference
                file.unlink()
        self._refuse(clip.start, clip.frames, rejected)

    def _refuse(self, start: int, frames: int, rejected: Rejected) -> None:
        line = {"status": "rejected", "start_s": start / FRAME_RATE, "frames": frames}
        self.clips.append(line | {"reason": rejected.code, "detail": rejected.detail})
