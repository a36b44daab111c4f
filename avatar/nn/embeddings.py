"""What enters the backbone: times, patches, and the entrances of audio, text and labels; and what goes around it.

Every entrance adds one learned *null* token that is always on, so a missing modality leaves something to attend to.
"""

import math

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from avatar.errors import UserError
from avatar.nn.attention import zero_init_
from avatar.nn.norm import LayerNorm
from avatar.types import EMOTIONS, GESTURES, ROLES, STATES, Conditioning


def sinusoidal(t: Float[Tensor, "b l"], dim: int) -> Float[Tensor, "b l d"]:
    """Cosines and sines of 1000 t, as Wan's (and DDPM's) networks take their times."""
    half = dim // 2
    wide = torch.promote_types(t.dtype, torch.float32)
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device, dtype=wide) / half)
    phases = t.to(wide)[..., None] * 1000 * frequencies
    return torch.cat([phases.cos(), phases.sin()], dim=-1)


class ScalarEmbedding(nn.Module):
    """A number in [0, 1] or a small scale, as a vector of the model's width."""

    def __init__(self, dim: int, frequencies: int = 256):
        super().__init__()
        self.frequencies = frequencies
        self.linear_1, self.linear_2 = nn.Linear(frequencies, dim), nn.Linear(dim, dim)

    def forward(self, t: Float[Tensor, "b l"]) -> Float[Tensor, "b l d"]:
        wave = sinusoidal(t, self.frequencies).to(self.linear_1.weight.dtype)
        return self.linear_2(nn.functional.silu(self.linear_1(wave)))


class LabelEmbedding(nn.Module):
    """State, emotion (times its intensity) and gesture of each latent; index 0, "not said", adds nothing."""

    def __init__(self, dim: int):
        super().__init__()
        self.state, self.emotion, self.gesture = (
            nn.Embedding(len(names), dim, padding_idx=0) for names in (STATES, EMOTIONS, GESTURES)
        )
        for embedding in (self.state, self.emotion, self.gesture):
            nn.init.normal_(embedding.weight, std=0.02)
            with torch.no_grad():
                embedding.weight[0] = 0

    def forward(self, cond: Conditioning) -> Float[Tensor, "b l d"]:
        intensity = cond.emotion_intensity[..., None].to(self.emotion.weight.dtype)
        return self.state(cond.state) + intensity * self.emotion(cond.emotion) + self.gesture(cond.gesture)


class LayerMix(nn.Module):
    """The states of a frozen network's layers, which lie side by side → their weighted sum; at first their mean.

    Encoded clips keep all layers, and the backbone learns which to listen to. ELMo's mix, arXiv:1802.05365, of states
    of unit variance, hence without its scale.
    """

    def __init__(self, layers: int):
        super().__init__()
        self.weights = nn.Parameter(torch.empty(layers))  # logits
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weights)

    def forward(self, states: Float[Tensor, "*b yd"]) -> Float[Tensor, "*b d"]:
        states = states.unflatten(-1, (len(self.weights), -1))
        return (states * self.weights.softmax(0)[:, None]).sum(-2)


class AudioEmbedder(nn.Module):
    """Audio features around each latent, by role → the tokens that this latent attends to, a null token first.

    Args:
        features: width of the features.
        tokens: of a latent, per role.
        layers: of a frozen network that the features are the states of, side by side; 1: features of one piece.
    """

    def __init__(self, features: int, tokens: int, dim: int, layers: int = 1):
        super().__init__()
        if layers < 1 or features % layers:
            raise UserError(f"audio features of width {features} can't be the states of {layers} layers; give both")
        self.features, self.tokens, self.layers, self.width = features, tokens, layers, features // layers
        self.null = nn.Parameter(torch.empty(dim))
        self.place = nn.Parameter(torch.empty(len(ROLES), tokens, dim))
        self.reset_parameters()
        self.mix = LayerMix(layers) if layers > 1 else nn.Identity()
        self.mlp = nn.Sequential(nn.Linear(self.width, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))

    def reset_parameters(self) -> None:
        """The start of its own parameters, not of its layers'."""
        nn.init.normal_(self.null, std=0.02)
        nn.init.normal_(self.place, std=0.02)

    def forward(
        self, audio: Float[Tensor, "b r l k d"], mask: Bool[Tensor, "b r l"]
    ) -> tuple[Float[Tensor, "b l m e"], Bool[Tensor, "b l m"]]:
        b, _, l, k, _ = audio.shape
        tokens = self.mlp(self.mix(audio)) + self.place[None, :, None]
        tokens = rearrange(tokens, "b r l k d -> b l (r k) d")
        on = rearrange(mask[..., None].expand(-1, -1, -1, k), "b r l k -> b l (r k)")
        null = self.null.expand(b, l, 1, -1)
        return torch.cat([null, tokens], 2), torch.cat([torch.ones_like(on[..., :1]), on], 2)


class ByteTextEncoder(nn.Module):
    """Byte ids → tokens, by a small transformer trained with the backbone; the null token first."""

    def __init__(self, dim: int, width: int = 64, layers: int = 2, heads: int = 2, max_bytes: int = 128):
        super().__init__()
        if min(width, layers, heads) < 1 or width % heads:
            raise UserError(f"a text of width {width} in {layers} layers of {heads} heads; choose heads that share it")
        self.dim = dim
        self.null = nn.Parameter(torch.randn(dim) * 0.02)
        self.byte = nn.Embedding(259, width)  # 256 bytes after three special ids, ByT5's numbering
        self.place = nn.Parameter(torch.randn(max_bytes, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.out = nn.Linear(width, dim)

    def forward(
        self, ids: Int[Tensor, "b e n"], mask: Bool[Tensor, "b e n"]
    ) -> tuple[Float[Tensor, "b e m d"], Bool[Tensor, "b e m"]]:
        self.check(ids)
        b, e, n = ids.shape
        x = self.byte(ids.flatten(0, 1)) + self.place[:n]
        # A prompt that was taken away has no byte to attend to: let it attend to all, its tokens are masked below.
        hidden = ~mask.flatten(0, 1) & mask.flatten(0, 1).any(1, keepdim=True)
        x = self.out(self.encoder(x, src_key_padding_mask=hidden)).unflatten(0, (b, e))
        null = self.null.expand(b, e, 1, -1)
        return torch.cat([null, x], 2), torch.cat([torch.ones_like(mask[..., :1]), mask], 2)

    def check(self, text: Shaped[Tensor, "*b n"]) -> None:
        """Raise UserError for what isn't a text encoder's byte ids, or more of them than it reads."""
        if text.is_floating_point():
            raise UserError("text as features for a model that reads bytes; choose text_encoder=bytes")
        if text.shape[-1] > len(self.place):
            raise UserError(
                f"prompts of {text.shape[-1]} bytes for a model that reads {len(self.place)}; set text.max_bytes to "
                "this, or raise model.network.text.max_bytes"
            )


class TextProjection(nn.Module):
    """Features of a frozen text encoder → tokens, as Wan's networks take them; a null token first.

    Wan attends to the zero features that a prompt is padded with (`text_mask` says so: it is the encoder's policy), so
    the token of a zero feature *is* the null token. It counts only where there is nothing else to attend to.
    """

    def __init__(self, features: int, dim: int):
        super().__init__()
        self.features, self.dim = features, dim
        self.linear_1, self.linear_2 = nn.Linear(features, dim), nn.Linear(dim, dim)

    def forward(
        self, text: Float[Tensor, "b e n f"], mask: Bool[Tensor, "b e n"]
    ) -> tuple[Float[Tensor, "b e m d"], Bool[Tensor, "b e m"]]:
        self.check(text)
        text = nn.functional.pad(text, (0, 0, 1, 0))
        tokens = self.linear_2(nn.functional.gelu(self.linear_1(text), approximate="tanh"))
        return tokens, torch.cat([~mask.any(-1, keepdim=True), mask], 2)

    def check(self, text: Shaped[Tensor, "*b f"]) -> None:
        """Raise UserError for what isn't a text encoder's features of this width."""
        if not text.is_floating_point() or text.shape[-1] != self.features:
            got = f"features of width {text.shape[-1]}" if text.is_floating_point() else "bytes"
            raise UserError(
                f"text as {got} for a model that takes features of width {self.features}; choose another "
                "text_encoder, such as umt5"
            )


class ImageProjection(nn.Module):
    """Features of a frozen image encoder → tokens, as Wan 2.1's image-to-video networks take them."""

    def __init__(self, features: int, dim: int):
        super().__init__()
        self.features, self.dim = features, dim
        self.norm_in, self.norm_out = LayerNorm(features), LayerNorm(dim)
        self.linear_1, self.linear_2 = nn.Linear(features, features), nn.Linear(features, dim)

    def forward(self, image: Float[Tensor, "b m e"]) -> Float[Tensor, "b m d"]:
        return self.norm_out(self.linear_2(nn.functional.gelu(self.linear_1(self.norm_in(image)))))


def per_latent_text(
    tokens: Float[Tensor, "b e m d"], mask: Bool[Tensor, "b e m"], event: Int[Tensor, "b l"]
) -> tuple[Float[Tensor, "b k d"], Bool[Tensor, "b l k"]]:
    """All events' tokens in a row, and for each latent those of its event; of event -1 the null tokens, the first ones,
    alone."""
    events = torch.arange(tokens.shape[1], device=event.device)
    spoken = (event[..., None] == events)[..., None] & mask[:, None]
    null = torch.zeros_like(spoken)
    null[..., 0] = True
    none = (event < 0)[..., None, None]
    return tokens.flatten(1, 2), (spoken | (null & none)).flatten(2)


class PatchEmbedding(nn.Module):
    """Latents, with `more` channels beside their own, in patches of p × p → tokens; the reference, if it enters by
    channels, is added to every latent."""

    def __init__(self, channels: int, patch: int, dim: int, reference: bool, more: int = 0):
        super().__init__()
        self.patch = patch
        self.proj = nn.Linear((channels + more) * patch * patch, dim)
        self.reference = nn.Linear(channels * patch * patch, dim) if reference else None
        if self.reference is not None:
            zero_init_(self.reference)

    def forward(self, x: Float[Tensor, "b k l h w"], reference: Float[Tensor, "b c 1 h w"]) -> Float[Tensor, "b l n d"]:
        tokens = self.proj(patches(x, self.patch))
        return tokens if self.reference is None else tokens + self.reference(patches(reference, self.patch))


class InputSkip(nn.Module):
    """What goes straight from input to output: learned shares, by token and channel, of the noisy latents and (if it
    enters by channels) of the reference; nothing at first.

    Velocity has all of the noise in it, as many numbers as a patch has. Without a way around they'd have to pass
    through the width of the model, which a small one lacks (arXiv:2511.13720).
    """

    def __init__(self, dim: int, channels: int, patch: int, reference: bool):
        super().__init__()
        self.patch, self.inputs = patch, 1 + reference
        self.weights = nn.Linear(dim, self.inputs * channels)
        zero_init_(self.weights)

    def forward(
        self, y: Float[Tensor, "b l n d"], x: Float[Tensor, "b c l h w"], reference: Float[Tensor, "b c 1 h w"]
    ) -> Float[Tensor, "b c l h w"]:
        rows, p = x.shape[-2] // self.patch, self.patch
        weights = rearrange(self.weights(y), "b l (h w) (i c) -> i b c l h w", i=self.inputs, h=rows)
        weights = weights.repeat_interleave(p, dim=-2).repeat_interleave(p, dim=-1)
        return (weights * torch.stack([x, reference.expand_as(x)][: self.inputs])).sum(0)


def patches(x: Float[Tensor, "b c l h w"], p: int) -> Float[Tensor, "b l n d"]:
    """Latents cut into patches of p × p."""
    if x.shape[-1] % p or x.shape[-2] % p:
        raise UserError(f"latents of {x.shape[-2]}×{x.shape[-1]} can't be cut into patches of {p}; choose another size")
    return rearrange(x, "b c l (h p) (w q) -> b l (h w) (c p q)", p=p, q=p)


def unpatched(tokens: Float[Tensor, "b l n d"], p: int, h: int, w: int) -> Float[Tensor, "b c l h w"]:
    """The inverse of `patches`, for latents of h × w."""
    return rearrange(tokens, "b l (h w) (c p q) -> b c l (h p) (w q)", p=p, q=p, h=h // p, w=w // p)
