"""A conversation with one avatar: sound and wishes in, frames out. Pure and clockless; time is the runtime's business.

Sound makes a timeline of frames, 640 samples each; frame i is out once the chunk that holds it is complete, which takes
the sound of the chunk and, beyond it, the audio encoder's right context. What the frames of a chunk are depends on the
sound, on what was wished for before the chunk was made, and on the seed; never on how the sound was cut into packets.

At the end of each chunk the session remembers where it stood, so that `interrupt` can go back to there.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from avatar.conditioning import image_to_video
from avatar.conditioning.image_to_video import I2VConditioning
from avatar.diffusion.rollout import Noise, Plan, Rollout
from avatar.errors import UserError
from avatar.models.video_dit import VideoDiT
from avatar.nn.kv_cache import KeysValues, RingCache
from avatar.protocols import AudioEncoder, ImageEncoder, TextEncoder, VideoAutoencoder
from avatar.streaming.audio_window import AudioWindow
from avatar.streaming.inputs import Sink, Sound, check_sound, index, latent_of, shape
from avatar.types import EMOTIONS, FRAME_RATE, GESTURES, ROLES, SAMPLES_PER_FRAME, STATES, Conditioning, Latents, Pixels

Video = Float[Tensor, "c f h w"]


@dataclass(frozen=True)
class SessionSnapshot:
    """Where a session stood before the chunk at `position`; the sound isn't here, for its windows rewind themselves."""

    position: int
    pending_context: tuple[Latents, Conditioning] | None
    sink: dict[int, KeysValues]
    reference: I2VConditioning  # of the reference that the sink was made of
    decoder: Any


class Session:
    """One avatar, streaming.

    Each wish (`set_prompt`, `set_state`, `set_emotion`, `gesture`, `set_reference`) holds from the next chunk on, and
    an interrupt doesn't take it back.

    Args:
        net, autoencoder: on one device, in eval mode; the network's precision is that of the cache.
        audio, text: the encoders that the network was trained with.
        plan: the schedule that it was distilled for.
        reference: the picture of the avatar, `1 c 1 h w` in [-1, 1]; or give `latent`.
        latent: the picture, encoded by itself already.
        max_rollback: chunks that an interrupt can take back; each costs memory for a chunk's keys and values.
        image: the image encoder of an image-to-video network, for others None.
    """

    def __init__(
        self,
        net: VideoDiT,
        autoencoder: VideoAutoencoder,
        audio: AudioEncoder,
        text: TextEncoder,
        plan: Plan,
        reference: Pixels | None = None,
        latent: Sink | None = None,
        seed: int = 0,
        prompt: str = "",
        max_rollback: int = 4,
        image: ImageEncoder | None = None,
    ):
        if net.training or autoencoder.training:
            raise UserError(
                "a network or an autoencoder in training mode, whose state would change; call .eval() first"
            )
        net.check_inputs(autoencoder, audio, image)
        self.net, self.autoencoder, self.text, self.image, self.plan = net, autoencoder, text, image, plan
        self.stride = autoencoder.temporal_stride
        self.weight = next(net.parameters())  # has the device and precision of all that the network takes
        self.next_reference = self._encode_reference(reference, latent)
        self.set_prompt(prompt)
        height, width = self.next_reference.reference.shape[-2:]
        net.check_shapes(audio.num_layers, self.prompt[0], [(height, width)])
        self.state, self.emotion, self.intensity = 0, 0, 0.0
        self.gestures = (0, 0)  # the gesture, and the latent that it ends before

        if max_rollback < 0:
            raise UserError(f"max_rollback {max_rollback}; give the chunks that an interrupt may take back, or 0")
        spare = max(1, max_rollback) * max(plan.chunk, plan.first_chunk)  # a merged pass writes a chunk ahead
        self.windows = [AudioWindow(audio, self.stride, spare) for _ in ROLES]
        self.waiting = torch.zeros(len(ROLES), 0)  # sound that has come and that no chunk was made of yet
        self.received = 0  # samples on the timeline
        self.other_voice: set[int] = set()  # latents from `position` on during which a voice was heard
        self.end: int | None = None  # the frame that the stream ends before, once that is known

        cache = RingCache(
            net.layers,
            1,
            net.heads,
            net.dim // net.heads,
            net.tokens(height, width),
            plan.window,
            spare,
            self.weight.device,
            self.weight.dtype,
        )
        self.cache, self.rollout = cache, Rollout(net, plan, cache, Noise((seed,)))
        self._prime_reference()
        self.decoder = autoencoder.decoder_stream()
        with torch.no_grad():
            # The reference's own frame is not on the timeline.
            self.empty = self.decoder.push(self.next_reference.reference)[0, :, :0]
        self.snapshots = deque([self._snapshot()], maxlen=max_rollback + 1)

    @property
    def frames(self) -> int:
        """Frames that are out, taken-back ones not counted."""
        made = self.rollout.position * self.stride
        return made if self.end is None else min(made, self.end)

    # Controls

    def set_prompt(self, prompt: str) -> None:
        """What the text says of the frames to come; "" says nothing."""
        self.prompt = self.text.encode([prompt])

    def set_state(self, name: str | None) -> None:
        """Speaking, listening or idle (see STATES); None leaves it to the network."""
        self.state = index("state", name, STATES)

    def set_emotion(self, name: str | None, intensity: float = 1.0) -> None:
        """One of EMOTIONS, at an intensity in [0, 1]."""
        if not 0 <= intensity <= 1:
            raise UserError(f"an intensity of {intensity}; it lies between 0 and 1")
        self.emotion = index("emotion", name, EMOTIONS)
        self.intensity = float(intensity) if self.emotion else 0.0

    def gesture(self, name: str | None, seconds: float = 1.0) -> None:
        """One of GESTURES, begun with the next chunk and asked for during so many seconds."""
        if not 0 < seconds < float("inf"):
            raise UserError(f"a gesture of {seconds} seconds; give it a finite length above 0")
        latents = -int(-seconds * FRAME_RATE // self.stride)
        self.gestures = (index("gesture", name, GESTURES), self.rollout.position + latents)

    def set_reference(self, pixels: Pixels | None = None, latent: Sink | None = None) -> None:
        """Another picture of the avatar, of the same size; the frames before it stay in view and blend into it.

        For an image-to-video network this call encodes some 100 frames.
        """
        next_reference, own = self._encode_reference(pixels, latent), self.next_reference.reference
        if next_reference.reference.shape != own.shape:
            raise UserError(
                f"a reference with a latent of {shape(next_reference.reference)} in a session of {shape(own)}; "
                "crop it to the first one's size or open another session"
            )
        self.next_reference = next_reference

    # Sound in, frames out

    def push(self, own: Sound, other: Sound | None = None) -> Video:
        """Take in what the avatar says, and the voice it listens to meanwhile; the frames that are complete now."""
        self.push_audio(own, other)
        return self._video(self.chunks())

    def finish(self) -> Video:
        """The frames that are left, with silence after the last sound: one for each 640 samples, or part, in all."""
        self.close()
        return self._video(self.chunks())

    def push_audio(self, own: Sound, other: Sound | None = None) -> None:
        """Take in sound without making frames of it yet."""
        if self.end is not None:
            raise UserError("sound after the stream's end; open another session, or interrupt this one first")
        check_sound("speech", own)
        if other is not None:
            check_sound("other", other)
            if len(other) != len(own):
                raise UserError(
                    f"{len(own)} samples of the avatar's voice with {len(other)} of the other one; both are on one "
                    "clock: "
                    "pad the shorter with silence"
                )
        self._enqueue(own, other)

    def close(self) -> None:
        """End the timeline with the sound that has come; silence fills the last chunk."""
        if self.end is not None:
            return
        self.end = -(-self.received // SAMPLES_PER_FRAME)
        latents = self.rollout.position
        while latents * self.stride < self.end:
            latents += self.plan.chunk if latents else self.plan.first_chunk
        if latents > self.rollout.position:
            silence = torch.zeros(self.windows[0].samples_needed(latents) - self.received)
            last = (self.received - 1) // (self.stride * SAMPLES_PER_FRAME)
            self._enqueue(silence, silence if last in self.other_voice else None)

    def chunks(self) -> Iterator[Video]:
        """Make the chunks that are complete, one by one; a later wish changes those that weren't asked for yet."""
        while (frames := self.step()) is not None:
            yield frames

    @torch.no_grad()
    def step(self) -> Video | None:
        """Make the next chunk, if all its sound has come."""
        position = self.rollout.position
        length = self.plan.chunk if position else self.plan.first_chunk
        missing = self.windows[0].samples_needed(position + length) - self.windows[0].received
        if self.waiting.shape[1] < missing or (self.end is not None and position * self.stride >= self.end):
            return None
        if self.next_reference.reference is not self.reference.reference:
            self._prime_reference()
        sound, self.waiting = self.waiting[:, :missing], self.waiting[:, missing:].clone()
        audio = torch.stack([window.push(track) for window, track in zip(self.windows, sound, strict=True)])
        latents = self.rollout.chunk(self._conditioning(audio, position))
        self.other_voice = {latent for latent in self.other_voice if latent >= position + length}
        before = position * self.stride
        frames = self.decoder.push(latents.to(self.next_reference.reference.dtype))[0]
        self.snapshots.append(self._snapshot())
        return frames if self.end is None else frames[:, : self.end - before]

    def interrupt(self, shown_frames: int | None = None) -> int:
        """Go back to the end of the last chunk that was shown to its last frame; the frame that now comes next.

        Without `shown_frames`, everything that is out counts as shown. The timeline is cut there: the next sample to be
        pushed belongs to the frame returned, and the rest of the old sound, waiting or made into frames or heard ahead
        as right context, has never come. (Frames that stay were made with that right context, and keep it.) Frames of a
        chunk that was shown in part are taken back and come again, otherwise.
        """
        shown = self.frames if shown_frames is None else shown_frames
        if not 0 <= shown <= self.frames:
            raise UserError(f"{shown} frames shown of {self.frames} that are out; give a number between")
        whole = [c for c in self.snapshots if c.position * self.stride <= shown]
        if not whole:
            raise UserError(
                f"{shown} frames shown, but the session goes back to frame "
                f"{self.snapshots[0].position * self.stride} at most; interrupt it sooner or raise max_rollback"
            )
        to = whole[-1]
        self.snapshots = deque(whole, maxlen=self.snapshots.maxlen)
        self.rollout.position, self.rollout.pending_context = to.position, to.pending_context
        self.cache.sink, self.reference = to.sink, to.reference
        self.decoder.restore(to.decoder)
        for window in self.windows:
            window.rewind(to.position)
        self.waiting, self.end = self.waiting[:, :0], None
        self.received = self.windows[0].received
        self.other_voice = set()
        return to.position * self.stride

    # Internals

    def _enqueue(self, own: Sound, other: Sound | None) -> None:
        tracks = torch.stack([own, torch.zeros_like(own) if other is None else other])
        self.waiting = torch.cat([self.waiting, tracks.detach().cpu().float()], dim=1)
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
        """Make the reference the sink."""
        self.reference = self.next_reference
        tokens = self.windows[0].encoder.tokens(self.stride)
        silence = torch.zeros(len(ROLES), 1, tokens, self.windows[0].encoder.dim)
        self.rollout.prime(self._conditioning(silence, self.rollout.position))

    def _encode_reference(self, pixels: Pixels | None, latent: Sink | None) -> I2VConditioning:
        reference = latent_of(pixels, latent, self.autoencoder, self.weight.device)
        return image_to_video.encode_reference(reference, self.autoencoder, self.image, image_to_video.MAX_GREY_LATENTS)

    def _snapshot(self) -> SessionSnapshot:
        rollout = self.rollout
        return SessionSnapshot(
            rollout.position, rollout.pending_context, self.cache.sink, self.reference, self.decoder.snapshot()
        )
