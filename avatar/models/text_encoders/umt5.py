"""UMT5's encoder (arXiv:2304.09151), whose features Wan's networks read.

A prompt has the features of its tokens, its end included, and zeros up to `max_tokens`; Wan attends to all of them, the
zeros too, so the mask is True throughout. Wan was trained with 512. Of diffusers' Wan pipelines, `__call__` takes 512
and `encode_prompt` by default 226, and both cut longer prompts without a word: features made by the latter are others,
for fewer zeros are attended to. Here a longer prompt is refused.

An empty prompt has the features of its end: it is what Wan is guided away from.
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
from avatar.models.bundle import fingerprint


class UMT5(nn.Module):
    """Prompts → features of UMT5, padded as Wan's networks want them.

    Args:
        weights: a folder, or a repository's name in the Hugging Face cache, such as a Wan pipeline's.
        encoder, tokenizer: folders in there of the two parts; "." where all is in one.
        max_tokens: room for a prompt, its end included.
    """

    def __init__(
        self, weights: str, encoder: str = "text_encoder", tokenizer: str = "tokenizer", max_tokens: int = 512
    ):
        super().__init__()
        if max_tokens < 1:
            raise UserError(f"max_tokens={max_tokens}; wanted room for a prompt, which is 512 for Wan's networks")
        parts = f'--include "{encoder}/*" "{tokenizer}/*"'
        path = hub.folder(weights, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", parts)
        words = hub.file(path / tokenizer / "tokenizer.json", weights)
        self.net = hub.load(UMT5EncoderModel, path / encoder, "auto")
        try:
            # The file as it is: classes that read it fall back on vocabularies of their own where it isn't there.
            self.tokenizer = Tokenizer.from_file(str(words))
        except Exception as error:  # the library raises nothing more special
            raise UserError(f"{words} is no tokenizer ({error}); get it anew") from error
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        known, wanted = self.tokenizer.get_vocab_size(), self.net.config.vocab_size
        if known > wanted:
            raise UserError(
                f"{words} has {known} words for an encoder of {wanted}; give the tokenizer that belongs to it"
            )
        self.max_tokens = max_tokens

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> tuple[Float[Tensor, "e n d"], Bool[Tensor, "e n"]]:
        """Features in fp32 on the CPU, and a mask that is True throughout."""
        rows = [self.padded(self._features(prompt)) for prompt in prompts]
        return torch.stack([features for features, _ in rows]), torch.stack([mask for _, mask in rows])

    def padded(self, tokens: Float[Tensor, "m d"]) -> tuple[Float[Tensor, "n d"], Bool[Tensor, " n"]]:
        """Features with zeros behind them, all of which are attended to."""
        if len(tokens) > self.max_tokens:
            raise UserError(f"a text of {len(tokens)} tokens; room is for {self.max_tokens}: prepare it anew")
        features = nn.functional.pad(tokens.float(), (0, 0, 0, self.max_tokens - len(tokens)))
        return features, torch.ones(self.max_tokens, dtype=torch.bool)

    def check(self, prompt: str) -> None:
        """Raise UserError for a prompt that is no text, or longer than there is room for."""
        self._ids(prompt)

    def _features(self, prompt: str) -> Float[Tensor, "m d"]:
        ids = self._ids(prompt)
        device = next(self.net.parameters()).device
        return self.net(torch.tensor([ids], device=device)).last_hidden_state[0].float().cpu()

    def _ids(self, prompt: str) -> list[int]:
        if not isinstance(prompt, str):
            raise UserError(f"a prompt {prompt!r}, which is no text; put it in quotes")
        clean = " ".join(html.unescape(html.unescape(prompt)).split())  # as Wan's own code does before the tokenizer
        ids = self.tokenizer.encode(clean).ids
        if len(ids) > self.max_tokens:
            raise UserError(
                f"a prompt of {len(ids)} tokens, {prompt[:40]!r}…; room is for {self.max_tokens}, its end included: "
                "shorten it"
            )
        return ids

    @cached_property
    def _fingerprint(self) -> str:
        words = hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest()[:16]
        return f"{fingerprint(self.net.state_dict())}, {words}"

    def __repr__(self) -> str:
        """All that the features depend on: weights and tokenizer themselves, wherever they lie, and the room."""
        return f"UMT5({self._fingerprint}, max_tokens={self.max_tokens})"
