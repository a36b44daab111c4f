"""Simulated real-time playback: feeds a recording in packets and measures latency, stalls and real-time factor.

Nothing waits. The simulated clock starts with the first sample spoken, a packet arrives when its last sample has been
spoken, and computation takes as long as it was measured to take. The computer does one thing at a time:

    begin = max(arrival of the packet, computer is free),    ready_at = begin + seconds,    free = ready_at

so a computer that is too slow falls behind, as it would live. The session is opened before the first sample; the time
to encode its reference is not counted.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from avatar.errors import UserError
from avatar.streaming.session import Session
from avatar.types import FRAME_RATE, SAMPLE_RATE, SAMPLES_PER_FRAME


@dataclass(frozen=True)
class Emitted:
    """One emitted chunk."""

    frames: Float[Tensor, "c f h w"]  # on the CPU
    samples: Float[Tensor, " s"]  # the audio of these frames, 640 each; silence after its end
    seconds: float  # of computation since the previous chunk
    ready_at: float  # seconds after the first sample was spoken
    evaluations: int  # forward passes of the network


def stream(
    session: Session,
    speech: Float[Tensor, " s"],
    packet: int = SAMPLES_PER_FRAME,
    other: Float[Tensor, " s"] | None = None,
    control: Callable[[Session], None] = lambda session: None,
) -> Iterator[Emitted]:
    """Feed a recording to a fresh session in packets, and yield its chunks as they are generated.

    Args:
        session: a new one.
        speech: the recording, at 16 kHz in [-1, 1].
        packet: samples per packet.
        other: the voice of the other person, as long as `speech`.
        control: sets prompts and labels of the next chunk; its time counts.

    Raises:
        UserError: an empty recording, packets without samples, or a session with audio.
    """
    if packet < 1:
        raise UserError(f"packets of {packet} samples; give at least 1")
    if not len(speech):
        raise UserError("speech of 0 samples; expected at least one: give longer audio")
    if session.received:
        raise UserError(f"a session with {session.received} samples already; open a new one")
    calls = []
    counter = session.net.register_forward_hook(lambda *_: calls.append(1))
    try:
        free, seconds = 0.0, 0.0
        for start in range(0, len(speech), packet):
            part = slice(start, min(start + packet, len(speech)))
            free = max(free, part.stop / SAMPLE_RATE)
            begun = time.perf_counter()
            session.push_audio(speech[part], None if other is None else other[part])
            if part.stop == len(speech):
                session.close()
            while True:
                control(session)
                first = session.frames
                frames = session.step()
                frames = None if frames is None else frames.cpu()  # waits until a GPU is done
                spent = time.perf_counter() - begun
                free, seconds = free + spent, seconds + spent
                if frames is None:
                    break
                samples = speech[first * SAMPLES_PER_FRAME : session.frames * SAMPLES_PER_FRAME].cpu()
                silence = frames.shape[1] * SAMPLES_PER_FRAME - len(samples)
                yield Emitted(frames, torch.nn.functional.pad(samples, (0, silence)), seconds, free, len(calls))
                seconds = 0.0
                calls.clear()
                begun = time.perf_counter()  # what the receiver did with the chunk is not counted
    finally:
        counter.remove()


@dataclass(frozen=True)
class StreamStats:
    """Latency and speed of a stream."""

    first_frame_s: float  # from the first sample spoken to the first frame, its look-ahead included
    stall_free_first_frame_s: float  # the same, to the earliest start without later stalls
    chunk_p50_s: float  # median computing time of a chunk
    chunk_p99_s: float  # and its 99th percentile, interpolated
    real_time_factor: float  # seconds of computing per second of video
    frames: int
    evaluations_per_chunk: float  # mean number of forward passes

    @classmethod
    def of(cls, records: list[Emitted]) -> "StreamStats":
        """The figures of a stream from all its chunks in order.

        Playback that starts at T shows frame i at T + i/25. It never stalls if every chunk is ready before its first
        frame i is due: T = max over chunks of (ready_at - i/25).
        """
        if not records:
            raise UserError("no chunk to take figures from; stream something first")
        lengths = torch.tensor([record.frames.shape[1] for record in records])
        firsts = (lengths.cumsum(0) - lengths).double()
        ready = torch.tensor([record.ready_at for record in records], dtype=torch.float64)
        seconds = torch.tensor([record.seconds for record in records], dtype=torch.float64)
        frames = int(lengths.sum())
        return cls(
            first_frame_s=records[0].ready_at,
            stall_free_first_frame_s=float((ready - firsts / FRAME_RATE).max()),
            chunk_p50_s=float(seconds.quantile(0.5)),
            chunk_p99_s=float(seconds.quantile(0.99)),
            real_time_factor=float(seconds.sum()) * FRAME_RATE / frames,
            frames=frames,
            evaluations_per_chunk=sum(record.evaluations for record in records) / len(records),
        )
