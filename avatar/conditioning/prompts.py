"""Encoded prompts without padding, features in half precision, and a cache of them.

UMT5's features of twenty tokens take 160 kB in this form; padded to 512 tokens in full precision, 8 MB.
"""

from jaxtyping import Shaped
from torch import Tensor

from avatar.protocols import TextEncoder

CAPACITY = 256  # prompts in a cache


def encode_prompt(prompt: str, text: TextEncoder) -> Shaped[Tensor, "m ..."]:
    """The tokens of a prompt without padding. Raises UserError where the encoder rejects it."""
    tokens = strip_padding(text.encode([prompt])[0][0])
    return tokens.half() if tokens.is_floating_point() else tokens


def strip_padding(tokens: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "m ..."]:
    """Tokens without the zeros at their end; `TextEncoder.padded` restores them."""
    return tokens[tokens[..., None].flatten(1).any(dim=1)]


class PromptCache:
    """The tokens of the prompts that were used last. It can be pickled, for the workers of a data loader."""

    def __init__(self, text: TextEncoder):
        self._text, self._cached = text, {}

    def tokens(self, prompt: str) -> Shaped[Tensor, "m ..."]:
        """`encode_prompt`, from the cache where possible."""
        found = self._cached.pop(prompt, None)
        self._cached[prompt] = encode_prompt(prompt, self._text) if found is None else found
        if len(self._cached) > CAPACITY:
            del self._cached[next(iter(self._cached))]  # the least recently used
        return self._cached[prompt]
