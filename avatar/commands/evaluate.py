"""Evaluation of a bundle on held-out puppets: `python -m avatar evaluate student=BUNDLE split=dev seed=1`.

Every system generates the same clips, from the same references and audio, and the same state estimation reads them. The
models are scored together with controls, which show what a score is worth: the ground truth, the ground truth through
the autoencoder, the frozen reference, and the student with another clip's audio. The reference distribution of motion
comes from other clips of the split. Control by labels and prompts is measured in counterfactual pairs (`obedience`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from rich.progress import track

from avatar.commands import control_page
from avatar.commands.control_pairs import other_emotion
from avatar.commands.held_out import HeldOutClips
from avatar.commands.obedience import obedience
from avatar.commands.response import response_times
from avatar.data.clip_encoding import ClipSet
from avatar.diffusion.generation import RolloutSampler
from avatar.diffusion.plan import Plan, plan_of
from avatar.errors import ExistingFileError, require_int
from avatar.files import create_folder
from avatar.media.frames import to_uint8
from avatar.metrics import control, drift, report
from avatar.metrics.scores import score
from avatar.metrics.state_estimation import EstimatedClip
from avatar.models import bundle, hub
from avatar.models.video_dit import VideoDiT
from avatar.process import choose_device, set_up_torch
from avatar.puppet import captions
from avatar.puppet.clip import Acting
from avatar.puppet.worlds import PixelWorld
from avatar.streaming.session import Session
from avatar.streaming.simulation import Emitted, StreamStats, stream
from avatar.training import checks
from avatar.types import EMOTIONS, FRAME_RATE, GESTURES, STATES, Conditioning, Pixels

SHOWN = 3  # clips on the contact sheet


def evaluate(cfg: DictConfig) -> None:
    """Generate, estimate and score all systems; write report.json, report.md and plots into the folder.

        python -m avatar evaluate student=outputs/RUN/student.safetensors teacher=null split=dev clips=8

    Args:
        cfg: config `evaluate`, whose comments describe each setting.

    Raises:
        UserError: invalid settings, bundles that don't fit together, or a folder with a report.
    """
    require_int(2, clips=cfg.clips)  # with one clip, shuffled audio would be its own
    require_int(1, latents=cfg.latents, streams=cfg.streams, stream_frames=cfg.stream_frames)
    require_int(0, seed=cfg.seed, reference_motion=cfg.reference_motion, control=cfg.control, responses=cfg.responses)
    set_up_torch(cfg.threads)
    device = choose_device(cfg.device)
    folder = Path(cfg.folder)
    if (folder / "report.json").exists():
        raise ExistingFileError(f"{folder} contains a report, which is not overwritten; give another folder=")
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
    bidirectional = hydra.utils.instantiate(cfg.teacher_sampler)
    streams = origin.kind != "teacher"  # which is bidirectional
    plan = plan_of(origin.plan, dict(cfg.plan or {}))
    sampler = RolloutSampler(plan) if streams else bidirectional
    stages = dict(cfg.stages or {})

    with timed(stages, "evaluate"):
        scene = hydra.utils.instantiate(cfg.scene)
        clips = ClipSet(cfg.split, cfg.schedule, cfg.clips, cfg.latents, scene=scene)
        held_out = HeldOutClips(world, autoencoder, **encoders, clips=clips, cache=Path(cfg.cache), workers=cfg.workers)
        cond = held_out.batch.conditioning
        videos = {
            "ground_truth": held_out.ground_truth(),
            "autoencoder": held_out.through_autoencoder(),
            "frozen": held_out.frozen(),
            "student": held_out.generate(student, sampler, cond, cfg.seed, "student"),
            "shuffled_audio": held_out.generate(
                student, sampler, held_out.shuffled(), cfg.seed, "student, shuffled audio"
            ),
        }
        if teacher is not None:
            videos["teacher"] = held_out.generate(
                teacher, bidirectional, cond, cfg.seed, f"teacher, {bidirectional.steps} steps"
            )
        readings = {name: held_out.read(video, name) for name, video in videos.items()}
        reference = held_out.reference_motion(cfg.reference_motion, first=cfg.clips + cfg.streams)
        scores = {name: score(read, reference) for name, read in readings.items()}

    control_scores = None
    if cfg.control and cfg.latents * held_out.stride >= control.MIN_FRAMES:

        def generate(cond: Conditioning, numbers: Sequence[int], title: str) -> list[torch.Tensor]:
            return held_out.generate(student, sampler, cond, cfg.seed, f"student, {title}", numbers)

        with timed(stages, "control"):
            control_scores, pairs = obedience(held_out, cfg.control, generate)
        control_page.save(folder / "control.html", control_scores, pairs, world.to_images)

    long, stats, responses = {}, None, None
    if streams:
        with timed(stages, "stream"):
            made = [stream_clip(held_out, student, plan, cfg, number) for number in range(cfg.streams)]
        stats = asdict(StreamStats.of(made[0].emitted))
        long = {"student": [stream.student for stream in made], "ground truth": [stream.truth for stream in made]}
        if cfg.responses:

            def session_of(number: int, portrait: Pixels) -> Session:
                return open_session(held_out, student, plan, portrait, cfg.seed + number, "")

            with timed(stages, "response"):
                responses = response_times(held_out, min(cfg.responses, cfg.clips), session_of)
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
        responses,
    )
    result["commands"] = {"evaluate": OmegaConf.to_container(cfg, resolve=True)}
    shown = [name for name in ("ground_truth", "teacher", "student") if name in videos]
    titles = [clip.caption for clip in held_out.truth[:SHOWN]]
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


def open_session(
    held_out: HeldOutClips, student: VideoDiT, plan: Plan, portrait: Pixels, seed: int, prompt: str
) -> Session:
    """A session of the student with the encoders of the held-out clips."""
    parts = (held_out.autoencoder, held_out.audio, held_out.text)
    return Session(student, *parts, plan, portrait, seed=seed, prompt=prompt, image=held_out.image)


@dataclass(frozen=True)
class LongStream:
    """One long stream: what the session emitted, and the states estimated from it and from its ground truth."""

    emitted: list[Emitted]
    student: EstimatedClip
    truth: EstimatedClip


def stream_clip(held_out: HeldOutClips, student: VideoDiT, plan: Plan, cfg: DictConfig, number: int) -> LongStream:
    """Stream a calm portrait, of clip `number` after those that are scored, with the label of another emotion."""
    split = ClipSet(cfg.split, "speaking", cfg.streams, 1, first=cfg.clips)
    own = split.make(number, cfg.stream_frames, held_out.cache / "speech")
    other = other_emotion(EMOTIONS[own.emotion[0]], number)
    clip = split.make(number, cfg.stream_frames, held_out.cache / "speech", Acting(other, 1.0))
    portrait = held_out.world.video(own, 0, 1)[None]
    prompt = captions.caption(own.identity, 0, [STATES.index("speaking")], 0)  # without the emotion
    title = f"stream {number + 1} of {cfg.streams}, {cfg.stream_frames} frames"
    blocks = range(0, cfg.stream_frames, 100)
    drawn = [held_out.world.video(clip, i, i + 100) for i in track(blocks, f"{title}: drawing")]
    truth = torch.cat(drawn, dim=1)
    session = open_session(held_out, student, plan, portrait, cfg.seed + number, prompt)
    session.set_state("speaking")
    session.set_emotion(other, 1.0)
    session.gesture(GESTURES[clip.gesture[0]], cfg.stream_frames / FRAME_RATE)
    total = cfg.stream_frames // (plan.chunk * held_out.stride)
    speech = torch.from_numpy(clip.own)
    emitted = list(track(stream(session, speech), title, total))
    video = torch.cat([chunk.frames for chunk in emitted], dim=1)
    read = {
        name: held_out.reader.read(clip, frames, progress=lambda parts, name=name: track(parts, f"reading {name}"))
        for name, frames in {"student": video, "truth": truth}.items()
    }
    return LongStream(emitted, **read)


@contextmanager
def timed(stages: dict[str, float], name: str) -> Iterator[None]:
    """Record the seconds of a block under the name of its stage."""
    start = perf_counter()
    yield
    stages[name] = perf_counter() - start
