"""Frozen speech, text and image encoders: features, receptive fields, fingerprints, and strict loading of weights."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil, CLIPVisionModel, PreTrainedTokenizerFast, Wav2Vec2Model

from avatar.conditioning import audio_timeline
from avatar.models import bundle, registry
from avatar.models.audio_encoders.log_mel import LogMel
from avatar.models.audio_encoders.wav2vec2 import Wav2Vec2
from avatar.models.audio_encoders.whisper import Whisper
from avatar.models.audio_encoders.windowed import WindowedEncoder
from avatar.models.image_encoders.clip import CLIP
from avatar.models.text_encoders.umt5 import UMT5
from avatar.nn.embeddings import AudioEmbedder, LayerMix
from avatar.protocols import AudioEncoder, ImageEncoder, TextEncoder
from avatar.streaming.audio_window import AudioWindow
from tests.models import speech_networks
from tests.stages import composed

FRAME, STRIDE = 640, 4
NETWORKS = {"wav2vec2": Wav2Vec2, "hubert": Wav2Vec2, "whisper": Whisper}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, str]:
    """Kind of network → its folder."""
    torch.manual_seed(1)
    kinds = ("wav2vec2", "hubert", "whisper", "umt5", "clip")
    return {kind: getattr(speech_networks, kind)(tmp_path_factory.mktemp(kind)) for kind in kinds}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request, weights):
    return NETWORKS[request.param](weights[request.param])


@pytest.fixture
def encoder(network):
    return windowed(network)


def windowed(network, **changes) -> WindowedEncoder:
    arguments = {"past": 5, "future": 1, "hop_frames": 2, "left_context": 3, "right_context": 1}
    return WindowedEncoder(network, **arguments | changes)


def noise_audio(frames: float) -> torch.Tensor:
    return torch.randn(int(frames * FRAME)) * 0.2


def test_encoders_follow_the_protocol(encoder, weights):
    assert isinstance(encoder, AudioEncoder) and isinstance(UMT5(weights["umt5"], max_tokens=4), TextEncoder)


# Audio


@pytest.mark.parametrize("packet", [97, 640, 3001, 1 << 20])
def test_streamed_features_equal_those_of_the_full_clip_for_every_cut(encoder, packet):
    samples, latents = noise_audio(11.3), 3
    window = AudioWindow(encoder, STRIDE)
    got = torch.cat([*(window.push(part) for part in samples.split(packet)), window.finish()])
    once = AudioWindow(encoder, STRIDE)
    assert torch.equal(got, torch.cat([once.push(samples), once.finish()]))
    frames = latents * STRIDE + encoder.right_context
    full = encoder.encode(torch.nn.functional.pad(samples, (0, 20 * FRAME)))[:frames]
    before = audio_timeline.silent_features(encoder, -encoder.left_context, encoder.left_context)
    expected = encoder.window(torch.cat([before, full]), STRIDE)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_a_hop_depends_exactly_on_its_window(encoder):
    samples, hop_frames = noise_audio(20), slice(10, 12)
    first, last = 10 * FRAME - encoder.left_samples, 12 * FRAME + encoder.lookahead_samples - 1
    plain = encoder.encode(samples)[hop_frames]
    for at, inside in ((first - 1, False), (first + 20, True), (last - 20, True), (last + 1, False)):
        changed = samples.clone()
        changed[at] += 1.0
        assert torch.equal(encoder.encode(changed)[hop_frames], plain) != inside, at


def test_latency_is_the_right_context_up_to_a_hop_and_the_future(encoder):
    window = AudioWindow(encoder, STRIDE)
    samples_needed = window.samples_needed(1)
    # The right context of 1 in a hop of 2, and the future of 1.
    assert samples_needed == (4 + 2 + 1) * FRAME + encoder.network.margins[1]
    samples = noise_audio(12)[:samples_needed]
    assert len(window.push(samples[:-1])) == 0 and len(window.push(samples[-1:])) == 1


def test_features_of_silence_equal_those_of_zero_samples(encoder):
    features = encoder.encode(torch.zeros(20 * FRAME))
    torch.testing.assert_close(features, audio_timeline.silent_features(encoder, 0, 20), rtol=0, atol=1e-5)
    assert (encoder.encode(noise_audio(20)) - features).abs().mean() > 0.1


@pytest.mark.parametrize("first", [-1, 3, -6])
def test_features_of_a_part_of_a_timeline_are_on_its_grid(encoder, first):
    """There is silence before the part, so its features equal those of the full timeline."""
    samples = noise_audio(9)
    timeline = torch.nn.functional.pad(samples, (max(first, 0) * FRAME, 4 * FRAME))[max(0, -first) * FRAME :]
    samples[: max(0, -first) * FRAME] = 0
    got = audio_timeline.features_until(encoder, samples, first)
    available = (first + 9) * FRAME  # samples of the timeline
    assert (
        audio_timeline.samples_needed(encoder, first + len(got))
        <= available
        < audio_timeline.samples_needed(encoder, first + len(got) + 1)
    )
    expected = encoder.encode(timeline)[max(first, 0) : first + len(got)]
    torch.testing.assert_close(got[max(0, -first) :], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("back", [0, 1, 3])
def test_a_rewound_stream_drops_later_samples(encoder, back):
    first, second = noise_audio(5.4 * STRIDE), noise_audio(4 * STRIDE)
    window = AudioWindow(encoder, STRIDE, history=3)
    latents = len(window.push(first))
    window.rewind(latents - back)
    spliced = torch.cat([first[: (latents - back) * STRIDE * FRAME], second])
    fresh = AudioWindow(encoder, STRIDE)
    assert torch.equal(window.push(second), fresh.push(spliced)[latents - back :])


def test_features_are_the_normalised_mean_states_of_each_frame(weights):
    encoder, samples = windowed(Wav2Vec2(weights["wav2vec2"])), noise_audio(20)
    window = samples[(10 - 5) * FRAME - 40 : (12 + 1) * FRAME + 40]
    normal = (window - window.mean()) / (window.var(correction=0) + 1e-7).sqrt()
    net = Wav2Vec2Model.from_pretrained(weights["wav2vec2"]).eval()
    states = torch.stack(net(normal[None], output_hidden_states=True).hidden_states)[:, 0]
    assert states.shape == (3, 2 * (5 + 2 + 1), 16)
    pairs = states[:, 2 * 5 : 2 * 7].unflatten(1, (2, 2)).mean(2)
    expected = torch.nn.functional.layer_norm(pairs, (16,)).transpose(0, 1).flatten(1)
    torch.testing.assert_close(encoder.encode(samples)[10:12], expected, rtol=0, atol=1e-5)
    two_layers = windowed(Wav2Vec2(weights["wav2vec2"]), layers=[2, 0])
    assert two_layers.dim == 32
    torch.testing.assert_close(two_layers.encode(samples)[10:12], torch.cat([expected[:, 32:], expected[:, :16]], 1))


def test_wav2vec2_states_are_centred_on_the_halves_of_a_frame(weights):
    network, frame = Wav2Vec2(weights["hubert"]), 3
    samples = noise_audio(8)[: 7 * FRAME + 80].requires_grad_()
    states = network.net.feature_extractor(samples[None])[0]
    assert network.margins == (40, 40) and states.shape[1] == 14
    for state, centre in ((2 * frame, 160), (2 * frame + 1, 480)):
        (gradient,) = torch.autograd.grad(states[:, state].sum(), samples, retain_graph=True)
        at = gradient.nonzero().flatten() - 40 - frame * FRAME
        assert (at[0], at[-1] + 1) == (centre - 200, centre + 200)


def test_whisper_states_are_centred_on_the_halves_of_a_frame(weights):
    network, frame, samples = Whisper(weights["whisper"]), 3, noise_audio(9)
    changed = samples.clone()
    changed[frame * FRAME + 160] += 0.3

    def states(track):
        before, after = network.margins
        return network(track[None, -before : 8 * FRAME + after])[0, 0]

    moved = (states(changed) - states(samples)).abs().sum(1) > 1e-6
    assert moved.nonzero().flatten().tolist() == [2 * frame - 1, 2 * frame, 2 * frame + 1]


def test_whisper_uses_the_configured_number_of_positions(weights):
    full, short = Whisper(weights["whisper"]), Whisper(weights["whisper"], positions=16)
    assert full(noise_audio(8)[None]).shape == short(noise_audio(8)[None]).shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match="expected at most 8"):
        windowed(short, past=6)
    with pytest.raises(ValueError, match="1 to 40"):
        Whisper(weights["whisper"], positions=41)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hop_frames": 0}, "hop_frames=0"),
        ({"past": 0}, "past=0"),
        ({"left_context": 0}, "left_context=0"),
        ({"layers": [3]}, "0 to 2"),
        ({"layers": []}, "some of"),
    ],
)
def test_invalid_windows_are_rejected(weights, changes, message):
    with pytest.raises(ValueError, match=message):
        windowed(Wav2Vec2(weights["wav2vec2"]), **changes)


def test_a_hop_that_does_not_divide_a_latent_is_rejected(encoder):
    with pytest.raises(ValueError, match="hop of 2 frames with latents of 5"):
        encoder.tokens(5)


@pytest.mark.parametrize("kind", NETWORKS)
def test_audio_configs_build_the_encoder_that_a_bundle_names(weights, kind):
    changes = [f"audio.network.weights={weights[kind]}", "audio.past=5"]
    cfg = composed("train", f"audio_encoder={kind}", *changes)
    config = registry.registered(OmegaConf.to_container(cfg.audio, resolve=True))
    encoder = bundle.Origin({"network": {}, "audio": config}).build_encoder("audio")
    assert encoder.tokens(STRIDE) == 7 and encoder.dim == 3 * 16
    network = NETWORKS[kind](weights[kind])
    assert encoder.fingerprint == windowed(network, future=2, hop_frames=4, right_context=0).fingerprint


def test_the_text_config_builds_the_encoder_that_a_bundle_names(weights):
    cfg = composed("train", "text_encoder=umt5", f"text.weights={weights['umt5']}")
    config = registry.registered(OmegaConf.to_container(cfg.text, resolve=True))
    encoder = bundle.Origin({"network": {}, "text": config}).build_encoder("text")
    assert encoder.fingerprint == UMT5(weights["umt5"]).fingerprint


# Layer mix


def test_the_layer_mix_starts_as_the_mean_and_learns_a_weighted_sum():
    mix, states = LayerMix(3), torch.randn(2, 4, 3 * 5)
    layers = states.unflatten(-1, (3, 5))
    torch.testing.assert_close(mix(states), layers.mean(2))
    with torch.no_grad():
        mix.weights.copy_(torch.tensor([0.0, 20.0, 0.0]))
    torch.testing.assert_close(mix(states), layers[:, :, 1], atol=1e-4, rtol=1e-4)
    mix(states).square().sum().backward()
    assert mix.weights.grad.abs().sum() > 0


def test_single_layer_features_have_no_mix():
    names = {"null", "place", "mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"}
    assert AudioEmbedder(6, 2, 8).state_dict().keys() == names
    assert AudioEmbedder(6, 2, 8, layers=3).state_dict().keys() == names | {"mix.weights"}
    with pytest.raises(ValueError, match="width 6"):
        AudioEmbedder(6, 2, 8, layers=4)


# Text


PROMPTS = ["a happy  orange\ncat", "a cat &amp;amp; a", ""]


def test_prompts_have_the_features_of_their_tokens_and_unmasked_zeros(weights):
    encoder = UMT5(weights["umt5"], max_tokens=12)
    features, mask = encoder.encode(PROMPTS)
    ids = torch.tensor([[3, 4, 5, 6, 1, 0, 0], [3, 6, 7, 3, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0]])
    expected = encoder.net(ids, (ids > 0).long()).last_hidden_state * (ids > 0)[..., None]
    torch.testing.assert_close(features[:, :7], expected, rtol=0, atol=1e-5)
    assert features.shape == (3, 12, 8) and not features[:, 7:].any()
    assert mask.shape == (3, 12) and mask.all()


@pytest.mark.slow  # the import of diffusers' pipelines takes longer than all other tests here
def test_umt5_features_equal_those_of_diffusers(weights):
    from diffusers import WanPipeline

    encoder = UMT5(weights["umt5"], max_tokens=12)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=f"{weights['umt5']}/tokenizer/tokenizer.json", pad_token="<pad>", eos_token="</s>"
    )
    pipeline = SimpleNamespace(tokenizer=tokenizer, text_encoder=encoder.net, _execution_device="cpu")
    expected = WanPipeline._get_t5_prompt_embeds(pipeline, PROMPTS, max_sequence_length=12, dtype=torch.float32)
    torch.testing.assert_close(encoder.encode(PROMPTS)[0], expected, rtol=0, atol=1e-5)


def test_prompts_have_512_tokens_by_default(weights):
    encoder = UMT5(weights["umt5"])
    assert encoder.encode(["a cat"])[0].shape == (1, 512, 8)
    assert encoder.encode(["cat " * 511])[0].shape == (1, 512, 8)
    with pytest.raises(ValueError, match="513 tokens"):
        encoder.encode(["cat " * 512])


def test_stored_features_of_a_prompt_are_restored_exactly(weights):
    encoder = UMT5(weights["umt5"], max_tokens=12)
    features, mask = encoder.encode(["a happy cat"])
    own = features[0][features[0].any(1)]
    assert len(own) == 4
    again, attended = encoder.padded(own)
    assert torch.equal(again, features[0]) and torch.equal(attended, mask[0])
    with pytest.raises(ValueError, match="expected at most 12"):
        encoder.padded(torch.ones(13, 8))


# Images


def test_images_have_the_states_before_the_last_layer(weights):
    encoder, images = CLIP(weights["clip"]), torch.rand(2, 3, 1, 40, 64) * 2.4 - 1.2
    features = encoder.encode(images)
    bytes_ = ((images[:, :, 0].clamp(-1, 1) + 1) * 127.5).round().byte()
    uint8 = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in bytes_]
    processed = CLIPImageProcessorPil.from_pretrained(f"{weights['clip']}/image_processor")(uint8, return_tensors="pt")
    net = CLIPVisionModel.from_pretrained(f"{weights['clip']}/image_encoder").eval()
    states = net.pre_layrnorm(net.embeddings(processed.pixel_values))
    for layer in net.encoder.layers[:2]:
        states = layer(states, attention_mask=None)
    assert isinstance(encoder, ImageEncoder) and features.shape == (2, 5, encoder.dim)
    torch.testing.assert_close(features, states, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="21 channels"):
        encoder.encode(torch.zeros(1, 21, 1, 1, 1))


def test_published_image_encoders_load(weights, tmp_path):
    folder, image = copied(weights["clip"], tmp_path / "w"), torch.rand(1, 3, 1, 28, 28)
    path = folder / "image_encoder" / "model.safetensors"
    save_file({f"vision_model.{name}": tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    moved, there = CLIP(str(folder)), CLIP(weights["clip"])
    assert torch.equal(moved.encode(image), there.encode(image))
    assert moved.fingerprint == there.fingerprint
    settings = folder / "image_processor" / "preprocessor_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"image_mean": [0.1, 0.2, 0.3]}))
    assert CLIP(str(folder)).fingerprint != there.fingerprint


def test_images_of_another_size_are_rejected(tmp_path):
    with pytest.raises(ValueError, match=r"images to 30×30; expected 28×28"):
        CLIP(speech_networks.clip(tmp_path, size=30))


def test_the_image_config_builds_the_encoder_that_a_bundle_names(weights):
    cfg = composed("train", "image_encoder=clip", f"image.weights={weights['clip']}")
    config = registry.registered(OmegaConf.to_container(cfg.image, resolve=True))
    encoder = bundle.Origin({"network": {}, "image": config}).build_encoder("image")
    image = torch.rand(1, 3, 1, 32, 32)
    assert torch.equal(encoder.encode(image), CLIP(weights["clip"]).encode(image))
    assert composed("train").image is None and bundle.Origin({"network": {}}).build_encoder("image") is None


# Weights


def copied(folder: str, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


@pytest.mark.parametrize(
    "build, command",
    [
        (lambda: Wav2Vec2("facebook/no-such-network"), "hf download facebook/no-such-network$"),
        (lambda: Wav2Vec2("/no/such/folder"), "hf download facebook/wav2vec2-base-960h --local-dir /no/such/folder"),
        (lambda: Whisper("tests/nothing"), "hf download openai/whisper-tiny --local-dir tests/nothing"),
        (lambda: CLIP("Wan-AI/none"), r'hf download Wan-AI/none --include "image_encoder/\*" "image_processor/\*"'),
        (lambda: UMT5("Wan-AI/none"), r'hf download Wan-AI/none --include "text_encoder/\*" "tokenizer/\*"'),
    ],
)
def test_missing_weights_name_the_download_command(build, command):
    with pytest.raises(FileNotFoundError, match=command):
        build()


@pytest.mark.parametrize("kind, name", [("wav2vec2", "config.json"), ("whisper", "preprocessor_config.json")])
def test_a_folder_without_a_required_file_is_rejected(weights, tmp_path, kind, name):
    folder = copied(weights[kind], tmp_path / "w")
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"no {name}"):
        NETWORKS[kind](str(folder))


def test_a_missing_or_damaged_tokenizer_is_rejected(weights, tmp_path):
    folder = copied(weights["umt5"], tmp_path / "w")
    (folder / "tokenizer" / "tokenizer.json").rename(folder / "tokenizer" / "other.json")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        UMT5(str(folder))
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizer"):
        UMT5(str(folder))


def test_incomplete_weights_are_rejected(weights, tmp_path):
    folder = copied(weights["wav2vec2"], tmp_path / "w")
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.layers.1.attention.k_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights.*layers\.1\.attention\.k_proj"):
        Wav2Vec2(str(folder))


def test_truncated_weights_are_rejected(weights, tmp_path):
    folder = copied(weights["whisper"], tmp_path / "w")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="no readable weights"):
        Whisper(str(folder))


def test_weights_with_code_are_rejected_and_the_code_does_not_run(weights, tmp_path):
    class Code:
        def __reduce__(self):
            return Path.touch, (tmp_path / "it ran",)

    folder = copied(weights["wav2vec2"], tmp_path / "w")
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Code()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no readable weights"):
        Wav2Vec2(str(folder))
    assert not (tmp_path / "it ran").exists()


def test_another_kind_of_network_is_rejected(weights):
    with pytest.raises(ValueError, match="is a whisper; expected a wav2vec2 or hubert"):
        Wav2Vec2(weights["whisper"])


def test_fingerprints_depend_on_weights_and_settings_but_not_on_paths(weights, tmp_path):
    here, there = Wav2Vec2(weights["wav2vec2"]), Wav2Vec2(str(copied(weights["wav2vec2"], tmp_path / "w")))
    own = windowed(here).fingerprint
    assert own == windowed(there).fingerprint != windowed(here, future=2).fingerprint
    assert (
        own
        == f"windowed({here.fingerprint},past=5,future=1,hop_frames=2,left_context=3,right_context=1,layers=[0,1,2])"
    )
    assert here.fingerprint == f"wav2vec2({here.weights_hash},normalise=True)"
    assert here.fingerprint != Wav2Vec2(weights["hubert"]).fingerprint
    assert UMT5(weights["umt5"]).fingerprint != UMT5(weights["umt5"], max_tokens=226).fingerprint
    assert Whisper(weights["whisper"], positions=16).fingerprint.endswith(",positions=16)")


def test_log_mel_follows_the_same_timing():
    """Its hops are single frames."""
    encoder = LogMel(8)
    samples = noise_audio(9)
    assert torch.equal(audio_timeline.features_until(encoder, samples, -1), encoder.encode(samples)[:-1])
    assert audio_timeline.samples_needed(encoder, 3) == 3 * FRAME + 120 and audio_timeline.receptive_field_frames(
        encoder
    ) == (1, 1)
