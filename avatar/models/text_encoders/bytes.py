"""Prompts as bytes, in ByT5's numbering: id = byte + 3, and 1 ends a prompt. The backbone's text entrance reads
them."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from avatar.errors import UserError

END, FIRST_BYTE = 1, 3


@dataclass(frozen=True)
class ByteTokenizer:
    """UTF-8 bytes, padded to one length so that prompts of any length stand in one pass.

    Args:
        max_bytes: room for a prompt, its end included.
    """

    max_bytes: int = 64

    def encode(self, prompts: list[str]) -> tuple[Int[Tensor, "e n"], Bool[Tensor, "e n"]]:
        """Ids and mask. An empty prompt says nothing: its mask is False throughout, as that of a dropped one."""
        rows = [self.padded(torch.tensor(self._ids(prompt), dtype=torch.long)) for prompt in prompts]
        return torch.stack([ids for ids, _ in rows]), torch.stack([mask for _, mask in rows])

    def padded(self, tokens: Int[Tensor, " m"]) -> tuple[Int[Tensor, " n"], Bool[Tensor, " n"]]:
        """Ids with zeros behind them, which nothing attends to."""
        if len(tokens) > self.max_bytes:
            raise UserError(
                f"a text of {len(tokens)} ids; room is for {self.max_bytes}: shorten it, or raise max_bytes"
            )
        ids = torch.nn.functional.pad(tokens.long(), (0, self.max_bytes - len(tokens)))
        return ids, ids > 0

    def check(self, prompt: str) -> None:
        """Raise UserError for a prompt that is no text, or longer than there is room for."""
        self._ids(prompt)

    def _ids(self, prompt: str) -> list[int]:
        if not isinstance(prompt, str):
            raise UserError(f"a prompt {prompt!r}, which is no text; put it in quotes")
        ids = [byte + FIRST_BYTE for byte in prompt.encode()] + [END]
        if len(ids) > self.max_bytes:
            raise UserError(
                f"a prompt of {len(ids) - 1} bytes, {prompt[:40]!r}…; room is for {self.max_bytes - 1}: shorten it, or "
                "train with more (text.max_bytes and model.network.text.max_bytes)"
            )
        return ids if prompt else []
