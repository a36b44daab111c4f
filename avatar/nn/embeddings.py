"""Embeddings of the backbone's conditions: timesteps, labels, audio, text and image.

The audio and text embedders add one learned *null* token. It is always there to attend to where a modality is missing.
"""

import math

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from avatar.errors import UserError
from avatar.nn.norm import LayerNorm
from avatar.types import EMOTIONS, GESTURES, ROLES, STATES, Conditioning


def sinusoidal(t: Float[Tensor, "b l"], dim: int) -> Float[Tensor, "b l d"]:
    """Sinusoidal embedding of 1000 t, as Wan and DDPM embed timesteps: cosines, then sines."""
    half = dim // 2
    wide = torch.promote_types(t.dtype, torch.float32)
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device, dtype=wide) / half)
    phases = t.to(wide)[..., None] * 1000 * frequencies
    return torch.cat([phases.cos(), phases.sin()], dim=-1)


class ScalarEmbedding(nn.Module):
    """Sinusoidal embedding and MLP of a scalar per latent: a timestep in [0, 1] or a guidance scale.

    Args:
        dim: width of the output.
        frequencies: width of the sinusoidal embedding.
    """

    def __init__(self, dim: int, frequencies: int = 256):
        super().__init__()
        self.frequencies = frequencies
        self.linear_1, self.linear_2 = nn.Linear(frequencies, dim), nn.Linear(dim, dim)

    def forward(self, t: Float[Tensor, "b l"]) -> Float[Tensor, "b l d"]:
        wave = sinusoidal(t, self.frequencies).to(self.linear_1.weight.dtype)
        return self.linear_2(nn.functional.silu(self.linear_1(wave)))


class LabelEmbedding(nn.Module):
    """Sum of the embeddings of state, emotion (times its intensity) and gesture, per latent.

    Index 0, "unspecified", has the zero vector.
    """

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
    """Learned softmax-weighted sum of the layers of a frozen network (ELMo, arXiv:1802.05365); at first their mean.

    Encoded clips keep the concatenated states of all layers, and the backbone learns their weights. The states have
    unit variance, so ELMo's scale is left out.

    Args:
        layers: y, the number of layers.
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
    """Audio features around each latent → the tokens that this latent attends to, the null token first.

    Args:
        features: width of the features, of all layers together.
        tokens: audio tokens per latent and role.
        dim: width of the output tokens.
        layers: layers of a frozen network whose states are concatenated in the features; 1: no layers to mix.

    Raises:
        UserError: `features` is not a multiple of `layers`.
    """

    def __init__(self, features: int, tokens: int, dim: int, layers: int = 1):
        super().__init__()
        if layers < 1 or features % layers:
            raise UserError(
                f"got audio features of width {features} for {layers} layers; expected a multiple of the layers, at "
                "least 1: set audio_features and audio_layers to those of the audio encoder"
            )
        self.features, self.tokens, self.layers, self.width = features, tokens, layers, features // layers
        self.null = nn.Parameter(torch.empty(dim))
        self.place = nn.Parameter(torch.empty(len(ROLES), tokens, dim))
        self.reset_parameters()
        self.mix = LayerMix(layers) if layers > 1 else nn.Identity()
        self.mlp = nn.Sequential(nn.Linear(self.width, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))

    def reset_parameters(self) -> None:
        """Initialise the parameters of this module, without those of its submodules."""
        nn.init.normal_(self.null, std=0.02)
        nn.init.normal_(self.place, std=0.02)

    def forward(
        self, audio: Float[Tensor, "b r l k d"], mask: Bool[Tensor, "b r l"]
    ) -> tuple[Float[Tensor, "b l m e"], Bool[Tensor, "b l m"]]:
        """Tokens (m = 1 + roles · tokens) and their mask.

        Args:
            audio: features by role.
            mask: False where a role has no audio; the null token's mask is always True.
        """
        b, _, l, k, _ = audio.shape
        tokens = self.mlp(self.mix(audio)) + self.place[None, :, None]
        tokens = rearrange(tokens, "b r l k d -> b l (r k) d")
        token_mask = rearrange(mask[..., None].expand(-1, -1, -1, k), "b r l k -> b l (r k)")
        null = self.null.expand(b, l, 1, -1)
        return torch.cat([null, tokens], 2), torch.cat([torch.ones_like(token_mask[..., :1]), token_mask], 2)


class ByteTextEncoder(nn.Module):
    """Text embedder of byte ids: a small transformer, trained with the backbone; the null token first.

    Args:
        dim: width of the output tokens, that of the backbone.
        width, layers, heads: of the transformer; `width` is a multiple of `heads`.
        max_bytes: maximal number of ids in a prompt, the end included.

    Raises:
        UserError: a size below 1, or a width that is not a multiple of `heads`.
    """

    def __init__(self, dim: int, width: int = 64, layers: int = 2, heads: int = 2, max_bytes: int = 128):
        super().__init__()
        if min(width, layers, heads) < 1 or width % heads:
            raise UserError(
                f"got width={width}, layers={layers}, heads={heads} for the text embedder; expected at least 1 each, "
                "and a width that is a multiple of the heads: change them"
            )
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
        """Tokens (m = 1 + n) and their mask; n at most `max_bytes`."""
        self.check(ids)
        b, e, n = ids.shape
        x = self.byte(ids.flatten(0, 1)) + self.place[:n]
        # A dropped prompt has no byte to attend to: it attends to all of them, and its tokens are masked below.
        hidden = ~mask.flatten(0, 1) & mask.flatten(0, 1).any(1, keepdim=True)
        x = self.out(self.encoder(x, src_key_padding_mask=hidden)).unflatten(0, (b, e))
        null = self.null.expand(b, e, 1, -1)
        return torch.cat([null, x], 2), torch.cat([torch.ones_like(mask[..., :1]), mask], 2)

    def check(self, text: Shaped[Tensor, "*b n"]) -> None:
        """Raise UserError for features in place of byte ids, or for more than `max_bytes` of them."""
        if text.is_floating_point():
            raise UserError("got text as features for a model that takes bytes; choose text_encoder=bytes")
        if text.shape[-1] > len(self.place):
            raise UserError(
                f"got prompts of {text.shape[-1]} bytes for a model that takes {len(self.place)}; set text.max_bytes "
                "to this, or raise model.network.text.max_bytes"
            )


class TextProjection(nn.Module):
    """Text embedder of Wan's networks: an MLP of a frozen encoder's features; the null token first.

    Wan attends to the zero features that pad a prompt (the encoder sets `text_mask` so), so the token of a zero feature
    *is* the null token. It is attended to only where there is nothing else.

    Args:
        features: width f of the encoder's features.
        dim: width of the output tokens, that of the backbone.
    """

    def __init__(self, features: int, dim: int):
        super().__init__()
        self.features, self.dim = features, dim
        self.linear_1, self.linear_2 = nn.Linear(features, dim), nn.Linear(dim, dim)

    def forward(
        self, text: Float[Tensor, "b e n f"], mask: Bool[Tensor, "b e n"]
    ) -> tuple[Float[Tensor, "b e m d"], Bool[Tensor, "b e m"]]:
        """Tokens (m = 1 + n) and their mask; the null token's is True for a prompt without any other."""
        self.check(text)
        text = nn.functional.pad(text, (0, 0, 1, 0))
        tokens = self.linear_2(nn.functional.gelu(self.linear_1(text), approximate="tanh"))
        return tokens, torch.cat([~mask.any(-1, keepdim=True), mask], 2)

    def check(self, text: Shaped[Tensor, "*b f"]) -> None:
        """Raise UserError for byte ids in place of features, or for features of another width."""
        if not text.is_floating_point() or text.shape[-1] != self.features:
            got = f"features of width {text.shape[-1]}" if text.is_floating_point() else "bytes"
            raise UserError(
                f"got text as {got} for a model that takes features of width {self.features}; choose another "
                "text_encoder, such as umt5"
            )


class ImageProjection(nn.Module):
    """Image embedder of Wan 2.1's image-to-video networks: an MLP of a frozen encoder's features.

    Args:
        features: width e of the encoder's features.
        dim: width of the output tokens, that of the backbone.
    """

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
    """Text tokens of all events, concatenated (k = e · m), and the mask of those that each latent attends to.

    Args:
        tokens: of e text events, each with the null token first.
        mask: which tokens of an event are attended to.
        event: the event of each latent; -1: none, and the latent attends to the null tokens alone.
    """
    events = torch.arange(tokens.shape[1], device=event.device)
    attended = (event[..., None] == events)[..., None] & mask[:, None]
    null = torch.zeros_like(attended)
    null[..., 0] = True
    no_event = (event < 0)[..., None, None]
    return tokens.flatten(1, 2), (attended | (null & no_event)).flatten(2)
