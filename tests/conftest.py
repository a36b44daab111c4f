"""Fixtures shared by all tests: seeds, small networks and conditioning, control of runtime shape checks."""

import importlib
import sys

import jaxtyping
import pytest
import torch

from avatar.models.video_dit import VideoDiT
from avatar.nn.embeddings import ByteTextEncoder
from avatar.types import Conditioning

CHANNELS, FEATURES, AUDIO_TOKENS = 3, 5, 2


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def unchecked():
    """Disable runtime checks of annotations, as for users: they may fail first, and they evaluate properties early."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def compilable(monkeypatch):
    """A function that imports a module of the project without shape checks, which can't be compiled
    (pytorch#122093)."""
    for name in [name for name in sys.modules if name.split(".")[0] == "avatar"]:
        monkeypatch.delitem(sys.modules, name)
    unhooked = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("jaxtyping")]
    monkeypatch.setattr(sys, "meta_path", unhooked)
    yield importlib.import_module
    for name in [name for name in sys.modules if name.split(".")[0] == "avatar"]:
        del sys.modules[name]  # monkeypatch restores the former ones


def make_net(**changes) -> VideoDiT:
    """A tiny backbone with random weights everywhere: zero-initialised layers would hide errors."""
    arguments = {
        "channels": CHANNELS,
        "dim": 24,
        "ffn": 32,
        "heads": 2,
        "layers": 2,
        "patch": 2,
        "audio_features": FEATURES,
        "audio_tokens": AUDIO_TOKENS,
    }
    net = VideoDiT(**arguments | changes, text=ByteTextEncoder(24, width=8, layers=1, max_bytes=16))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return net.eval()


def make_cond(batch: int = 2, latents: int = 5, events: int = 1, size: int = 4) -> Conditioning:
    """Random conditioning with all fields set."""
    return Conditioning(
        reference=torch.randn(batch, CHANNELS, 1, size, size),
        audio=torch.randn(batch, 2, latents, AUDIO_TOKENS, FEATURES),
        audio_mask=torch.rand(batch, 2, latents) > 0.3,
        text=torch.randint(3, 259, (batch, events, 6)),
        text_mask=torch.arange(6).expand(batch, events, 6) < 4,
        text_event=torch.arange(latents).expand(batch, latents) * events // latents,
        state=torch.randint(0, 4, (batch, latents)),
        emotion=torch.randint(0, 6, (batch, latents)),
        emotion_intensity=torch.rand(batch, latents),
        gesture=torch.randint(0, 8, (batch, latents)),
    )


@pytest.fixture
def net() -> VideoDiT:
    return make_net()


@pytest.fixture
def cond() -> Conditioning:
    return make_cond()


def pytest_collection_modifyitems(items) -> None:
    """Run the longest test first, so that the test processes end at about the same time."""
    items.sort(key=lambda item: item.path.name != "test_chain.py")
