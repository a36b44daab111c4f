"""Encoded prompts have no padding, and repeated ones are cached."""

import pickle

import torch

from avatar.conditioning import prompts
from avatar.conditioning.prompts import PromptCache, encode_prompt, strip_padding
from avatar.models.text_encoders.bytes import ByteTokenizer


class Features:
    """One number per word, padded to 32; records its prompts."""

    fingerprint = "features"

    def __init__(self):
        self.encoded = []

    def encode(self, texts):
        self.encoded += texts
        rows = [self.padded(torch.tensor([[1 / 3, float(len(word))] for word in text.split()])) for text in texts]
        return torch.stack([row for row, _ in rows]), torch.stack([mask for _, mask in rows])

    def check(self, prompt):
        pass

    def padded(self, tokens):
        return torch.nn.functional.pad(tokens.float(), (0, 0, 0, 32 - len(tokens))), torch.ones(32, dtype=torch.bool)


def test_encoded_prompts_have_no_padding_and_pad_to_the_encoders_output():
    features, ids = encode_prompt("a happy cat", Features()), encode_prompt("a cat", ByteTokenizer(96))
    assert features.shape == (3, 2) and features.dtype == torch.float16
    assert ids.shape == (6,) and ids.dtype == torch.long
    for prompt in ("a cat", ""):
        (expected,), (mask,) = ByteTokenizer(96).encode([prompt])
        padded, known = ByteTokenizer(96).padded(encode_prompt(prompt, ByteTokenizer(96)))
        assert torch.equal(padded, expected) and torch.equal(known, mask)


def test_an_empty_prompt_has_no_tokens():
    assert strip_padding(torch.zeros(0, 4)).shape == (0, 4) and strip_padding(
        torch.zeros(0, dtype=torch.long)
    ).shape == (0,)


def test_repeated_prompts_are_cached_and_the_oldest_are_dropped(monkeypatch):
    monkeypatch.setattr(prompts, "CAPACITY", 2)
    text = Features()
    known = PromptCache(text)
    for prompt in ("a", "b", "a", "c", "a", "b"):
        assert torch.equal(known.tokens(prompt), encode_prompt(prompt, Features()))
    assert text.encoded == ["a", "b", "c", "b"]  # "b" was the least recently used when "c" was encoded
    assert torch.equal(pickle.loads(pickle.dumps(known)).tokens("a"), known.tokens("a"))  # as for spawned workers
