"""Preprocessing of one source, from its file to a folder of samples and a status line.

    probe ─► reject ─► audio on the video's time axis ─► frames on the grid ─► shots ─► clips ─► scores ─► encodings

The file is decoded once, frame by frame, and clips are written meanwhile. The folder gets its final name at the end, so
that it is complete if it exists. Its content is a function of the file, the rules and the models alone.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from avatar.data.preprocess import copying, samples, scores, video_frames
from avatar.data.preprocess.audio import SourceAudio, level_db, read_source_audio, silent_audio
from avatar.data.preprocess.clips import ClipWriter, EncodedVideo, VideoClip
from avatar.data.preprocess.probe import Probe, probe
from avatar.data.preprocess.reasons import Rejected, repair
from avatar.data.preprocess.rules import Models, Rules
from avatar.data.preprocess.samples import Segment, dumps
from avatar.data.preprocess.shots import CutDetector
from avatar.data.preprocess.sources import Source, read_sidecar
from avatar.types import FRAME_RATE, SAMPLES_PER_FRAME


def stage(source: Source, staging: Path, rules: Rules, models: Models) -> dict[str, Any]:
    """Preprocess a source into `staging/KEY`, unless that exists for the same stamp, and return the status line.

    Raises:
        OSError: the folder can't be written.
    """
    final, stamp = staging / source.key, source.stamp()
    if (line := _read_line(final)) is not None and line["stamp"] == stamp:
        return line
    temporary = staging / f".{source.key}.{os.getpid()}.tmp"
    temporary.mkdir(parents=True)
    try:
        line = {
            "key": source.key,
            "source": source.name,
            "stamp": stamp,
            **SourceProcessor(source, temporary, rules, models).run(),
        }
        text = dumps(line)
        (temporary / "line.json").write_text(text, encoding="utf-8")
        if final.exists():
            shutil.rmtree(final)
        os.rename(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return json.loads(text)  # as a later run reads it


def _read_line(folder: Path) -> dict[str, Any] | None:
    """The status line of a staged source; None if it isn't staged."""
    path = folder / "line.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


class SourceProcessor:
    """Runs the stages of one source and collects the content of its status line."""

    def __init__(self, source: Source, folder: Path, rules: Rules, models: Models):
        self.source, self.folder, self.rules, self.models = source, folder, rules, models
        self.info: Probe | None = None
        self.audio = SourceAudio(np.zeros(0, np.float32), None)
        self.repairs: list[dict[str, str]] = []
        self.clips: list[dict[str, Any]] = []  # a status line each, accepted or rejected
        self._kept: list[tuple[VideoClip, Segment]] = []
        self._cut_points: copying.CutPoints | None = None

    def run(self) -> dict[str, Any]:
        """Process the source; if it is rejected, its folder is empty."""
        reason = detail = None
        try:
            self._process()
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
            "probe": self.info.to_dict() if self.info else None,
            "audio": {"offset_s": self.audio.offset_s, "clipped": self.audio.clipped, "sha256": self.audio.sha256},
            "clips": self.clips,
        }

    def _process(self) -> None:
        rules, path = self.rules, self.source.path
        sidecar = read_sidecar(path)
        info = self.info = probe(path)
        self.repairs += video_frames.timing_repairs(info)
        frames = round(info.seconds * FRAME_RATE)
        if frames < rules.shortest:
            raise Rejected("too_short", f"{info.seconds:.2f} s; expected at least {rules.shortest} frames")
        if rules.faces == "reject" and self.models.detectors.face is None:
            raise Rejected("no_face", "no face detector was given, and faces=reject")
        frames = self._read_audio(info, frames)
        segments = self._find_segments(info, frames, sidecar)
        self._write_clips(info, segments)
        for clip, segment in self._kept:
            self._write_sample(clip, segment)
        for file in self.folder.glob("*.first.png"):
            file.unlink()

    def _read_audio(self, info: Probe, frames: int) -> int:
        """Read and check the audio, and return the number of frames that have video and audio."""
        rules = self.rules
        if not info.audio and rules.no_audio == "reject":
            raise Rejected("no_audio", "no audio stream")
        path, seconds = self.source.path, frames / FRAME_RATE
        self.audio = read_source_audio(path, info.start_s) if info.audio else silent_audio(seconds)
        self.repairs += self.audio.repairs
        if info.audio and (level := level_db(self.audio.samples)) < rules.silent_db:
            raise Rejected("silent", f"{level:.1f} dB of full scale; expected at least {rules.silent_db}")
        if self.audio.clipped >= rules.clipped:
            raise Rejected(
                "clipped", f"{self.audio.clipped:.2%} of samples at full scale; expected < {rules.clipped:.2%}"
            )
        audio_frames = len(self.audio.samples) / SAMPLES_PER_FRAME
        if abs(audio_frames - frames) > rules.av_length_s * FRAME_RATE:
            raise Rejected(
                "av_length", f"video lasts {frames / FRAME_RATE:.2f} s, audio {audio_frames / FRAME_RATE:.2f} s"
            )
        if abs(audio_frames - frames) > 1:
            self.repairs.append(
                repair(
                    "av_length", f"audio ends {(audio_frames - frames) / FRAME_RATE:+.3f} s from the end of the video"
                )
            )
        if 0 < frames - audio_frames <= 1:  # at most one frame is missing: pad with silence to keep the frame
            missing = frames * SAMPLES_PER_FRAME - len(self.audio.samples)
            self.audio = replace(self.audio, samples=np.pad(self.audio.samples, (0, missing)))
        return min(frames, len(self.audio.samples) // SAMPLES_PER_FRAME)

    def _find_segments(self, info: Probe, frames: int, sidecar: dict[str, Any]) -> list[Segment]:
        """Segments of the valid spans, sorted by time; invalid spans are recorded as rejected."""
        segments: list[Segment] = []
        for span in sorted(self.source.spans, key=lambda span: span.start_s):
            start = max(round(span.start_s * FRAME_RATE), 0)
            end = frames if span.end_s is None else min(round(span.end_s * FRAME_RATE), frames)
            try:
                if segments and start < segments[-1].end:
                    raise Rejected("overlap", f"from {span.start_s:.2f} s, inside an earlier span")
                if end - start < self.rules.shortest:
                    raise Rejected("too_short", f"{max(end - start, 0)} frames from {span.start_s:.2f} s")
                conversion = video_frames.conversion_for(info, span.crop, self.rules.side, self.rules.multiple)
            except Rejected as rejected:
                self._record_rejection(start, max(end - start, 0), rejected)
                continue
            self.repairs += [found for found in conversion.repairs if found not in self.repairs]
            person, caption = span.person or sidecar["person_id"], span.caption or sidecar["caption"]
            segments.append(Segment(start, end, person, caption, {**sidecar["scores"], **span.scores}, conversion))
        return segments

    def _write_clips(self, info: Probe, segments: Sequence[Segment]) -> None:
        """Decode the file up to the end of the last segment and write the clips of its shots."""
        if not segments:
            return
        copies = self.rules.pictures == "copy" and any(not segment.conversion.filters for segment in segments)
        self._cut_points = copying.find_cut_points(self.source.path, info) if copies else None
        remaining, writer, shot = list(segments), None, -1
        segment, convert, is_cut = self._next_segment(remaining)
        next_start, max_frames = segment.start, 0  # start of the next clip, limit of the open clip
        for number, decoded in enumerate(video_frames.read_frames(self.source.path, info, segments[-1].end)):
            if number >= segment.end:
                writer = self._close_clip(writer, segment)
                segment, convert, is_cut = self._next_segment(remaining)
                next_start = segment.start
            if number < segment.start:
                continue
            frame = convert(decoded)
            stats = scores.frame_stats(frame)
            if is_cut(stats):
                writer, shot, next_start = self._close_clip(writer, segment), shot + 1, number
            if number == next_start:
                max_frames, next_start = self._clip_limits(segment, number)
                writer = self._open_clip(segment, number, shot, max_frames)
            if writer is not None:
                writer.push(frame, stats)
                if writer.pushed == max_frames:
                    writer = self._close_clip(writer, segment)
        self._close_clip(writer, segment)
        if copied := [clip for clip, _ in self._kept if clip.video_method == "copied"]:
            assert self._cut_points is not None
            copying.copy_clips(self.source.path, copied, self._cut_points)

    def _next_segment(self, remaining: list[Segment]) -> tuple[Segment, video_frames.FrameConverter, CutDetector]:
        """Remove the first segment from `remaining`, and return it with a new converter and cut detector."""
        segment = remaining.pop(0)
        return segment, video_frames.FrameConverter(segment.conversion), CutDetector(self.rules.cut)

    def _clip_limits(self, segment: Segment, start: int) -> tuple[int, int]:
        """The maximum length of a clip, and the start of the next one, if possible one that can be copied."""
        rules, last = self.rules, start + self.rules.longest
        if self._cut_points is None or segment.conversion.filters:
            return rules.longest, last
        first = start + rules.shortest + rules.temporal_stride
        following = self._cut_points.last_start_between(first, last + rules.temporal_stride) or last
        return min(rules.longest, following - start), following

    def _open_clip(self, segment: Segment, start: int, shot: int, max_frames: int) -> ClipWriter:
        rules, stem, lengths = self.rules, self.folder / f"{start:07d}", None
        if self._cut_points is not None and not segment.conversion.filters:
            lengths = self._cut_points.clip_lengths(start, max_frames, rules.temporal_stride)
        if lengths is None:
            video = stem.with_name(f"{stem.name}.video.mp4")
            output = EncodedVideo(video, rules.temporal_stride, rules.preset, rules.crf)
        else:
            output = copying.CopiedVideo(lengths)
        return ClipWriter(stem, start, shot, self.models.detectors, output)

    def _close_clip(self, writer: ClipWriter | None, segment: Segment) -> None:
        """Finish the open clip, if any, and keep or reject it."""
        if writer is None:
            return
        clip = writer.close()
        try:
            self._check_clip(clip)
        except Rejected as rejected:
            self._reject(clip, rejected)
        else:
            self._kept.append((clip, segment))

    def _check_clip(self, clip: VideoClip) -> None:
        rules, detections = self.rules, clip.detections
        if clip.frames < rules.shortest:
            raise Rejected("too_short", f"{clip.frames} frames of a shot; expected at least {rules.shortest}")
        if clip.longest_freeze >= rules.frozen_s * FRAME_RATE:
            seconds = clip.longest_freeze / FRAME_RATE
            raise Rejected("frozen", f"{seconds:.2f} s without change; expected < {rules.frozen_s}")
        if detections.faces is not None and rules.faces == "reject":
            if detections.max_faces > 1:
                raise Rejected("multi_face", f"{detections.max_faces} faces")
            if without := int(np.isnan(detections.faces).any(axis=1).sum()):
                raise Rejected("no_face", f"{without} of {clip.frames} frames without a face")

    def _write_sample(self, clip: VideoClip, segment: Segment) -> None:
        """Write a sample; its reference is the first frame of the most distant other clip of the same shot."""
        others = [other for other, _ in self._kept if other.shot == clip.shot and other is not clip]
        reference = max(others, key=lambda other: abs(other.start - clip.start), default=clip)
        source_info = {
            "source": self.source.name,
            "audio_offset_s": self.audio.offset_s if self.audio.sha256 else None,
            "repairs": sorted({found["code"] for found in self.repairs}),
        }
        try:
            self.clips.append(samples.write(clip, segment, reference, self.audio, source_info, self.models))
        except Rejected as rejected:
            self._reject(clip, rejected)

    def _reject(self, clip: VideoClip, rejected: Rejected) -> None:
        for file in self.folder.glob(f"{clip.stem.name}.*"):
            if file != clip.first_frame:  # it may be the reference of another clip
                file.unlink()
        self._record_rejection(clip.start, clip.frames, rejected)

    def _record_rejection(self, start: int, frames: int, rejected: Rejected) -> None:
        line = {"status": "rejected", "start_s": start / FRAME_RATE, "frames": frames}
        self.clips.append(line | {"reason": rejected.code, "detail": rejected.detail})
