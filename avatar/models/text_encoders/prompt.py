"""Checks of prompts that all text encoders share."""

from avatar.errors import UserError


def check_prompt(prompt: object) -> None:
    """Raise UserError for a prompt that is not a string."""
    if not isinstance(prompt, str):
        raise UserError(f"got a prompt {prompt!r}, which is no text; put it in quotes")


def check_room(prompt: str, length: int, room: int, unit: str, fix: str) -> None:
    """Raise UserError for a prompt of more than `room` units."""
    if length > room:
        raise UserError(f"got a prompt of {length} {unit}, {prompt[:40]!r}…; room is for {room}: {fix}")
