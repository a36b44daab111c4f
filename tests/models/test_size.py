"""Operations and parameters of every backbone's config, against torch's counter on the meta device."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch.utils.flop_counter import FlopCounterMode

from avatar.diffusion.packing import Bidirectional
from avatar.dry import clip_of, lines
from avatar.models import public, size
from avatar.nn.embeddings import FeatureTextEntrance
from avatar.run import CONFIGS
from avatar.types import Conditioning
from tests.conftest import make_net

AUTOENCODERS = ("causal_conv", "small_decoder")
BACKBONES = [path.stem for path in Path(CONFIGS, "model").glob("*.yaml") if path.stem not in AUTOENCODERS]
BILLIONS = {"wan_1_3b": 1.42, "wan_5b": 5.0, "wan_14b": 14.29, "dit_20b": 20.4}  # Wan's part; all of the last


def on_meta(name: str, *overrides: str):
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        cfg = compose("train", overrides=["folder=/tmp/run", "name=test", f"model={name}", *overrides])
    with torch.device("meta"):
        return instantiate(cfg.model)


def counted(net, clip: size.Clip) -> int:
    """What torch counts in a bidirectional pass over such a clip."""
    b, l, tokens = 1, clip.latents, clip.text_tokens
    features = isinstance(net.text, FeatureTextEntrance)
    with torch.device("meta"):
        nothing = torch.zeros(b, l, dtype=torch.long)
        cond = Conditioning(
            reference=torch.zeros(b, net.channels, 1, clip.height, clip.width),
            audio=torch.zeros(b, 2, l, net.audio.tokens, net.audio.features),
            audio_mask=torch.ones(b, 2, l, dtype=torch.bool),
            text=torch.zeros(b, 1, tokens, net.text.features) if features else nothing.new_zeros(b, 1, tokens),
            text_mask=torch.ones(b, 1, tokens, dtype=torch.bool),
            text_event=nothing,
            state=nothing,
            emotion=nothing,
            emotion_intensity=torch.zeros(b, l),
            gesture=nothing,
        )
        x = torch.zeros(b, net.channels, l, clip.height, clip.width)
        with FlopCounterMode(display=False) as counter:
            Bidirectional().velocity(net, x, torch.zeros(b, l), cond, x)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", BACKBONES)
def test_operations_are_those_that_torch_counts(name):
    clip = size.Clip(latents=3, height=8, width=12, text_tokens=96)
    net = on_meta(name)
    assert size.forward_flops(net, clip) == pytest.approx(counted(net, clip), rel=0.01)


@pytest.mark.parametrize("change", ["audio_injection=addition", "reference_channels=false"])
def test_options_are_counted_too(change):
    clip = size.Clip(latents=2, height=4, width=4, text_tokens=16)
    net = on_meta("wan_1_3b", f"model.network.{change}")
    assert size.forward_flops(net, clip) == pytest.approx(counted(net, clip), rel=0.001)
    assert size.forward_flops(net, clip) != size.forward_flops(on_meta("wan_1_3b"), clip)


@pytest.mark.parametrize("name, billions", BILLIONS.items())
def test_sizes_are_what_their_names_say(name, billions):
    net = on_meta(name)
    names = public.names_of(net)
    wan = sum(p.numel() for n, p in net.named_parameters() if n in names)
    assert (size.parameters(net) if name == "dit_20b" else wan) / 1e9 == pytest.approx(billions, rel=0.01)
    assert {p.device.type for p in net.parameters()} == {"meta"}


def test_parameters_are_counted_once_each():
    net = make_net()
    assert size.parameters(net) == sum(len(p.flatten()) for p in net.state_dict().values())
    assert size.training_bytes(net) == 16 * size.parameters(net)


def test_the_report_fits_a_terminal_and_refuses_no_clip():
    told = lines(on_meta("dit_20b"), size.Clip(20, 60, 104, 512))
    assert dict(told)["parameters"].startswith("20.4 G")
    assert max(len(value) for _, value in told) < 60
    with pytest.raises(ValueError, match="at least 1"):
        size.Clip(0, 60, 104, 512)


@pytest.mark.parametrize("world, latents", [("wan21", (20, 60, 104)), ("wan22", (20, 30, 52)), ("ltx", (10, 15, 26))])
def test_a_clip_of_pixels_has_the_latents_of_its_world(world, latents):
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        cfg = compose("train", overrides=["folder=/tmp/run", "name=test", f"world={world}", "trainer=dry"])
    assert clip_of(**cfg.trainer) == size.Clip(*latents, text_tokens=512)
    with pytest.raises(ValueError, match="80 frames of 480×830 pixels"):
        clip_of(**{**cfg.trainer, "width": 830})
