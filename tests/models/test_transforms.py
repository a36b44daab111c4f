"""Transforms change memory, speed or the trained parameters of a network, never its output."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch.autograd.graph import saved_tensors_hooks

from avatar.cli import CONFIGS
from avatar.diffusion.packing import Bidirectional
from avatar.models.transforms.activation_checkpointing import ActivationCheckpointing
from avatar.models.transforms.apply import apply_transforms
from avatar.models.transforms.lora import LoRA, merged
from tests.conftest import make_cond, make_net


def loss_of(net) -> torch.Tensor:
    torch.manual_seed(1)
    x = torch.randn(2, 3, 5, 4, 4)
    return Bidirectional().velocity(net, x, torch.rand(2, 5), make_cond(), x).square().mean()


def stored_and_gradients(net) -> tuple[int, dict[str, torch.Tensor]]:
    """The number of elements that the forward pass stores for the backward pass, and the gradients."""
    stored = []

    def store(tensor):
        stored.append(tensor.numel())
        return tensor

    with saved_tensors_hooks(store, lambda tensor: tensor):
        loss = loss_of(net)
    loss.backward()
    return sum(stored), {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("selective", [False, True])
def test_checkpointing_stores_less_and_gives_the_same_gradients(net, selective):
    before, expected = stored_and_gradients(net)
    names = list(net.state_dict())
    net.zero_grad()
    ActivationCheckpointing(selective)(net)
    after, got = stored_and_gradients(net)
    assert after < before / 2 and list(net.state_dict()) == names
    torch.testing.assert_close(got, expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute", "ignore:.*torch.jit")  # raised inside torch's compiler
@pytest.mark.parametrize(("causal", "selective"), [(False, None), (False, False), (True, True)])
def test_all_blocks_share_one_full_graph_and_rollouts_stay_eager(causal, selective, compilable, monkeypatch):
    compiling = compilable("avatar.models.transforms.compile")
    checkpointing = compilable("avatar.models.transforms.activation_checkpointing")
    packing, rollout = compilable("avatar.diffusion.packing"), compilable("avatar.diffusion.rollout")
    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **_: torch_compile(f, fullgraph=True, backend="eager"))
    torch._dynamo.reset()
    plan = rollout.Plan((1.0, 0.6), window=4)
    pattern = packing.TeacherForced(plan) if causal else packing.Bidirectional()
    net, (x, cond) = rebuilt(make_net(layers=3), compilable), (torch.randn(2, 3, 5, 4, 4), make_cond())

    def gradients() -> dict[str, torch.Tensor]:
        net.zero_grad()
        pattern.velocity(net, x, torch.full((2, 5), 0.5), cond, x).square().mean().backward()
        return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}

    expected = gradients()
    if selective is not None:
        checkpointing.ActivationCheckpointing(selective)(net)
    compiling.Compiled()(net)
    torch._dynamo.utils.counters.clear()
    torch.testing.assert_close(gradients(), expected)
    rollout.generate(net, cond, plan, rollout.Noise((1, 2)), 1, "exit_step").latents.sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute", "ignore:.*torch.jit")
def test_a_compiled_network_has_the_same_gradients_and_rollouts_stay_eager(compilable, monkeypatch):
    compiling = compilable("avatar.models.transforms.compile")
    packing, rollout = compilable("avatar.diffusion.packing"), compilable("avatar.diffusion.rollout")
    torch_compile, calls = torch.compile, []

    def counted(function, **_):
        compiled = torch_compile(function, backend="eager")
        return lambda *arguments: calls.append(1) or compiled(*arguments)

    monkeypatch.setattr(torch, "compile", counted)
    torch._dynamo.reset()
    net, x, cond = rebuilt(make_net(layers=2), compilable), torch.randn(2, 3, 5, 4, 4), make_cond()

    def gradients() -> dict[str, torch.Tensor]:
        net.zero_grad()
        packing.Bidirectional().velocity(net, x, torch.full((2, 5), 0.5), cond, x).square().mean().backward()
        return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}

    expected = gradients()
    compiling.CompiledNetwork()(net)
    torch.testing.assert_close(gradients(), expected)
    assert len(calls) == 1
    rollout.generate(net, cond, rollout.Plan((1.0, 0.6), window=4), rollout.Noise((1, 2)))
    assert len(calls) == 1


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:The .grad attribute", "ignore:.*torch.jit")
def test_clips_of_many_lengths_are_compiled(compilable, monkeypatch):
    compiling, packing = compilable("avatar.models.transforms.compile"), compilable("avatar.diffusion.packing")
    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, backend: torch_compile(f, dynamic=False, backend=backend))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    net = rebuilt(make_net(layers=1), compilable)
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        compiling.Compiled(backend="eager")(net)
        for latents in range(1, 5):
            x, cond = torch.randn(2, 3, latents, 4, 4), make_cond(latents=latents)
            packing.Bidirectional().velocity(net, x, torch.rand(2, latents), cond, x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4


def rebuilt(net, compilable):
    """The network without the runtime checks of shapes."""
    text = compilable("avatar.nn.embeddings").ByteTextEncoder(24, width=8, layers=1, max_bytes=16)
    plain = compilable("avatar.models.video_dit").VideoDiT(
        net.channels, net.dim, net.ffn, net.heads, net.layers, net.patch, net.audio.features, net.audio.tokens, text
    )
    plain.load_state_dict(net.state_dict())
    return plain.eval()


def test_only_adapters_are_trained_and_merging_keeps_the_output(net):
    before = loss_of(net)
    LoRA(rank=2, alpha=4)(net)
    torch.testing.assert_close(loss_of(net), before)  # B is zero-initialised
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained == {name for name in net.state_dict() if ".lora_" in name}
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter))
    plain = make_net()
    plain.load_state_dict(merged(net, net.state_dict()))
    expected = loss_of(net)
    assert (expected - before).abs() > 1e-3
    torch.testing.assert_close(loss_of(plain), expected)


def test_merging_a_network_without_adapters_changes_nothing(net):
    state = net.state_dict()
    got = merged(net, state)
    assert got.keys() == state.keys() and all(got[name] is state[name] for name in state)


def test_transforms_of_an_unknown_network_are_rejected(net):
    module = torch.nn.ModuleDict({"net": net})
    apply_transforms(
        module, {"net": {"lora": None, "checkpointing": ActivationCheckpointing()}, "critic": {"lora": None}}
    )
    with pytest.raises(ValueError, match=r"transforms\.critic.*one of the networks net:"):
        apply_transforms(module, {"critic": {"checkpointing": ActivationCheckpointing()}})


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method")  # raised inside torch's compiler
@pytest.mark.parametrize("name", ["none", "large", "lora"])
def test_configs_of_transforms_can_be_applied(name, net):
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        cfg = compose("train", overrides=["folder=/tmp/run", "name=test", f"transforms={name}"])
    count = sum(p.requires_grad for p in net.parameters())
    apply_transforms(torch.nn.ModuleDict({"net": net}), instantiate(cfg.transforms, _convert_="all"))
    trained = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert (len(trained) == count) == (name != "lora")
    if name == "lora":  # layers that Wan lacks are trained in full
        assert {"labels.emotion.weight", "audio.null", "input_skip.weights.weight"} <= trained
        assert "blocks.0.ffn.0.base_layer.weight" not in trained
