"""Wan checkpoints: parity with diffusers' transformer on random weights, loading of every layout, and export."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from avatar.models import wan_weights
from avatar.nn.masks import FullView
from avatar.types import Conditioning

TEXT, IMAGE, TOKENS = 10, 12, 512  # diffusers hard-codes Wan's 512 text tokens in its image branch
TINY = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "ffn_dim": 48, "text_dim": TEXT}
VARIANTS = {
    "t2v": {"in_channels": 4, "out_channels": 4},
    "i2v": {"in_channels": 9, "out_channels": 4, "image_dim": IMAGE, "added_kv_proj_dim": 32},
    "ti2v": {"in_channels": 6, "out_channels": 6},
}


def network(variant: str = "t2v", **changes) -> dict:
    sizes = VARIANTS[variant]
    config = {
        "_target_": "avatar.models.video_dit.VideoDiT",
        "channels": sizes["out_channels"],
        "extra_in_channels": sizes["in_channels"] - sizes["out_channels"],
        "dim": 32,
        "ffn": 48,
        "heads": 2,
        "layers": 2,
        "patch": 2,
        "audio_features": 5,
        "audio_tokens": 3,
        "text": {"_target_": "avatar.nn.embeddings.TextProjection", "features": TEXT, "dim": 32},
    }
    if "image_dim" in sizes:
        config["image"] = {"_target_": "avatar.nn.embeddings.ImageProjection", "features": IMAGE, "dim": 32}
    return config | changes


def theirs(variant: str = "t2v") -> WanTransformer3DModel:
    torch.manual_seed(3)
    model = WanTransformer3DModel(**TINY, **VARIANTS[variant]).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too: initial zeros and ones would hide errors
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def saved(variant: str, folder: Path, shards: int = 1) -> Path:
    theirs(variant).save_pretrained(folder, max_shard_size="40KB" if shards > 1 else "5GB")
    return folder


def conditioning(variant: str, batch: int, latents: int, height: int, width: int) -> Conditioning:
    sizes = VARIANTS[variant]
    extra = sizes["in_channels"] - sizes["out_channels"]
    return Conditioning(
        reference=torch.randn(batch, sizes["out_channels"], 1, height, width),
        audio=torch.randn(batch, 2, latents, 3, 5),
        audio_mask=torch.rand(batch, 2, latents) > 0.5,
        text=torch.randn(batch, 1, TOKENS, TEXT),
        text_mask=torch.ones(batch, 1, TOKENS, dtype=torch.bool),
        text_event=torch.zeros(batch, latents, dtype=torch.long),
        state=torch.randint(0, 4, (batch, latents)),
        emotion=torch.randint(0, 6, (batch, latents)),
        emotion_intensity=torch.rand(batch, latents),
        gesture=torch.randint(0, 8, (batch, latents)),
        image=torch.randn(batch, 7, IMAGE) if "image_dim" in sizes else None,
        concat_latents=torch.randn(batch, extra, latents, height, width) if extra else None,
    )


@torch.no_grad()
def difference(net, model: WanTransformer3DModel, variant: str, batch: int, latents: int, height: int, width: int):
    """The largest difference between the outputs of the two networks, relative to the largest output."""
    cond = conditioning(variant, batch, latents, height, width)
    x = torch.randn(batch, net.channels, latents, height, width)
    per_latent = variant == "ti2v"
    t = torch.rand(batch, latents) if per_latent else torch.rand(batch, 1).expand(batch, latents)
    ours = net(x, t, cond, FullView(torch.arange(latents)))
    tokens = (height // 2) * (width // 2)
    expected = model(
        hidden_states=x if cond.concat_latents is None else torch.cat([x, cond.concat_latents], 1),
        timestep=1000 * (t.repeat_interleave(tokens, 1) if per_latent else t[:, 0]),
        encoder_hidden_states=cond.text[:, 0],
        encoder_hidden_states_image=cond.image,
    ).sample
    assert expected.abs().max() > 0.1
    return ((ours - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch, latents, height, width", [(1, 1, 4, 4), (2, 3, 6, 10), (3, 5, 2, 14)])
def test_a_loaded_network_matches_diffusers(variant, batch, latents, height, width, tmp_path):
    net = wan_weights.load(network(variant), str(saved(variant, tmp_path)))
    assert difference(net, theirs(variant), variant, batch, latents, height, width) < 1e-5


def test_sharded_files_are_loaded_by_their_index(tmp_path):
    folder = saved("t2v", tmp_path, shards=2)
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert difference(wan_weights.load(network(), str(folder)), theirs(), "t2v", 1, 2, 4, 4) < 1e-5


def original_names(state: dict) -> dict:
    """Rename diffusers' tensors to the original names, by separate rules (not the table under test)."""
    rules = [
        (r"condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
        (r"condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
        (r"condition_embedder\.time_proj", "time_projection.1"),
        (r"condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
        (r"condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
        (r"condition_embedder\.image_embedder\.norm1", "img_emb.proj.0"),
        (r"condition_embedder\.image_embedder\.ff\.net\.0\.proj", "img_emb.proj.1"),
        (r"condition_embedder\.image_embedder\.ff\.net\.2", "img_emb.proj.3"),
        (r"condition_embedder\.image_embedder\.norm2", "img_emb.proj.4"),
        (r"^scale_shift_table", "head.modulation"),
        (r"^proj_out", "head.head"),
        (r"scale_shift_table", "modulation"),
        (r"\.attn2\.add_k_proj", ".cross_attn.k_img"),
        (r"\.attn2\.add_v_proj", ".cross_attn.v_img"),
        (r"\.attn2\.norm_added_k", ".cross_attn.norm_k_img"),
        (r"\.attn1\.", ".self_attn."),
        (r"\.attn2\.", ".cross_attn."),
        (r"\.to_out\.0", ".o"),
        (r"\.to_([qkv])", r".\1"),
        (r"\.norm2\.", ".norm3."),
        (r"\.ffn\.net\.0\.proj", ".ffn.0"),
        (r"\.ffn\.net\.2", ".ffn.2"),
    ]
    named = {}
    for name, tensor in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        named[name] = tensor
    return named


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_original_layout_is_loaded(variant, tmp_path):
    save_file(original_names(theirs(variant).state_dict()), tmp_path / "model.safetensors")
    net = wan_weights.load(network(variant), str(tmp_path / "model.safetensors"))
    assert difference(net, theirs(variant), variant, 1, 2, 4, 4) < 1e-5


@pytest.mark.parametrize("prefix", ["model.", "model._fsdp_wrapped_module.", "_orig_mod.model.", "module.model.", ""])
def test_causal_students_are_loaded_from_their_ema_weights(prefix, tmp_path):
    ema = original_names(theirs().state_dict())
    last = {name: torch.zeros_like(tensor) for name, tensor in ema.items()}
    wrapped = [
        {
            re.sub(r"(blocks\.\d+)", r"\1._fsdp_wrapped_module", prefix + n) if "fsdp" in prefix else prefix + n: t
            for n, t in state.items()
        }
        for state in (last, ema)
    ]
    torch.save({"generator": wrapped[0], "generator_ema": wrapped[1]}, tmp_path / "student.pt")
    net = wan_weights.load(network(), str(tmp_path / "student.pt"), kind="student")
    assert difference(net, theirs(), "t2v", 1, 2, 4, 4) < 1e-5
    assert net.origin.kind == "student"


def test_files_in_the_legacy_format_of_torch_are_loaded(tmp_path):
    state = original_names(theirs().state_dict())
    torch.save(state, tmp_path / "student.pt", _use_new_zipfile_serialization=False)
    net = wan_weights.load(network(), str(tmp_path / "student.pt"))
    assert difference(net, theirs(), "t2v", 1, 2, 4, 4) < 1e-5


@pytest.mark.parametrize("weights", [True, False], ids=["published", "fresh"])
def test_precision_and_kind_follow_the_arguments(weights, tmp_path):
    folder = str(saved("t2v", tmp_path)) if weights else None
    net = wan_weights.load(network(), folder, kind="student", dtype="bfloat16")
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16} and net.origin.kind == "student"
    with pytest.raises(ValueError, match=r"dtype='bf16'.*float32, bfloat16, float16"):
        wan_weights.load(network(), folder, dtype="bf16")
    with pytest.raises(ValueError, match=r"kind='tutor'.*teacher, causal_teacher, student"):
        wan_weights.load(network(), folder, kind="tutor")


def test_layers_that_wan_lacks_are_zero_initialised_and_get_gradients(tmp_path):
    net = wan_weights.load(network(flow_map=True, guidance_embedding=True), str(saved("t2v", tmp_path)))
    assert all(not p.is_meta for p in net.parameters())
    cond = conditioning("t2v", 1, 3, 4, 4)
    x, t, view = torch.randn(1, 4, 3, 4, 4), torch.rand(1, 3), FullView(torch.arange(3))
    output = net(x, t, replace(cond, guidance=torch.full_like(t, 2.0)), view, r=t / 2)
    other = cond.without(*(torch.tensor([flag]) for flag in (True, False, True)))
    torch.testing.assert_close(net(x, t, other, view), output)
    output.square().sum().backward()
    for name in (
        "labels.emotion.weight",
        "blocks.1.audio.out.weight",
        "input_skip.weights.weight",
        "patches.reference.weight",
    ):
        assert net.get_parameter(name).grad.abs().max() > 0, name


@pytest.mark.parametrize("injection", ["attention", "addition"])
def test_every_audio_injection_is_zero_initialised(injection, tmp_path):
    net = wan_weights.load(network(audio_injection=injection), str(saved("t2v", tmp_path)))
    assert difference(net, theirs(), "t2v", 1, 2, 4, 4) < 1e-5
    assert all(parameter.isfinite().all() for parameter in net.parameters())


def test_exported_weights_equal_the_loaded_ones(tmp_path):
    for variant in VARIANTS:
        net = wan_weights.load(network(variant), str(saved(variant, tmp_path / variant)))
        wan_weights.export(net, tmp_path / f"{variant}-out")
        again = WanTransformer3DModel.from_pretrained(tmp_path / f"{variant}-out")
        expected = theirs(variant).state_dict()
        assert again.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
        assert {k: again.config[k] for k in TINY | VARIANTS[variant]} == TINY | VARIANTS[variant]


def test_an_export_that_would_change_the_output_is_rejected(tmp_path):
    net = wan_weights.load(network(), str(saved("t2v", tmp_path / "in")))
    with torch.no_grad():
        net.blocks[1].audio.out.bias[3] = 0.1
    with pytest.raises(ValueError, match=r"nonzero blocks\.1\.audio\.out\.bias; expected zero"):
        wan_weights.export(net, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    wan_weights.export(net, tmp_path / "out", allow=["blocks.*.audio.*"])
    with pytest.raises(FileExistsError, match="isn't empty"):
        wan_weights.export(net, tmp_path / "out", allow=["blocks.*.audio.*"])


def test_allowed_tensors_are_loaded_where_their_shape_matches(tmp_path):
    folder = rewritten(saved("t2v", tmp_path), lambda s: s.update({"proj_out.weight": torch.zeros(5, 32)}))
    net = wan_weights.load(network(), folder, allow=["proj_out.*"])
    taken = net.out.bias.unflatten(0, (4, 4)).T.flatten()  # Wan's output patches are channels-last
    assert torch.equal(taken, theirs().proj_out.bias)
    assert net.out.weight.shape == (16, 32) and net.out.weight.any()


def test_additional_blocks_are_zero_initialised(tmp_path):
    folder = str(saved("t2v", tmp_path))
    with pytest.raises(ValueError, match=r"missing blocks\.2\."):
        wan_weights.load(network(layers=3), folder)
    net = wan_weights.load(network(layers=3), folder, allow=["blocks.2.*"])
    assert difference(net, theirs(), "t2v", 1, 2, 4, 4) < 1e-5
    assert net.blocks[2].modulation.any() and net.blocks[2].attention.q.weight.any()


def test_another_text_embedder_is_rejected(tmp_path):
    text = {"_target_": "avatar.nn.embeddings.ByteTextEncoder", "dim": 32}
    with pytest.raises(ValueError, match="TextProjection"):
        wan_weights.load(network(text=text), str(saved("t2v", tmp_path)))


def rewritten(folder: Path, change) -> str:
    (path,) = folder.glob("*.safetensors")
    state = load_file(path)
    change(state)
    save_file(state, path)
    return str(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("blocks.1.attn1.to_q.bias"), r"missing blocks\.1\.attn1\.to_q\.bias"),
        (lambda s: s.update(surplus=torch.zeros(2)), "unknown surplus"),
        (lambda s: s.update({"proj_out.bias": torch.zeros(5)}), r"proj_out\.bias is \(5,\), expected \(16,\)"),
    ],
)
def test_mismatching_tensors_are_listed_unless_allowed(change, message, tmp_path):
    folder = rewritten(saved("t2v", tmp_path), change)
    with pytest.raises(ValueError, match=message):
        wan_weights.load(network(), folder)
    name = re.sub(r"\\", "", re.search(r"(blocks\S+|surplus|proj_out\S+?)(?= is|$)", message)[0])
    net = wan_weights.load(network(), folder, allow=[name])
    assert all(parameter.isfinite().all() for parameter in net.parameters())


def test_another_size_is_rejected_with_its_shapes(tmp_path):
    with pytest.raises(ValueError, match=r"ffn\.net\.0\.proj\.bias is \(48,\), expected \(64,\)"):
        wan_weights.load(network(ffn=64), str(saved("t2v", tmp_path)))
    with pytest.raises(ValueError, match=r"unknown blocks\.1"):
        wan_weights.load(network(layers=1), str(saved("t2v", tmp_path / "again")))


class Hostile:
    def __reduce__(self):
        return print, ("this must not be printed",)


CONTENTS = {
    "list": [torch.zeros(2)],
    "tensor": torch.zeros(2),
    "no tensors": {"step": 3, "model": {"a.weight": torch.zeros(2)}},
    "list inside": {"generator": [torch.zeros(2)]},
    "numbers for names": {1: torch.zeros(2)},
    "empty mapping": {},
}


def damaged(kind: str, folder: Path) -> Path:
    """A file or folder without valid weights."""
    path = folder / "weights.safetensors"
    if kind == "truncated":
        saved("t2v", folder)
        path = folder / "diffusion_pytorch_model.safetensors"
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "text":
        path.write_text("no weights")
    elif kind == "code":
        path = folder / "student.pt"
        torch.save({"generator": {"model.head.head.weight": Hostile()}}, path)
    elif kind in CONTENTS:
        path = folder / "student.pt"
        torch.save(CONTENTS[kind], path)
    elif kind in ("random bytes", "empty"):
        path = folder / "student.pt"
        path.write_bytes(torch.randint(256, (3000,), dtype=torch.uint8).numpy().tobytes() if kind != "empty" else b"")
    elif kind == "other names":
        save_file({"a.weight": torch.zeros(2)}, path)
    elif kind == "empty folder":
        return folder
    elif kind in ("lost shard", "wrong index"):
        saved("t2v", folder, shards=2)
        index = next(folder.glob("*.index.json"))
        places = json.loads(index.read_text())
        first, *_, last = sorted(set(places["weight_map"].values()))
        if kind == "lost shard":
            (folder / last).unlink()
        else:
            places["weight_map"] = dict.fromkeys(places["weight_map"], first)
            index.write_text(json.dumps(places))
        return folder
    return path


@pytest.mark.parametrize(
    "kind, message",
    [
        ("truncated", "not a readable safetensors"),
        ("text", "not a readable safetensors"),
        ("code", "contain code are rejected"),
        ("other names", "expected diffusers' or the original names"),
        ("empty folder", "no index"),
        ("lost shard", "listed in its index"),
        ("wrong index", "where the index lists it"),
        ("nothing", "no weights at"),
        ("list", "contains a list; expected a state dict"),
        ("tensor", "contains a Tensor; expected"),
        ("no tensors", "contains step, model; expected"),
        ("list inside", "contains generator; expected"),
        ("numbers for names", "contains 1; expected"),
        ("empty mapping", "contains nothing; expected"),
        ("random bytes", "not a file of tensors only"),
        ("empty", "not a file of tensors only"),
    ],
)
def test_invalid_files_are_rejected(kind, message, tmp_path, capsys):
    with pytest.raises((ValueError, OSError), match=message):
        wan_weights.load(network(), str(damaged(kind, tmp_path)))
    assert "must not" not in capsys.readouterr().out
