"""Encoders are identified by their weights, not by the path of the weights on the training machine."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import wavfile

from avatar.commands import infer
from avatar.commands.evaluate import evaluate
from avatar.errors import UserError
from avatar.models import bundle
from avatar.models.audio_encoders.wav2vec2 import Wav2Vec2
from avatar.models.audio_encoders.windowed import WindowedEncoder
from tests.models import speech_networks
from tests.stages import FILTERS, SMALL_NET, composed, fitted, plain, random_autoencoder, random_bundle

pytestmark = [pytest.mark.filterwarnings(text) for text in FILTERS]
CONTEXT = ("past=4", "future=1", "left_context=1")
NET = ("model.network.audio_features=48", "model.network.audio_tokens=5", "model.network.audio_layers=3")


def encoder(weights: Path) -> tuple[str, ...]:
    """Overrides for a run with the speech network of a folder."""
    chosen = (
        "audio_encoder=wav2vec2",
        f"audio.network.weights='{weights}'",
        *(f"audio.{part}" for part in CONTEXT),
    )
    return (*chosen, *NET)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(1)
    return Path(speech_networks.wav2vec2(tmp_path_factory.mktemp("trained")))


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> Path:
    """The same architecture with other weights."""
    torch.manual_seed(2)
    return Path(speech_networks.wav2vec2(tmp_path_factory.mktemp("others")))


@pytest.fixture
def moved(weights, tmp_path) -> Path:
    """Another path of the same weights, as after copying them to this machine."""
    (tmp_path / "moved").symlink_to(weights)
    return tmp_path / "moved"


@pytest.fixture(scope="module")
def student(weights, tmp_path_factory) -> tuple[Path, Path]:
    """A student that was trained with weights from a folder that no longer exists, and its autoencoder."""
    folder = tmp_path_factory.mktemp("bundles")
    audio = plain(composed("train", *encoder(folder / "gone")).audio)
    known = WindowedEncoder(Wav2Vec2(str(weights)), past=4, future=1, left_context=1).fingerprint
    changes = {"audio": audio, "components": {"audio": known}}
    made = random_bundle(folder / "student.safetensors", "student", "latent.channels=4", *NET, **changes)
    return made, random_autoencoder(folder / "autoencoder.safetensors")


def test_moved_weights_are_accepted_and_others_are_rejected(weights, moved, others, tmp_path):
    small = (*SMALL_NET, "steps=1")
    teacher = fitted("train", tmp_path / "a", *small, *encoder(weights))
    assert bundle.read(teacher).components["audio"].startswith("windowed(wav2vec2(")
    further = ("objective=teacher_forcing", f"teacher='{teacher}'", "steps=1")
    assert fitted("distill", tmp_path / "b", *further, *encoder(moved)).exists()
    with pytest.raises(ValueError, match=r"teacher was trained with the audio encoder .* but got"):
        fitted("distill", tmp_path / "c", *further, *encoder(others))

    scores = [
        "autoencoder=states",
        f"student='{teacher}'",
        "teacher=null",
        "clips=2",
        "latents=2",
        "reference_motion=0",
        "control=0",
    ]
    place = [f"folder='{tmp_path}/scores'", f"cache='{tmp_path}/cache'", "threads=1", "workers=0"]
    evaluate(composed("evaluate", *scores, *place, f"weights.audio='{moved}'", "teacher_sampler.steps=1"))
    assert (tmp_path / "scores" / "report.md").exists()


def infer_video(student: tuple[Path, Path], folder: Path, *arguments: str) -> Path:
    wavfile.write(folder / "a.wav", 16_000, np.zeros(8_000, np.int16))
    trained, autoencoder = student
    given = [f"student='{trained}'", f"autoencoder.path='{autoencoder}'", f"audio='{folder}/a.wav'"]
    infer.infer(composed("infer", *given, f"out='{folder}/a.mp4'", f"folder='{folder}'", "threads=1", *arguments))
    return folder / "a.mp4"


def test_a_student_streams_with_the_weights_of_this_machine(student, moved, tmp_path):
    assert infer_video(student, tmp_path, f"weights.audio='{moved}'").stat().st_size > 0


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ([], FileNotFoundError, r"no weights .*gone, .*; or give the path on this machine: weights\.audio=FOLDER"),
        (["weights.audio='{others}'"], ValueError, "the student was trained with the audio encoder .* but got"),
        (["weights.audio='{tmp}/nothing'"], FileNotFoundError, "no weights .*nothing"),
        (["weights.audio='{others}'", "weights.text=/data/umt5"], ValueError, "but got windowed"),
        (
            ["weights.audio='{moved}'", "weights.text=/data/umt5"],
            ValueError,
            "byte_tokenizer, which has none; leave it out",
        ),
        (
            ["weights.audio='{moved}'", "weights.image=/data/clip"],
            ValueError,
            "weights.image=/data/clip, for a student without image encoder; leave it out",
        ),
    ],
)
def test_missing_or_other_weights_are_reported(student, moved, others, tmp_path, arguments, error, message):
    given = [argument.format(moved=moved, others=others, tmp=tmp_path) for argument in arguments]
    with pytest.raises(error, match=message):
        infer_video(student, tmp_path, *given)
    assert not list(tmp_path.glob("*.mp4"))


def test_damaged_weights_are_reported(student, weights, tmp_path):
    for file in weights.iterdir():
        (tmp_path / "w").mkdir(exist_ok=True)
        content = file.read_bytes()
        (tmp_path / "w" / file.name).write_bytes(
            content[: len(content) // 2] if "safetensors" in file.name else content
        )
    with pytest.raises(UserError, match="has no readable weights of a Wav2Vec2Model"):
        infer_video(student, tmp_path, f"weights.audio='{tmp_path}/w'")
