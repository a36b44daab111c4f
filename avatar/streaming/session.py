"""Streaming session of one avatar: audio and controls in, frames out. Pure and without a clock.

Audio defines a timeline of frames, 640 samples each. Frame i is emitted with its chunk, as soon as the audio of the
chunk and the look-ahead of the audio encoder have arrived. The frames of a chunk depend on the audio, on the controls
that were set before the chunk was generated, and on the seed; never on how the audio was cut into packets.

At the end of each chunk the session takes a snapshot, to which `interrupt` can roll back.
"""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from avatar.conditioning import image_to_video
from avatar.conditioning.image_to_video import I2VConditioning
from avatar.conditioning.labels import label_index
from avatar.diffusion.plan import Plan
from avatar.diffusion.rollout import Noise, Rollout
from avatar.errors import UserError
from avatar.models.video_dit import VideoDiT
from avatar.nn.kv_cache import KeysValues, RingCache
from avatar.protocols import AudioEncoder, ImageEncoder, TextEncoder, VideoAutoencoder
from avatar.streaming.audio_window import AudioWindow
from avatar.streaming.inputs import Audio, SinkLatent, check_audio, encode_portrait, format_shape
from avatar.types import EMOTIONS, FRAME_RATE, GESTURES, ROLES, SAMPLES_PER_FRAME, STATES, Conditioning, Latents, Pixels

Video = Float[Tensor, "c f h w"]


@dataclass(frozen=True)
class SessionSnapshot:
    """The state of a session before the chunk at `position`, without the audio: its windows rewind themselves."""

    position: int
    pending_context: tuple[Latents, Conditioning] | None
    sink: dict[int, KeysValues]
    reference: I2VConditioning  # of the reference that the sink was made of
    decoder: Any


class Session:
    """A stream of one avatar.

    Controls (`set_prompt`, `set_state`, `set_emotion`, `gesture`, `set_reference`) hold from the next chunk on, and an
    interrupt does not undo them.

        session = Session(student, autoencoder, audio, text, plan, portrait)
        frames = session.push(samples)  # c f h w: the frames that these samples complete
        session.set_emotion("happy")
        frames = session.finish()

    Args:
        net, autoencoder: on one device, in eval mode; the cache has the precision of the network.
        audio, text: the encoders of its training.
        plan: the schedule of its distillation.
        reference: the portrait, `1 c 1 h w` in [-1, 1]; or `latent`, the portrait encoded by itself.
        seed: of the noise; prompt: a description in words.
        max_rollback: chunks that an interrupt can undo; each costs the memory of a chunk's keys and values.
        image: the image encoder of an image-to-video network, else None.

    Raises:
        UserError: networks in training mode, inputs that do not fit the network, an invalid reference.
    """

    def __init__(
        self,
        net: VideoDiT,
        autoencoder: VideoAutoencoder,
        audio: AudioEncoder,
        text: TextEncoder,
        plan: Plan,
        reference: Pixels | None = None,
        latent: SinkLatent | None = None,
        seed: int = 0,
        prompt: str = "",
        max_rollback: int = 4,
        image: ImageEncoder | None = None,
    ):
        if net.training or autoencoder.training:
            raise UserError("got a network or autoencoder in training mode; expected eval mode: call .eval() first")
        net.check_inputs(autoencoder, audio, image)
        self.net, self.autoencoder, self.text, self.image, self.plan = net, autoencoder, text, image, plan
        self.stride = autoencoder.temporal_stride
        self.weight = next(net.parameters())  # its device and precision are those of the inputs
        self.next_reference = self._encode_reference(reference, latent)
        self.set_prompt(prompt)
        height, width = self.next_reference.reference.shape[-2:]
        net.check_shapes(audio.num_layers, self.prompt[0], [(height, width)])
        self.state, self.emotion, self.intensity = 0, 0, 0.0
        self.gestures = (0, 0)  # the gesture, and the latent before which it ends

        if max_rollback < 0:
            raise UserError(f"max_rollback={max_rollback}; expected 0 or more chunks that an interrupt may undo")
        spare = max(1, max_rollback) * max(plan.chunk, plan.first_chunk)  # a merged pass writes a chunk ahead
        self.windows = [AudioWindow(audio, self.stride, spare) for _ in ROLES]
        self.queued = torch.zeros(len(ROLES), 0)  # audio without a chunk yet
        self.received = 0  # samples on the timeline
        self.other_voice: set[int] = set()  # latents from `position` on with the other voice
        self.end: int | None = None  # the frame before which the stream ends, once known

        tokens, where = net.tokens(height, width), (self.weight.device, self.weight.dtype)
        cache = RingCache(net.layers, 1, net.heads, net.dim // net.heads, tokens, plan.window, spare, *where)
        self.cache, self.rollout = cache, Rollout(net, plan, cache, Noise((seed,)))
        self._prime_reference()
        self.snapshots = deque([self._snapshot()], maxlen=max_rollback + 1)

    @property
    def frames(self) -> int:
        """Emitted frames, without those that an interrupt has undone."""
        made = self.rollout.position * self.stride
        return made if self.end is None else min(made, self.end)

    # Controls

    def set_prompt(self, prompt: str) -> None:
        """The text prompt of the following frames; "" for none."""
        self.prompt = self.text.encode([prompt])

    def set_state(self, name: str | None) -> None:
        """One of STATES; None leaves it unspecified."""
        self.state = label_index("state", name, STATES)

    def set_emotion(self, name: str | None, intensity: float = 1.0) -> None:
        """One of EMOTIONS, at an intensity in [0, 1]."""
        if not 0 <= intensity <= 1:
            raise UserError(f"intensity={intensity}; expected a number from 0 to 1")
        self.emotion = label_index("emotion", name, EMOTIONS)
        self.intensity = float(intensity) if self.emotion else 0.0

    def gesture(self, name: str | None, seconds: float = 1.0) -> None:
        """One of GESTURES, from the next chunk on, for a duration in seconds."""
        if not 0 < seconds < float("inf"):
            raise UserError(f"a gesture of {seconds} seconds; expected a finite duration above 0")
        latents = math.ceil(seconds * FRAME_RATE / self.stride)
        self.gestures = (label_index("gesture", name, GESTURES), self.rollout.position + latents)

    def set_reference(self, pixels: Pixels | None = None, latent: SinkLatent | None = None) -> None:
        """Another portrait of the same size, from the next chunk on; the latents before it stay in the window.

        For an image-to-video network this call encodes about 100 frames.
        """
        next_reference, own = self._encode_reference(pixels, latent), self.next_reference.reference
        if next_reference.reference.shape != own.shape:
            raise UserError(
                f"a reference with a latent of {format_shape(next_reference.reference)}; expected {format_shape(own)}: "
                "crop it to the size of the first one or open another session"
            )
        self.next_reference = next_reference

    def push(self, own: Audio, other: Audio | None = None) -> Video:
        """Append audio of both voices, and return the frames that are complete now.

        Args:
            own: samples of the avatar's voice at 16 kHz, in [-1, 1].
            other: as many samples of the person it listens to; None: nobody speaks.
        """
        self.push_audio(own, other)
        return self._video(self.chunks())

    def finish(self) -> Video:
        """End the stream and return its last frames: in total one for each 640 samples or part of them."""
        self.close()
        return self._video(self.chunks())

    def push_audio(self, own: Audio, other: Audio | None = None) -> None:
        """Append audio without generating frames (see `push`)."""
        if self.end is not None:
            raise UserError("audio after the end of the stream; open another session, or interrupt this one first")
        check_audio(own, other)
        self._enqueue(own, other)

    def close(self) -> None:
        """End the timeline after the audio so far; the last chunk is padded with silence."""
        if self.end is not None:
            return
        self.end = math.ceil(self.received / SAMPLES_PER_FRAME)
        latents = self.rollout.position
        while latents * self.stride < self.end:
            latents += self.plan.chunk if latents else self.plan.first_chunk
        if latents > self.rollout.position:
            silence = torch.zeros(self.windows[0].samples_needed(latents) - self.received)
            last = (self.received - 1) // (self.stride * SAMPLES_PER_FRAME)
            self._enqueue(silence, silence if last in self.other_voice else None)

    def chunks(self) -> Iterator[Video]:
        """Generate the complete chunks one by one; a control set in between applies to the following ones."""
        while (frames := self.step()) is not None:
            yield frames

    @torch.no_grad()
    def step(self) -> Video | None:
        """Generate the next chunk, if its audio is complete; else None."""
        position = self.rollout.position
        length = self.plan.chunk if position else self.plan.first_chunk
        missing = self.windows[0].samples_needed(position + length) - self.windows[0].received
        if self.queued.shape[1] < missing or (self.end is not None and position * self.stride >= self.end):
            return None
        if self.next_reference.reference is not self.reference.reference:
            self._prime_reference()
        tracks, self.queued = self.queued[:, :missing], self.queued[:, missing:].clone()
        audio = torch.stack([window.push(track) for window, track in zip(self.windows, tracks, strict=True)])
        latents = self.rollout.chunk(self._conditioning(audio, position))
        self.other_voice = {latent for latent in self.other_voice if latent >= position + length}
        before = position * self.stride
        frames = self.decoder.push(latents.to(self.next_reference.reference.dtype))[0]
        self.snapshots.append(self._snapshot())
        return frames if self.end is None else frames[:, : self.end - before]

    def interrupt(self, shown_frames: int | None = None) -> int:
        """Roll back to the end of the last chunk that was shown completely, and return the index of the next frame.

        Without `shown_frames`, all emitted frames count as shown. The timeline is cut there: the next sample to be
        pushed belongs to the returned frame, and later audio is dropped, whether queued, used or part of the
        look-ahead. (Frames that stay keep the look-ahead that they were generated with.) Frames of a chunk that was
        shown in part are generated again.
        """
        shown = self.frames if shown_frames is None else shown_frames
        if not 0 <= shown <= self.frames:
            raise UserError(f"shown_frames={shown}; expected a number from 0 to {self.frames}, the emitted frames")
        reachable = [c for c in self.snapshots if c.position * self.stride <= shown]
        if not reachable:
            raise UserError(
                f"shown_frames={shown}, but the session can only roll back to frame "
                f"{self.snapshots[0].position * self.stride}; interrupt it sooner or raise max_rollback"
            )
        to = reachable[-1]
        self.snapshots = deque(reachable, maxlen=self.snapshots.maxlen)
        self.rollout.position, self.rollout.pending_context = to.position, to.pending_context
        self.cache.sink, self.reference = to.sink, to.reference
        self.decoder.restore(to.decoder)
        for window in self.windows:
            window.rewind(to.position)
        self.queued, self.end = self.queued[:, :0], None
        self.received = self.windows[0].received
        self.other_voice = set()
        return to.position * self.stride

    # Internals

    def _enqueue(self, own: Audio, other: Audio | None) -> None:
        tracks = torch.stack([own, torch.zeros_like(own) if other is None else other])
        self.queued = torch.cat([self.queued, tracks.detach().cpu().float()], dim=1)
        if other is not None and len(other):
            latent = self.stride * SAMPLES_PER_FRAME
            self.other_voice.update(range(self.received // latent, (self.received + len(other) - 1) // latent + 1))
        self.received += len(own)

    def _video(self, chunks: Iterator[Video]) -> Video:
        return torch.cat([self.empty, *chunks], dim=1)

    def _conditioning(self, audio: Float[Tensor, "r l k d"], position: int) -> Conditioning:
        latents = range(position, position + audio.shape[1])
        device = self.weight.device
        ids, mask = self.prompt
        gesture, until = self.gestures

        def each(values: list) -> Tensor:
            return torch.tensor([values], device=device)

        cond = Conditioning(
            reference=self.reference.reference.to(self.weight),
            audio=audio[None].to(self.weight),
            audio_mask=each([[True for _ in latents], [latent in self.other_voice for latent in latents]]),
            text=ids[None].to(self.weight if ids.is_floating_point() else device),
            text_mask=mask[None].to(device),
            text_event=each([0 for _ in latents]),
            state=each([self.state for _ in latents]),
            emotion=each([self.emotion for _ in latents]),
            emotion_intensity=each([self.intensity for _ in latents]).to(self.weight),
            gesture=each([gesture if latent < until else 0 for latent in latents]),
        )
        return self.reference.apply(cond, position)

    @torch.no_grad()
    def _prime_reference(self) -> None:
        """Encode the reference into the cache as the sink, and begin a decoding stream with it."""
        self.reference = self.next_reference
        self.decoder = self.autoencoder.decoder_stream()
        # The frame of the reference is not on the timeline.
        self.empty = self.decoder.push(self.reference.reference)[0, :, :0]
        tokens = self.windows[0].encoder.tokens(self.stride)
        silence = torch.zeros(len(ROLES), 1, tokens, self.windows[0].encoder.dim)
        self.rollout.prime(self._conditioning(silence, self.rollout.position))

    def _encode_reference(self, pixels: Pixels | None, latent: SinkLatent | None) -> I2VConditioning:
        reference = encode_portrait(pixels, latent, self.autoencoder, self.weight.device)
        return image_to_video.encode_reference(reference, self.autoencoder, self.image, image_to_video.MAX_GREY_LATENTS)

    def _snapshot(self) -> SessionSnapshot:
        rollout = self.rollout
        return SessionSnapshot(
            rollout.position, rollout.pending_context, self.cache.sink, self.reference, self.decoder.snapshot()
        )
