"""UMT5's encoder (arXiv:2304.09151), the text encoder of Wan's networks.

A prompt becomes the features of its tokens, the end token included, padded with zeros to `max_tokens`. Wan attends to
the padding too, so the mask is all True. Wan was trained with 512 tokens. In diffusers' Wan pipelines the defaults are
512 in `__call__` and 226 in `encode_prompt`, and both truncate longer prompts silently; with 226 the output differs,
since less padding is attended to. Here a longer prompt is an error.

An empty prompt has the features of its end token: Wan's negative prompt for guidance.
"""

import hashlib
import html
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from avatar.errors import UserError
from avatar.models import hub
from avatar.models.text_encoders.prompt import check_length, check_prompt


class UMT5(hub.FrozenNetwork):
    """Text encoder: UMT5's features of a prompt, padded as for Wan's networks.

    Args:
        weights: a folder, or a repository's name in the Hugging Face cache, such as a Wan pipeline's.
        encoder, tokenizer: subfolders of the two parts; "." if there are none.
        max_tokens: maximal number of tokens per prompt, the end token included.

    Raises:
        MissingFileError: no weights or tokenizer.
        UserError: `max_tokens` below 1, damaged files, or a tokenizer that does not fit the encoder.
    """

    def __init__(
        self, weights: str, encoder: str = "text_encoder", tokenizer: str = "tokenizer", max_tokens: int = 512
    ):
        super().__init__()
        if max_tokens < 1:
            raise UserError(f"got max_tokens={max_tokens}; expected at least 1: set it, to 512 for Wan's networks")
        parts = f'--include "{encoder}/*" "{tokenizer}/*"'
        path = hub.folder(weights, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", parts)
        vocabulary = hub.file(path / tokenizer / "tokenizer.json", weights)
        self.net = hub.load(UMT5EncoderModel, path / encoder, "auto")
        try:
            # From the file itself: transformers' classes fall back on their own vocabularies where it is missing.
            self.tokenizer = Tokenizer.from_file(str(vocabulary))
        except Exception as error:  # the library raises nothing more specific
            raise UserError(f"{vocabulary} is not a tokenizer ({error}); download it again") from error
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        got, limit = self.tokenizer.get_vocab_size(), self.net.config.vocab_size
        if got > limit:
            raise UserError(
                f"{vocabulary} has {got} tokens; expected at most {limit}, those of the encoder: pass its own tokenizer"
            )
        self.max_tokens = max_tokens

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> tuple[Float[Tensor, "e n d"], Bool[Tensor, "e n"]]:
        """Features in fp32 on the CPU, and a mask that is all True."""
        rows = [self.padded(self._features(prompt)) for prompt in prompts]
        return torch.stack([features for features, _ in rows]), torch.stack([mask for _, mask in rows])

    def padded(self, tokens: Float[Tensor, "m d"]) -> tuple[Float[Tensor, "n d"], Bool[Tensor, " n"]]:
        """Features padded with zeros, and a mask that is all True. Raises UserError for more than `max_tokens`."""
        if len(tokens) > self.max_tokens:
            raise UserError(f"got a text of {len(tokens)} tokens; expected at most {self.max_tokens}: encode it again")
        features = nn.functional.pad(tokens.float(), (0, 0, 0, self.max_tokens - len(tokens)))
        return features, torch.ones(self.max_tokens, dtype=torch.bool)

    def check(self, prompt: str) -> None:
        """Raise UserError for a prompt that is not a string or exceeds `max_tokens`."""
        self._ids(prompt)

    def _features(self, prompt: str) -> Float[Tensor, "m d"]:
        ids = self._ids(prompt)
        device = next(self.net.parameters()).device
        return self.net(torch.tensor([ids], device=device)).last_hidden_state[0].float().cpu()

    def _ids(self, prompt: str) -> list[int]:
        check_prompt(prompt)
        clean = " ".join(html.unescape(html.unescape(prompt)).split())  # as Wan's own code does before the tokenizer
        ids = self.tokenizer.encode(clean).ids
        check_length(prompt, len(ids), self.max_tokens, "tokens", "shorten it; the end counts as one")
        return ids

    @property
    def fingerprint(self) -> str:
        """The weights, tokenizer and settings that features depend on."""
        return f"umt5({self.weights_hash},tokenizer={self._tokenizer_hash},max_tokens={self.max_tokens})"

    @cached_property
    def _tokenizer_hash(self) -> str:
        return hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest()[:16]
