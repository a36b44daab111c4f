"""Invalid settings and files are reported in one line, before anything is encoded, trained or written."""

import json
import os
import pickle
import sys
from pathlib import Path

import hydra
import pytest
import torch
from safetensors.torch import save_file

from avatar import cli
from avatar.commands import evaluate
from avatar.data.bucketing import LengthBuckets
from avatar.data.shard_index import Filters, Index
from avatar.data.shard_reader import check_captions
from avatar.data.tar import TarReader
from avatar.files import load_tensors, short_error
from avatar.models import bundle, weight_files
from avatar.models.audio_encoders.log_mel import LogMel
from avatar.models.audio_encoders.wav2vec2 import Wav2Vec2
from avatar.models.autoencoders.causal_conv import CausalConvAutoencoder
from avatar.models.text_encoders.bytes import ByteTokenizer
from avatar.models.text_encoders.umt5 import UMT5
from avatar.models.transforms.activation_checkpointing import ActivationCheckpointing
from avatar.models.transforms.compile import Compiled
from avatar.models.transforms.lora import LoRA
from avatar.models.video_dit import VideoDiT
from avatar.nn.embeddings import ByteTextEncoder, ImageProjection, TextProjection
from avatar.process import bf16_cost
from avatar.puppet.worlds import PixelWorld
from avatar.training import checks, fit, run_checkpoint
from tests.conftest import CHANNELS, make_net
from tests.data.shard_sets import sample, write_set
from tests.data.test_shard_clips import data as shard_clips
from tests.models import speech_networks
from tests.stages import ANY_DATA, FILTERS, SMALL_NET, TINY, composed, fitted, random_bundle

pytestmark = [pytest.mark.filterwarnings(text) for text in FILTERS]
LIPS = "objective.region_weights.lips=0.0"
ROOT = Path(__file__).parents[1]


class Code:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def error_line(monkeypatch, capsys, tmp_path, script: str, task, *arguments: str) -> str:
    """Run a command that fails, and return its error line; assert that nothing was encoded or trained."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    quiet = ("hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.output_subdir=null")
    place = [f"folder='{tmp_path}/run'", f"cache='{tmp_path}/cache'", f"hydra.run.dir='{tmp_path}/hydra'", "threads=1"]
    monkeypatch.setattr(sys, "argv", [script, *arguments, *place, *quiet])
    with pytest.raises(SystemExit) as stop:
        cli.main(script, task)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1, message
    assert not (tmp_path / "cache").exists() and not (tmp_path / "run" / "config.yaml").exists()
    return message


@pytest.mark.parametrize(
    "mistake, message",
    [
        ("model.network.patch=2", "latents of 1×1; expected multiples of the patch size 2"),
        ("model.network.text.max_bytes=64", "prompts of 96 bytes for a model that takes 64; set text.max_bytes"),
        ("data.train.latents=x", "latents=x; expected an integer"),
        ("objective.optimizer.lr=fast", "can't build an optimiser"),
        ("accumulate=2", "set buckets.batch_multiple_of=2"),
        ("trainer.max_epochs=2", "expected 1, of `steps` batches: raise steps"),
        ("accumulate=2 data.buckets.batch_multiple_of=2 data.buckets.accumulate=1", "set both by accumulate=2"),
        ("stepz=1", "Could not override 'stepz': there is no such setting; --cfg job shows all settings"),
        ("resume=nothing.ckpt", "'nothing.ckpt'; give a .ckpt from this run's checkpoints folder"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_training_run_with_invalid_settings_does_not_start(monkeypatch, capsys, tmp_path, mistake, message):
    assert message in error_line(monkeypatch, capsys, tmp_path, "train", fit.fit, *TINY, *SMALL_NET, *mistake.split())


@pytest.mark.parametrize("transform", [LoRA(2, 2), ActivationCheckpointing(), Compiled()])
def test_an_autoencoder_takes_no_transforms(transform):
    with pytest.raises(ValueError, match=r"CausalConvAutoencoder has no blocks to transform.*leave out transforms="):
        transform(CausalConvAutoencoder(4, (4, 4)))


def test_an_evaluation_with_another_autoencoder_is_rejected(monkeypatch, capsys, tmp_path):
    student = random_bundle(tmp_path / "student.safetensors", "student", "latent.channels=4")
    arguments = ["autoencoder=states", f"student='{student}'", "teacher=null", "clips=2", "latents=2", "workers=0"]
    message = error_line(monkeypatch, capsys, tmp_path, "evaluate", evaluate.evaluate, *arguments)
    assert "a network for latents of 4 channels with an autoencoder of 84" in message


def test_slow_bf16_is_reported():
    assert checks.precision_note("bf16-mixed", 0.6) is None
    message = checks.precision_note("bf16-mixed", 24.0)
    assert message is not None and message.startswith("trainer.precision=bf16-mixed, but this CPU takes about 24 times")
    assert 0.01 < bf16_cost(64, 2) < 10_000


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_only_runs_in_bf16_report_it(precision, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fit, "bf16_cost", lambda: 24.0)
    fitted("train", tmp_path / "run", f"trainer.precision={precision}", "steps=1")
    assert ("trainer.precision=32-true is faster" in capsys.readouterr().out) == (precision == "bf16-mixed")


def test_a_window_longer_than_the_clips_is_reported():
    assert checks.window_note(8, [3, 8]) is None
    message = checks.window_note(20, [3, 8])
    assert message is not None and message.startswith("plan.window=20 latents, but training clips have at most 8")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"heads": 5}, "dim=24 for 5 heads; expected a multiple"),
        ({"heads": 8}, "3 channels per attention head; expected an even number"),
        ({"heads": 0}, "heads=0; expected an integer of at least 1"),
        ({"layers": 0}, "layers=0; expected"),
        ({"patch": 0}, "patch=0; expected"),
        ({"audio_features": 7, "audio_layers": 2}, "audio features of width 7 for 2 layers"),
    ],
)
def test_a_network_of_invalid_sizes_is_rejected(changes, message):
    with pytest.raises(ValueError, match=message):
        make_net(**changes)


def test_a_text_embedder_of_another_width_is_rejected():
    sizes = {"channels": 3, "dim": 24, "ffn": 8, "heads": 2, "layers": 1, "patch": 1}
    for text in (ByteTextEncoder(16, width=8, layers=1), TextProjection(5, 16)):
        with pytest.raises(ValueError, match="text of width 16 for a network of width 24"):
            VideoDiT(**sizes, audio_features=5, audio_tokens=2, text=text)
    with pytest.raises(ValueError, match=r"width=8, layers=2, heads=3 .* a multiple of the heads"):
        ByteTextEncoder(24, width=8, heads=3)


def test_an_image_projection_of_another_width_is_rejected():
    with pytest.raises(ValueError, match="image of width 48 for a network of width 24"):
        make_net(image=ImageProjection(16, 48))


@pytest.mark.usefixtures("unchecked")
def test_an_autoencoder_of_other_strides_is_rejected():
    target = "avatar.models.autoencoders.causal_conv.CausalConvAutoencoder"
    autoencoder = bundle.new({"_target_": target, "channels": CHANNELS, "widths": [4, 4]})
    audio = LogMel(mels=4)
    net = make_net(audio_features=audio.dim, audio_tokens=audio.tokens(4), strides=[4, 8])
    net.check_inputs(autoencoder, audio, None)
    net.strides = None
    net.check_inputs(autoencoder, audio, None)
    net.strides = (4, 16)
    with pytest.raises(
        ValueError, match=r"4 frames of 16×16 pixels with an autoencoder of 4 of 8×8; .*autoencoder=wan22"
    ):
        net.check_inputs(autoencoder, audio, None)
    for strides in ([4], [4, 0], [4, "8"]):
        with pytest.raises(ValueError, match=r"strides=.*such as \[4, 8\]"):
            make_net(strides=strides)


IDS, FEATURES = torch.ones(1, 16, dtype=torch.long), torch.ones(1, 16, 5)


def test_inputs_of_wrong_shapes_are_rejected():
    net = make_net(audio_features=6, audio_layers=3)
    net.check_shapes(3, IDS, [(2, 4)])
    with pytest.raises(ValueError, match=r"of 2 layers for a network that mixes 3; set model.network.audio_layers=2"):
        net.check_shapes(2, IDS, [(2, 4)])
    make_net().check_shapes(5, IDS, [])  # without a mix, the states of all layers are one feature
    with pytest.raises(ValueError, match="features for a model that takes bytes"):
        net.check_shapes(3, FEATURES, [])
    with pytest.raises(ValueError, match="17 bytes for a model that takes 16"):
        net.check_shapes(3, IDS.new_ones(1, 17), [])
    with pytest.raises(ValueError, match="latents of 2×3; expected multiples of the patch size 2"):
        net.check_shapes(3, IDS, [(2, 4), (2, 3)])
    projection = TextProjection(5, 24)
    projection.check(FEATURES)
    for invalid, message in ((IDS, "text as bytes"), (FEATURES[..., :4], "features of width 4")):
        with pytest.raises(ValueError, match=f"{message} for a model that takes features of width 5"):
            projection.check(invalid)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"max_latents_per_batch": "lots"}, "max_latents_per_batch=lots"),
        ({"lengths": (1, "many")}, r"lengths\[1\]=many"),
        ({"batch_multiple_of": 1.5}, "batch_multiple_of=1.5"),
        ({"accumulate": None}, "accumulate=None"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_batch_settings_other_than_integers_are_rejected(changes, message):
    with pytest.raises(ValueError, match=rf"buckets\.{message}; expected integers"):
        LengthBuckets(**{"lengths": (1, 2), "weights": (1.0, 1.0), "max_latents_per_batch": 8} | changes)


@pytest.mark.usefixtures("unchecked")
def test_other_invalid_sizes_are_rejected():
    for size in (0, "big"):
        with pytest.raises(ValueError, match=f"frames of {size} pixels"):
            PixelWorld(size)
    with pytest.raises(ValueError, match="at least two widths"):
        CausalConvAutoencoder(4, (8,))
    with pytest.raises(ValueError, match="channels=0"):
        CausalConvAutoencoder(0, (8, 8))
    with pytest.raises(ValueError, match=r"a video of 10 frames .*takes 1 \+ 4k frames"):
        CausalConvAutoencoder(4, (8, 8)).start_from(torch.zeros(1, 3, 10, 8, 8))


@pytest.mark.parametrize("name", ["a.pt", "a.ckpt", "folder"])
def test_pickled_code_is_reported_and_never_run(tmp_path, name):
    ran, path = tmp_path / "ran", tmp_path / name
    code = Code(f"touch '{ran}'")
    if name == "folder":
        speech_networks.wav2vec2(path)
        (path / "model.safetensors").unlink()
        torch.save({"weight": code}, path / "pytorch_model.bin")
    else:
        torch.save({"generator": code, "state_dict": {"weight": code}}, path)
    read = {
        "a.pt": weight_files.open_weights,
        "a.ckpt": run_checkpoint.read_shapes,
        "folder": lambda path: Wav2Vec2(str(path)),
    }
    with pytest.raises(ValueError, match=r"it contains code: posix\.system"):
        read[name](path)
    assert not ran.exists()


def test_errors_do_not_repeat_advice_to_run_pickled_code():
    message = short_error(
        pickle.UnpicklingError("Weights only load failed. … likely succeed, … GLOBAL os.system whose …")
    )
    assert message == "it contains code: os.system"
    assert short_error(ValueError("line one\n  line two")) == "line one line two"


@pytest.mark.parametrize("content", [b"", b"\x10\0\0\0\0\0\0\0{", "half"])
def test_a_damaged_safetensors_file_is_rejected(tmp_path, content):
    path = tmp_path / "a.safetensors"
    if content == "half":
        save_file({"a": torch.zeros(99)}, path)
        content = path.read_bytes()[:200]
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a checkpoint of a training run"):
        run_checkpoint.read_shapes(path)
    with pytest.raises(ValueError, match=r"not a readable safetensors file .*delete .*; it is then created again"):
        load_tensors(path, ["a"])


def test_a_cache_file_with_other_tensors_is_rejected(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert load_tensors(tmp_path / "a.safetensors", ["a"]).keys() == {"a"}
    with pytest.raises(ValueError, match=r"contains a; expected b, c; delete .*; it is then created again"):
        load_tensors(tmp_path / "a.safetensors", ["b", "c"])


def test_a_caption_that_is_too_long_is_rejected_before_training(tmp_path):
    def make(key, *size):
        return sample(key, *size) | ({"txt": "ü" * 50} if key.endswith("train-2") or key.endswith("002") else {})

    folder = write_set(tmp_path / "set", {"train": 4, "dev": 2}, make=make)
    message = (
        r"train-set-002 of .*train-000000\.tar: got a prompt of 100 bytes, .*; expected at most 95.*data\.on_error=skip"
    )
    with pytest.raises(ValueError, match=message):
        shard_clips(folder)
    shard_clips(folder, on_error="skip")
    shard_clips(folder, text=ByteTokenizer(101))


def test_captions_in_the_index_are_not_read_from_shards(tmp_path, monkeypatch):
    """On a network disk, reading all shards would take hours."""
    folder = write_set(tmp_path / "set", {"train": 2, "dev": 1})
    path = folder / "index.json"
    index = json.loads(path.read_text())
    monkeypatch.setattr(TarReader, "read", lambda *_: pytest.fail("a shard was read"))

    def check(text) -> None:
        path.write_text(json.dumps(index))
        check_captions(Index(str(folder)).entries("train", Filters(None, "keep")), text)

    for part in index["shards"]:
        for entry in part["samples"]:
            entry["caption"] = "ü" * 50
    check(ByteTokenizer(101))
    with pytest.raises(ValueError, match=r"train-set-000 of .*a prompt of 100 bytes"):
        check(ByteTokenizer(96))
    for part in index["shards"]:
        for entry in part["samples"]:
            del entry["caption"]
    index["config"] = {"encoders": {"text_features": ByteTokenizer(96).fingerprint}}
    check(ByteTokenizer(96))


@pytest.mark.usefixtures("unchecked")
def test_an_unusable_data_set_leaves_the_run_folder_unused(monkeypatch, capsys, tmp_path):
    folder = write_set(tmp_path / "set", {"train": 2, "dev": 1})
    data = ("data=shards", f"data.urls='{folder}'", "data.buckets.lengths=[2]", "data.buckets.weights=[1]")
    message = error_line(monkeypatch, capsys, tmp_path, "train", fit.fit, *ANY_DATA, *SMALL_NET, *data, LIPS)
    assert "has latents of autoencoder" in message


def test_an_autoencoder_is_trained_by_one_process_only():
    data = hydra.utils.instantiate(composed("train", "data=frames", "objective=autoencoder").data)
    data.check(1)
    with pytest.raises(ValueError, match=r"got 2 ranks.*trainer\.devices=1"):
        data.check(2)


def test_a_prompt_that_is_too_long_is_rejected_before_training(tmp_path):
    text = UMT5(speech_networks.umt5(tmp_path / "umt5"), max_tokens=4)
    text.check("a cat speaking")
    with pytest.raises(ValueError, match=r"a prompt of 5 tokens.*expected at most 4"):
        text.check("a cat is speaking")
    folder = write_set(tmp_path / "set", {"train": 1, "dev": 1})
    with pytest.raises(ValueError, match=r"train-set-000 of .*a prompt of \d tokens"):
        check_captions(shard_clips(folder).entries["train"], text)
