"""UMT5's encoder (arXiv:2304.09151), the text encoder of Wan's networks.

A prompt becomes the features of its tokens, the end token included, padded with zeros to `max_tokens`; Wan attends to
the padding too, so the mask is all True. Wan was trained with 512. In diffusers' Wan pipelines `__call__` takes 512 and
`encode_prompt` 226 by default, and both truncate longer prompts silently; features of the latter differ, since less
padding is attended to. Here a longer prompt is an error.

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
from avatar.models.text_encoders.prompt import check_prompt, check_room


class UMT5(hub.FrozenNetwork):
    """Prompts → features of UMT5, padded as Wan's networks expect them.

    Args:
        weights: a folder, or a repository's name in the Hugging Face cache, such as a Wan pipeline's.
        encoder, tokenizer: subfolders of the two parts; "." if there are none.
        max_tokens: maximal length of a prompt, its end token included.
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
        """Features in fp32 on the CPU, and a mask that is all True."""
        rows = [self.padded(self._features(prompt)) for prompt in prompts]
        return torch.stack([features for features, _ in rows]), torch.stack([mask for _, mask in rows])

    def padded(self, tokens: Float[Tensor, "m d"]) -> tuple[Float[Tensor, "n d"], Bool[Tensor, " n"]]:
        """Features padded with zeros, all of which are attended to."""
        if len(tokens) > self.max_tokens:
            raise UserError(f"a text of {len(tokens)} tokens; room is for {self.max_tokens}: prepare it anew")
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
        check_room(prompt, len(ids), self.max_tokens, "tokens", "shorten it; its end counts as one")
        return ids

    @property
    def fingerprint(self) -> str:
        """The weights, tokenizer and settings that features depend on."""
        return f"umt5({self.weights_hash},tokenizer={self._tokenizer_hash},max_tokens={self.max_tokens})"

    @cached_property
    def _tokenizer_hash(self) -> str:
        return hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest()[:16]
