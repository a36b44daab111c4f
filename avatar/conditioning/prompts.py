"""Prompts as they are kept: a text encoder's own tokens, without the padding, features in half precision.

UMT5's features of twenty tokens take 160 kB so, and padded to 512 tokens of full precision 8 MB.
"""

from jaxtyping import Shaped
from torch import Tensor

from avatar.protocols import TextEncoder

CAPACITY = 256  # prompts that are remembered


def encode_prompt(prompt: str, text: TextEncoder) -> Shaped[Tensor, "m ..."]:
    """What is kept of a prompt. Raises ValueError where the encoder refuses it."""
    tokens = strip_padding(text.encode([prompt])[0][0])
    return tokens.half() if tokens.is_floating_point() else tokens


def strip_padding(tokens: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "m ..."]:
    """Tokens without the zeros behind them, to be padded as their encoder pads."""
    return tokens[tokens[..., None].flatten(1).any(dim=1)]


class PromptCache:
    """The tokens of prompts that come again and again: those asked for last are not encoded anew."""

    def __init__(self, text: TextEncoder):
        self._text, self._known = text, {}

    def tokens(self, prompt: str) -> Shaped[Tensor, "m ..."]:
        """`tokens_of` a prompt."""
        found = self._known.pop(prompt, None)
        self._known[prompt] = encode_prompt(prompt, self._text) if found is None else found
        if len(self._known) > CAPACITY:
            del self._known[next(iter(self._known))]  # the one not asked for the longest
        return self._known[prompt]
