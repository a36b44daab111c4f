"""Byte tokenizer with ByT5's ids: id = byte + 3, end of prompt = 1. The backbone embeds the ids."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from avatar.errors import UserError, require_int
from avatar.models.text_encoders.prompt import check_length, check_prompt

END, FIRST_BYTE = 1, 3


@dataclass(frozen=True)
class ByteTokenizer:
    """Text encoder: ids of a prompt's UTF-8 bytes, padded to one length so that a batch can contain any prompts.

    Args:
        max_bytes: maximal number of ids per prompt, the end included.
    """

    max_bytes: int = 64

    def __post_init__(self):
        require_int(1, max_bytes=self.max_bytes)

    @property
    def fingerprint(self) -> str:
        """The settings that ids and masks depend on."""
        return f"byte_text(max_bytes={self.max_bytes})"

    def encode(self, prompts: list[str]) -> tuple[Int[Tensor, "e n"], Bool[Tensor, "e n"]]:
        """Ids and mask. The mask of an empty prompt is all False, as that of a dropped one."""
        rows = [self.padded(torch.tensor(self._ids(prompt), dtype=torch.long)) for prompt in prompts]
        return torch.stack([ids for ids, _ in rows]), torch.stack([mask for _, mask in rows])

    def padded(self, tokens: Int[Tensor, " m"]) -> tuple[Int[Tensor, " n"], Bool[Tensor, " n"]]:
        """Ids padded with zeros, and the mask, False at the padding. Raises UserError for more than `max_bytes`."""
        if len(tokens) > self.max_bytes:
            raise UserError(
                f"got a text of {len(tokens)} ids; expected at most {self.max_bytes}: shorten it or raise max_bytes"
            )
        ids = torch.nn.functional.pad(tokens.long(), (0, self.max_bytes - len(tokens)))
        return ids, ids > 0

    def check(self, prompt: str) -> None:
        """Raise UserError for a prompt that is not a string or exceeds `max_bytes`."""
        self._ids(prompt)

    def _ids(self, prompt: str) -> list[int]:
        check_prompt(prompt)
        ids = [byte + FIRST_BYTE for byte in prompt.encode()] + [END]
        fix = "shorten it, or train with more (text.max_bytes and model.network.text.max_bytes)"
        check_length(prompt, len(ids) - 1, self.max_bytes - 1, "bytes", fix)
        return ids if prompt else []
