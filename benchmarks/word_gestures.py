"""Probe of gestures by words: `python benchmarks/word_gestures.py`.

A small classifier gets the audio that a student with chunks of two latents has when it generates the onset of a gesture
(half a chunk and the look-ahead beyond it, on average), and predicts which gesture the words cause. Its recall shows
what can be learned from the sound. Clips of the held-out split have other sentences and other speakers.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn

from avatar.data.clip_encoding import ClipSet
from avatar.files import write_text
from avatar.models.audio_encoders.log_mel import LogMel
from avatar.provenance import with_provenance
from avatar.puppet.clip import PuppetClip
from avatar.puppet.cues import CUES
from avatar.puppet.scene import Scene
from avatar.types import GESTURES

CLASSES = ("none", *CUES)
HISTORY = 30  # frames of audio: more than a cue and its delay
AHEAD = 4  # frames after the onset, without the encoder's right context: half a chunk
FRAMES = 150  # per clip


class Probe(nn.Module):
    """Classifier of a window of audio features: convolutions over time, then the maximum."""

    def __init__(self, features: int, width: int = 96):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(features, width, 5, padding=2), nn.GELU(), nn.Dropout(0.2),
            nn.Conv1d(width, width, 5, padding=2), nn.GELU(), nn.Dropout(0.2),
            nn.Conv1d(width, width, 5, padding=2), nn.GELU(),
        )  # fmt: skip
        self.out = nn.Linear(2 * width, len(CLASSES))

    def forward(self, windows: Tensor) -> Tensor:
        y = self.layers(windows.transpose(1, 2))
        return self.out(torch.cat([y.amax(2), y.mean(2)], dim=1))


def samples(clip: PuppetClip, audio: LogMel, rng: np.random.Generator) -> list[tuple[Tensor, int]]:
    """The windows before the onsets of gestures that words cause, and of one moment of speech without a gesture."""
    features = audio.encode(torch.from_numpy(clip.own))
    doing = np.array([GESTURES[i] for i in clip.doing])
    ahead = AHEAD + audio.right_context
    frames = range(HISTORY, len(features) - ahead)
    moments = [(i, str(doing[i])) for i in frames if doing[i] != doing[i - 1] and doing[i] in CUES]
    if calm := [i for i in frames if set(doing[i - 25 : i + 25]) == {"none"}]:
        moments.append((int(rng.choice(calm)), "none"))
    return [(features[i + ahead - HISTORY : i + ahead], CLASSES.index(name)) for i, name in moments]


def dataset(split: str, count: int, scene: Scene, cache: Path) -> tuple[Tensor, Tensor]:
    """Windows and classes of the free clips of a split."""
    clips, audio, rng = ClipSet(split, "speaking", count, 1, scene=scene), LogMel(), np.random.default_rng(0)
    rows = []
    for i in track(range(count), f"{count} {split} clips"):
        clip = clips.make(i, FRAMES, cache)
        if not clip.gesture.any():
            rows += samples(clip, audio, rng)
    windows, classes = zip(*rows, strict=True)
    return torch.stack(windows), torch.tensor(classes)


def recalls(predicted: Tensor, classes: Tensor) -> dict[str, float]:
    """Share of each class that is recognised."""
    return {name: (predicted[classes == i] == i).float().mean().item() for i, name in enumerate(CLASSES)}


def main() -> None:
    parser = argparse.ArgumentParser(description="how well the sound of words determines the gesture that they cause")
    parser.add_argument("--train", type=int, default=3000, help="clips to train on, half of them free")
    parser.add_argument("--test", type=int, default=600, help="clips of the test split")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=Path("data/cache/speech"))
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    scene = Scene(framings={"half": 1.0}, cues=0.6, noise=0.3)
    train, test = (
        dataset(split, count, scene, arguments.cache)
        for split, count in (("train", arguments.train), ("test", arguments.test))
    )
    mean, std = train[0].mean((0, 1)), train[0].std((0, 1)) + 1e-3
    probe = Probe(train[0].shape[-1])
    optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-3, weight_decay=0.05)
    weights = 1 / torch.bincount(train[1], minlength=len(CLASSES)).clamp(min=1)
    for _ in track(range(arguments.steps), "training"):
        rows = torch.multinomial(weights[train[1]], 64, replacement=True)
        loss = nn.functional.cross_entropy(probe((train[0][rows] - mean) / std), train[1][rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    probe.eval()
    with torch.no_grad():
        found = recalls(probe((test[0] - mean) / std).argmax(1), test[1])
    measured = {"recall": found, "mean_recall": sum(found.values()) / len(found), "moments": len(test[1])}
    print("  ".join(f"{name} {value:.2f}" for name, value in found.items()))
    print(f"mean recall {measured['mean_recall']:.2f} of {len(CLASSES)} classes, {len(test[1])} moments")
    if arguments.out is not None:
        write_text(arguments.out, with_provenance(measured=measured))


if __name__ == "__main__":
    main()
