"""Checks of prompts that all text encoders share."""

from avatar.errors import UserError


def check_prompt(prompt: object) -> None:
    """Raise UserError for a prompt that is not a string."""
    if not isinstance(prompt, str):
        raise UserError(f"got a prompt {prompt!r}; expected a string: put it in quotes")


def check_length(prompt: str, length: int, limit: int, unit: str, fix: str) -> None:
    """Raise UserError for a prompt of more than `limit` units."""
    if length > limit:
        raise UserError(f"got a prompt of {length} {unit}, {prompt[:40]!r}…; expected at most {limit}: {fix}")
