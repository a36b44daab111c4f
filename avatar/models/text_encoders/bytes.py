"""Prompts as bytes, in ByT5's numbering: id = byte + 3, and 1 ends a prompt. The backbone's text entrance reads
them."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

END, FIRST_BYTE = 1, 3


@dataclass(frozen=True)
class ByteEncoder:
    """UTF-8 bytes, padded to one length so that prompts of any length stand in one pass.

    Args:
        max_bytes: room for a prompt, its end included.
    """

    max_bytes: int = 64

    def encode(self, prompts: list[str]) -> tuple[Int[Tensor, "e n"], Bool[Tensor, "e n"]]:
        """Ids and mask. An empty prompt says nothing: its mask is False throughout, as that of a dropped one."""
        ids = torch.zeros(len(prompts), self.max_bytes, dtype=torch.long)
        for row, prompt in zip(ids, prompts, strict=True):
            if not isinstance(prompt, str):
                raise ValueError(f"a prompt {prompt!r}, which is no text; put it in quotes")
            data = [byte + FIRST_BYTE for byte in prompt.encode()] + [END]
            if len(data) > self.max_bytes:
                raise ValueError(
                    f"a prompt of {len(data) - 1} bytes, {prompt[:40]!r}…; room is for {self.max_bytes - 1}"
                )
            if prompt:
                row[: len(data)] = torch.tensor(data)
        return ids, ids > 0
