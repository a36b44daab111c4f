"""Score a bundle on held-out puppets: `python -m avatar evaluate student=BUNDLE split=dev seed=1`.

Every system makes the same clips, from the same references and sound, and is read by the same reader; beside the models
stand the controls that say what their figures are worth: the ground truth, the ground truth through the autoencoder,
the frozen reference, and the student with another clip's sound. How puppets move in general, other clips tell. What the
student's labels do is seen in pairs that differ in the label alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from rich.progress import track
from torch import Tensor

from avatar.conditioning import image_to_video
from avatar.data.encoded_clips import ClipSet, encode_clips, frames_beyond
from avatar.diffusion.generation import ChunkByChunk, Generator
from avatar.diffusion.rollout import Plan, plan_of
from avatar.errors import ExistingFileError, require_int
from avatar.files import create_folder
from avatar.media.frames import to_uint8
from avatar.metrics import control, drift, report
from avatar.metrics.distribution import Trajectory
from avatar.metrics.scores import score
from avatar.metrics.state_estimation import EstimatedClip, PixelReader, StateReader, VideoReader
from avatar.models import bundle, hub
from avatar.models.video_dit import VideoDiT
from avatar.process import choose_device, set_up_torch
from avatar.protocols import AudioEncoder, ImageEncoder, TextEncoder, VideoAutoencoder
from avatar.puppet.worlds import PixelWorld, World
from avatar.streaming.session import Session
from avatar.streaming.simulation import Emitted, StreamStats, stream
from avatar.training import checks
from avatar.types import EMOTIONS, FRAME_RATE, GESTURES, Batch, Conditioning, Latents

SHOWN = 3  # clips on the contact sheet
GESTURE_S = 1.6  # how long a gesture is asked for


class Evaluation:
    """Held-out clips, and what each system makes of them."""

    def __init__(
        self,
        world: World,
        autoencoder: VideoAutoencoder,
        audio: AudioEncoder,
        text: TextEncoder,
        image: ImageEncoder | None,
        clips: ClipSet,
        cache: Path,
        workers: int,
    ):
        self.world, self.autoencoder, self.audio, self.text, self.image = world, autoencoder, audio, text, image
        self.clips, self.cache = clips, cache
        self.stride = autoencoder.temporal_stride
        encoded = encode_clips(
            clips,
            world,
            autoencoder,
            self.audio,
            self.text,
            cache,
            workers,
            lambda loader: track(loader, f"encoding {clips.count} {clips.split} clips"),
        )
        every = torch.arange(clips.count)
        self.batch: Batch = encoded.batch(every, torch.zeros_like(every), clips.latents, self.audio, self.text)
        frames = 1 + self.stride * clips.latents
        # Made as the encoder made them, with the audio's right context, for a clip's length is part of its seed.
        extra = frames_beyond(self.audio, frames - 1)
        self.truth = [
            clips.make(i, frames + extra, cache / "speech")
            for i in track(range(clips.count), f"drawing {clips.count} {clips.split} clips")
        ]
        self.reader: VideoReader = PixelReader(world.size) if isinstance(world, PixelWorld) else StateReader()

    def others(self, count: int, first: int) -> list[Trajectory]:
        """The true states of other clips of the split, of the same kind and length."""
        clips, frames = replace(self.clips, count=count, first=first), 1 + self.stride * self.clips.latents
        numbers = track(range(count), f"drawing {count} other clips' motion")
        return [clips.make(i, frames, self.cache / "speech").states[1:] for i in numbers]

    def ground_truth(self) -> list[Tensor]:
        frames = 1 + self.stride * self.clips.latents
        return [self.world.video(clip, 1, frames) for clip in self.truth]

    def frozen(self) -> list[Tensor]:
        frames = self.stride * self.clips.latents
        return [self._decoded(i, None).expand(-1, frames, -1, -1) for i in range(self.clips.count)]

    def through_autoencoder(self) -> list[Tensor]:
        return [self._decoded(i, self.batch.latents[i : i + 1]) for i in range(self.clips.count)]

    def generated(self, net: VideoDiT, generator: Generator, cond: Conditioning, seed: int, title: str) -> list[Tensor]:
        """As many clips as there is conditioning for, as a generator makes them, a few at a time."""
        device = next(net.parameters()).device
        made = []
        for part in track(torch.arange(len(cond.state)).split(8), title):
            picked = image_to_video.with_image_conditioning(
                cond.map(lambda x, part=part: x[part].to(device)), self.autoencoder, self.image
            )
            made.append(generator(net, picked, tuple(seed * 100_003 + int(i) for i in part)).cpu())
        latents = torch.cat(made)
        return [self._decoded(i, latents[i : i + 1]) for i in range(len(latents))]

    def shuffled(self) -> Conditioning:
        """The conditioning, but for the sound, which is the next clip's."""
        cond = self.batch.conditioning
        return replace(cond, audio=cond.audio.roll(1, 0), audio_mask=cond.audio_mask.roll(1, 0))

    def read(self, videos: list[Tensor], title: str) -> list[EstimatedClip]:
        pairs = list(zip(self.truth[: len(videos)], videos, strict=True))
        return [self.reader.read(clip, video, start=1) for clip, video in track(pairs, f"reading {title}")]

    @torch.no_grad()
    def _decoded(self, index: int, latents: Latents | None) -> Tensor:
        """A clip decoded as a stream decodes it, behind its reference; without latents, the reference itself."""
        device = next((p.device for p in self.autoencoder.parameters()), torch.device("cpu"))
        decoder = self.autoencoder.decoder_stream()
        reference = decoder.push(self.batch.conditioning.reference[index : index + 1].to(device))
        return (reference if latents is None else decoder.push(latents.to(device)))[0].cpu()


def evaluate(cfg: DictConfig) -> None:
    """Make, read and score all systems; write report.json, report.md and pictures into the folder."""
    require_int(2, clips=cfg.clips)  # or else shuffled audio would be a clip's own
    require_int(1, latents=cfg.latents, streams=cfg.streams, stream_frames=cfg.stream_frames)
    require_int(0, seed=cfg.seed, others=cfg.others, control=cfg.control)
    set_up_torch(cfg.threads)
    device = choose_device(cfg.device)
    folder = Path(cfg.folder)
    if (folder / "report.json").exists():
        raise ExistingFileError(f"{folder} holds a report already, which is not overwritten; give another folder=")
    create_folder(folder)
    autoencoder = hydra.utils.instantiate(cfg.autoencoder).eval().to(device)
    student = bundle.load(cfg.student, ("student", "causal_teacher", "teacher")).to(device)
    teacher = None if cfg.teacher is None else bundle.load(cfg.teacher, ("teacher",)).to(device)
    origin = bundle.origin_of(student)
    encoders = {part: hub.on(device, origin.build_encoder(part, cfg.weights[part])) for part in bundle.ENCODERS}
    world = hydra.utils.instantiate(cfg.puppet)
    checks.check_puppet(world, autoencoder)
    height, width = (side // autoencoder.spatial_stride for side in world.shape)
    for net in filter(None, (student, teacher)):
        bundle.check_latents(net, autoencoder)
        bundle.check_encoders(net, origin.config, encoders)
        checks.check_inputs(net, autoencoder, **encoders, sizes=[(height, width)])
    whole = hydra.utils.instantiate(cfg.teacher_sampler)
    streams = origin.kind != "teacher"  # which sees all of a clip at once
    plan = plan_of(origin.plan, dict(cfg.plan or {}))
    generator = ChunkByChunk(plan) if streams else whole
    stages = dict(cfg.stages or {})

    with timed(stages, "evaluate"):
        scene = hydra.utils.instantiate(cfg.scene)
        clips = ClipSet(cfg.split, cfg.schedule, cfg.clips, cfg.latents, scene=scene)
        evaluation = Evaluation(world, autoencoder, **encoders, clips=clips, cache=Path(cfg.cache), workers=cfg.workers)
        cond = evaluation.batch.conditioning
        videos = {
            "ground_truth": evaluation.ground_truth(),
            "autoencoder": evaluation.through_autoencoder(),
            "frozen": evaluation.frozen(),
            "student": evaluation.generated(student, generator, cond, cfg.seed, "student"),
            "shuffled_audio": evaluation.generated(
                student, generator, evaluation.shuffled(), cfg.seed, "student, shuffled audio"
            ),
        }
        if teacher is not None:
            videos["teacher"] = evaluation.generated(teacher, whole, cond, cfg.seed, f"teacher, {whole.steps} steps")
        readings = {name: evaluation.read(video, name) for name, video in videos.items()}
        others = evaluation.others(cfg.others, first=cfg.clips + cfg.streams)
        scores = {name: score(read, others) for name, read in readings.items()}

    control_scores = None
    if cfg.control and cfg.latents * evaluation.stride >= control.LEAST:
        with timed(stages, "control"):
            control_scores = counterfactuals(evaluation, student, generator, min(cfg.control, cfg.clips), cfg.seed)
        for attribute, found in control_scores.items():
            found["ground_truth"] = scores["ground_truth"][f"{attribute}_accuracy"]

    long, stats = {}, None
    if streams:
        with timed(stages, "stream"):
            made = [streamed(evaluation, student, plan, cfg, number) for number in range(cfg.streams)]
        stats = asdict(StreamStats.of(made[0].emitted))
        long = {"student": [stream.student for stream in made], "ground truth": [stream.truth for stream in made]}
        scores["student"]["drift"] = drift.drift(long["student"])
        scores["ground_truth"]["drift"] = drift.drift(long["ground truth"])
    result = report.assemble(
        {name: scores[name] for name in report.CONTROLS},
        scores.get("teacher"),
        scores["student"],
        stats,
        stages,
        cfg.seed,
        control_scores,
    )
    result["commands"] = {"evaluate": OmegaConf.to_container(cfg, resolve=True)}
    shown = [name for name in ("ground_truth", "teacher", "student") if name in videos]
    titles = [clip.caption for clip in evaluation.truth[:SHOWN]]
    report.save_tracks(folder / "tracks.png", {n: readings[n][:SHOWN] for n in shown[1:]}, titles)
    pictures = ["tracks.png"]
    if long:
        report.save_drift(folder / "drift.png", long)
        pictures.append("drift.png")
    if isinstance(world, PixelWorld):
        rows = {name.replace("_", " "): [to_uint8(v) for v in videos[name][:SHOWN]] for name in shown}
        report.save_contact_sheet(folder / "contact_sheet.png", rows, titles)
        pictures.insert(0, "contact_sheet.png")
    report.write(folder, result, pictures)
    print((folder / "report.md").read_text())


def counterfactuals(
    evaluation: Evaluation, net: VideoDiT, generator: Generator, count: int, seed: int
) -> dict[str, Any]:
    """What labels do in the first clips: another emotion throughout, or a gesture in the middle where there is none.

    Reference, sound and noise stay, and there is no text, which might say otherwise.
    """
    flags = {name: torch.full((count,), name == "text") for name in ("audio", "text", "labels")}
    cond = evaluation.batch.conditioning.map(lambda x: x[:count]).without(**flags)
    cond = replace(cond, gesture=torch.full_like(cond.gesture, GESTURES.index("none")))
    numbers = torch.arange(count)

    def build_encoder(cond: Conditioning, what: str) -> list[EstimatedClip]:
        return evaluation.read(evaluation.generated(net, generator, cond, seed, f"student, {what}"), what)

    plain = build_encoder(cond, "labels alone")
    moods = len(EMOTIONS) - 1
    emotion = 1 + (cond.emotion[:, 0] + numbers % (moods - 1)) % moods  # any but the clip's own
    moody = build_encoder(replace(cond, emotion=emotion[:, None].expand_as(cond.emotion)), "other emotions")
    seen = [control.visible(clip.states) for clip in plain]
    gesture = torch.tensor([GESTURES.index(names[i % len(names)]) for i, names in enumerate(seen)])
    length = min(cond.latents, -int(-GESTURE_S * FRAME_RATE // evaluation.stride))
    start = (cond.latents - length) // 2
    gestures = cond.gesture.clone()
    gestures[:, start : start + length] = gesture[:, None]
    moved = build_encoder(replace(cond, gesture=gestures), "gestures")
    part = slice(start * evaluation.stride, (start + length) * evaluation.stride)
    return {
        "emotion": control.counterfactual(
            [(a.trajectory, b.trajectory) for a, b in zip(plain, moody, strict=True)],
            [EMOTIONS[i] for i in emotion],
            "emotion",
        ),
        "gesture": control.counterfactual(
            [(a.trajectory[part], b.trajectory[part]) for a, b in zip(plain, moved, strict=True)],
            [GESTURES[i] for i in gesture],
            "gesture",
        ),
    }


@dataclass(frozen=True)
class LongStream:
    """One long live stream: what left the session, and what is read of it and of its ground truth."""

    emitted: list[Emitted]
    student: EstimatedClip
    truth: EstimatedClip


def streamed(evaluation: Evaluation, student: VideoDiT, plan: Plan, cfg: DictConfig, number: int) -> LongStream:
    """The stream of the clip `number` beyond those that are scored: a calm portrait, whatever their scene."""
    split = ClipSet(cfg.split, "speaking", cfg.streams, 1, first=cfg.clips)
    clip = split.make(number, cfg.stream_frames, evaluation.cache / "speech")
    title = f"stream {number + 1} of {cfg.streams}, {cfg.stream_frames} frames"
    blocks = range(0, cfg.stream_frames, 100)
    drawn = [evaluation.world.video(clip, i, i + 100) for i in track(blocks, f"{title}: drawing")]
    truth = torch.cat(drawn, dim=1)
    session = Session(
        student,
        evaluation.autoencoder,
        evaluation.audio,
        evaluation.text,
        plan,
        truth[None, :, :1],
        seed=cfg.seed + number,
        prompt=clip.caption,
        image=evaluation.image,
    )
    session.set_state("speaking")
    session.set_emotion(EMOTIONS[clip.emotion[0]], float(clip.intensity[0]))
    session.gesture(GESTURES[clip.gesture[0]], cfg.stream_frames / FRAME_RATE)
    total = cfg.stream_frames // (plan.chunk * evaluation.stride)
    speech = torch.from_numpy(clip.own)
    emitted = list(track(stream(session, speech), title, total))
    video = torch.cat([chunk.frames for chunk in emitted], dim=1)
    read = {
        name: evaluation.reader.read(clip, frames, progress=lambda parts, name=name: track(parts, f"reading {name}"))
        for name, frames in {"student": video, "truth": truth}.items()
    }
    return LongStream(emitted, **read)


@contextmanager
def timed(stages: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds that a block takes to the stages."""
    start = perf_counter()
    yield
    stages[name] = perf_counter() - start
