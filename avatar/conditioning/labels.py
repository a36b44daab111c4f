"""Labels of latents (state, emotion, gesture): their indices, and the frames that they are taken from."""

from avatar.errors import UserError


def label_index(kind: str, name: str | None, names: tuple[str, ...]) -> int:
    """The index of a label in its vocabulary; None has index 0. Raises UserError for an unknown name."""
    if name is not None and name not in names:
        raise UserError(f"got {kind}={name!r}; choose one of {', '.join(names)}")
    return 0 if name is None else names.index(name)


def label_frames(frames: int, stride: int) -> slice:
    """The middle frame of each latent, whose label is the latent's, on a timeline of `frames` = 1 + s·k frames."""
    return slice(1 + stride // 2, frames, stride)
