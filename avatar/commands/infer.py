"""Offline inference: stream an audio file over a portrait through a session, and write the frames to an MP4 file."""

from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig
from rich.progress import Progress

from avatar.diffusion.plan import plan_of
from avatar.errors import UserError, require_int, require_str
from avatar.media.decode import read_audio, read_image
from avatar.media.frames import from_uint8, to_uint8
from avatar.media.mp4_writer import Mp4Writer
from avatar.models import bundle, hub
from avatar.process import choose_device, set_up_torch
from avatar.streaming.inputs import check_audio
from avatar.streaming.session import Session
from avatar.streaming.simulation import StreamStats, stream
from avatar.streaming.timed_controls import TimedControls
from avatar.types import FRAME_RATE, SAMPLE_RATE, SAMPLES_PER_FRAME


def infer(cfg: DictConfig) -> None:
    """Stream `cfg.audio` over `cfg.image`; each chunk is written when it is finished, and the file stays playable.

        python infer.py image=me.png audio=hello.wav emotion=happy out=me.mp4

    Args:
        cfg: config `infer`, whose comments describe each setting.

    Raises:
        UserError: invalid settings, unreadable files, bundles or encoders that don't fit together.
    """
    require_int(0, seed=cfg.seed)
    require_str(image=cfg.image, audio=cfg.audio, prompt=cfg.prompt)
    if cfg.other is not None:
        require_str(other=cfg.other)
    set_up_torch(cfg.threads)
    if cfg.size is None:
        raise UserError(
            "got an autoencoder of puppet states, which have no pixels; expected one of videos: leave out "
            "autoencoder=, or score the student with python -m avatar evaluate"
        )
    require_int(1, size=cfg.size)
    image, note = read_image(cfg.image, cfg.size)
    samples = torch.from_numpy(read_audio(cfg.audio))
    other = None if cfg.other is None else torch.from_numpy(read_audio(cfg.other))
    check_audio(samples, other)
    if note:
        print(f"image: {note}")
    out = Path(cfg.out or Path(cfg.folder) / "avatar.mp4")
    seconds = len(samples) / SAMPLE_RATE
    if cfg.controls is None:
        controls = TimedControls([], seconds, cfg.prompt, cfg.gesture)
    else:
        require_str(controls=cfg.controls)
        controls = TimedControls.read(cfg.controls, seconds, cfg.prompt, cfg.gesture)
    session = open_session(cfg, from_uint8(image[None])[None])
    controls.check_prompts(session.text)
    session.gesture(cfg.gesture, seconds)
    records = []
    with Mp4Writer(out, cfg.size) as writer, Progress() as progress:
        title = f"streaming {len(samples) / (FRAME_RATE * SAMPLES_PER_FRAME):.1f} s"
        bar = progress.add_task(title, total=len(samples))
        for emitted in stream(session, samples, other=other, control=controls.apply):
            records.append(emitted)
            writer.write(to_uint8(emitted.frames), emitted.samples.numpy())
            progress.advance(bar, len(emitted.samples))
    if controls.entries:
        print(f"controls: no chunk begins after the time of the last {len(controls.entries)}, which had no effect")
    stats = StreamStats.of(records)
    print(
        f"{stats.frames} frames, first after {1000 * stats.first_frame_s:.0f} ms, chunk p50 "
        f"{1000 * stats.chunk_p50_s:.0f} ms, real-time factor {stats.real_time_factor:.2f}: {out}"
    )


def open_session(cfg: DictConfig, reference: torch.Tensor) -> Session:
    """Load the config's networks and open a session.

    Args:
        cfg: a config of infer.py.
        reference: the portrait, `1 c 1 h w` in [-1, 1].
    """
    device = choose_device(cfg.device)
    autoencoder = hydra.utils.instantiate(cfg.autoencoder).eval().to(device)
    student = bundle.load(cfg.student, ("student", "causal_teacher")).to(device)
    bundle.check_latents(student, autoencoder)
    origin = bundle.origin_of(student)
    session = Session(
        student,
        autoencoder,
        hub.on(device, origin.build_encoder("audio", cfg.weights.audio)),
        hub.on(device, origin.build_encoder("text", cfg.weights.text)),
        plan_of(origin.plan, dict(cfg.plan or {})),
        reference,
        seed=cfg.seed,
        prompt=cfg.prompt,
        image=hub.on(device, origin.build_encoder("image", cfg.weights.image)),
    )
    session.set_state(cfg.state)
    session.set_emotion(cfg.emotion)
    return session
