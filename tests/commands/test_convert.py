"""Conversion of published weights to a bundle, and back to diffusers' layout."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from omegaconf import OmegaConf

from avatar.commands.convert import convert
from avatar.models import bundle
from tests.models.test_wan_weights import difference, network, saved, theirs

BYTES = {"_target_": "avatar.models.text_encoders.bytes.ByteTokenizer"}
CLIP = {"_target_": "avatar.models.image_encoders.clip.CLIP", "weights": "elsewhere"}


def config(**changes):
    base = {
        "model": {
            "_target_": "avatar.models.wan_weights.load",
            "_recursive_": False,
            "weights": None,
            "kind": "teacher",
            "network": network(),
        },
        "audio": {"_target_": "avatar.models.audio_encoders.log_mel.LogMel"},
        "text": {"_target_": "avatar.models.text_encoders.umt5.UMT5", "weights": "elsewhere"},
        "image": None,
        "plan": {"times": [1.0, 0.5]},
        "bundle": None,
        "allow": [],
        "out": None,
    }
    return OmegaConf.merge(base, changes)


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_converted_weights_round_trip(kind, tmp_path):
    weights, path = saved("t2v", tmp_path / "in"), tmp_path / "wan.safetensors"
    convert(config(model={"weights": str(weights), "kind": kind}, out=str(path)))
    net = bundle.load(str(path), kinds=[kind])
    assert difference(net, theirs(), "t2v", 1, 2, 4, 4) < 1e-5
    origin = bundle.origin_of(net)
    assert origin.plan == ({"times": [1.0, 0.5]} if kind == "student" else None)
    assert origin.config["text"]["weights"] == "elsewhere"
    convert(config(bundle=str(path), out=str(tmp_path / "out")))
    again = WanTransformer3DModel.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in theirs().state_dict().items())


def test_files_are_not_overwritten_and_missing_settings_are_rejected(tmp_path):
    weights = str(saved("t2v", tmp_path / "in"))
    taken = tmp_path / "taken.safetensors"
    taken.write_text("mine")
    with pytest.raises(FileExistsError, match="not overwritten"):
        convert(config(model={"weights": weights}, out=str(taken)))
    assert taken.read_text() == "mine"
    with pytest.raises(ValueError, match="no weights to convert"):
        convert(config(out=str(tmp_path / "new.safetensors")))
    with pytest.raises(ValueError, match=r"ends in \.safetensors"):
        convert(config(model={"weights": weights}, out=str(tmp_path / "new")))


@pytest.mark.parametrize(
    "net, encoders, message",
    [
        (network("i2v"), {}, "got no image encoder for a network with an image projection"),
        (network(), {"image": CLIP}, "got an image encoder for a network without an image projection"),
        (network(strides=[4, 8]), {}, "audio of 9 tokens × 160 features for a network that"),
        (network(), {"text": BYTES}, "text as bytes for a model that takes features"),
    ],
)
def test_encoders_that_do_not_fit_the_network_are_rejected(net, encoders, message, tmp_path):
    """Before any weights are read: the paths given here don't exist."""
    cfg = config(model={"weights": str(tmp_path / "none"), "network": net}, out=str(tmp_path / "a.safetensors"))
    cfg.update(encoders)
    with pytest.raises(ValueError, match=message):
        convert(cfg)


def test_image_to_video_weights_are_converted_with_their_image_encoder(tmp_path):
    model = {"weights": str(saved("i2v", tmp_path / "in")), "network": network("i2v")}
    convert(config(model=model, image=CLIP, out=str(tmp_path / "a.safetensors")))
    config_of = bundle.origin_of(bundle.load(str(tmp_path / "a.safetensors"))).config
    assert config_of["image"] == {"name": "clip", "weights": "elsewhere"}
