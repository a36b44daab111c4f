"""Runs with transformed networks on one and two processes: compiled, with LoRA, in half precision."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from avatar.diffusion.packing import Bidirectional
from avatar.models import bundle
from avatar.training.callbacks.export import Export
from tests import ranks
from tests.stages import SMALL_NET, fitted, random_bundle
from tests.test_distributed import CRITIC_SGD, SGD
from tests.test_resume import losses

pytestmark = pytest.mark.slow

RUN = (
    *SMALL_NET,
    "model.network.layers=2",
    *SGD,
    "steps=3",
    "data.buckets.max_latents_per_batch=32",
    "data.buckets.batch_multiple_of=2",
)
TRACED = (
    "transforms=large",
    "+transforms.net.compiled.backend=aot_eager",
)  # inductor without code generation
ADAPTED = ("transforms=lora", "transforms.net.lora.rank=2", "transforms.net.compiled=null", "callbacks.ema.decay=0.0")
DMD = (
    "objective=dmd",
    *CRITIC_SGD,
    "data.buckets.lengths=[2,3]",
    "data.buckets.max_latents_per_batch=12",
    "objective.critic_steps=1",
)
TWO = {"ddp": ("trainer=ddp", "trainer.devices=2"), "fsdp": ("trainer=fsdp", "trainer.devices=2")}
HALF = "trainer.precision=bf16-mixed"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Runs of one process and of two, of flow matching and of distribution matching."""
    folder, states = tmp_path_factory.mktemp("runs"), ("autoencoder=states", "model=states", "model.network.layers=2")
    bundles = {kind: random_bundle(folder / f"{kind}.safetensors", kind, *states) for kind in ("student", "teacher")}
    dmd = [*RUN, *DMD, f"init='{bundles['student']}'", f"teacher='{bundles['teacher']}'"]

    def job(name: str, call: str, script: str, *overrides: str) -> tuple[str, list[str]]:
        return f"tests.test_transformed_runs:{call}", [script, str(folder / name), *overrides]

    plain = [
        job("flow", "fit", "train", *RUN),
        job("lora", "fit_adapted", "train", *RUN, *ADAPTED),
        job("dmd", "fit", "distill", *dmd),
        job("dmd_lora", "fit_adapted", "distill", *dmd, *ADAPTED),
        job("flow_traced", "fit_traced", "train", *RUN, *TRACED),
    ]
    ranks.run(1, *plain)
    both = [
        job(f"{run}_{strategy}", call, script, *overrides, *TWO[strategy])
        for run, call, script, *overrides in (
            ("lora", "fit_adapted", "train", *RUN, *ADAPTED),
            ("dmd_lora", "fit_adapted", "distill", *dmd, *ADAPTED),
        )
        for strategy in TWO
    ]
    both += [
        job("flow_half_fsdp", "fit_half", "train", *RUN, *TWO["fsdp"], HALF),
        job("dmd_half_fsdp", "fit_half", "distill", *dmd, *TWO["fsdp"], HALF),
        job("flow_traced_ddp", "fit_traced", "train", *RUN, *TRACED, *TWO["ddp"]),
        job("flow_traced_fsdp", "fit_traced", "train", *RUN, *TRACED, *TWO["fsdp"]),
        job("dmd_traced_fsdp", "fit_traced", "distill", *dmd, *TRACED, *TWO["fsdp"]),
    ]
    ranks.run(2, *both)
    return folder


def fit(script: str, folder: str, *overrides: str) -> None:
    fitted(script, Path(folder), *overrides)


def fit_adapted(script: str, folder: str, *overrides: str) -> None:
    """Train with LoRA; assert that all adapters have changed, and that the loaded bundle equals the adapted network."""

    def check(export: Export, trainer, module) -> None:
        adapters = {name: p for name, p in module.named_parameters() if "lora_B" in name}
        assert adapters and {name.partition(".")[0] for name in adapters} == set(module._modules) - {"teacher"}
        assert all(full_tensor(adapter).any() for adapter in adapters.values())
        got = output(module.net, trainer)
        if trainer.is_global_zero:
            torch.testing.assert_close(output(bundle.load(str(export.path)), trainer), got, rtol=1e-5, atol=1e-5)

    fit_and_check(check, script, folder, *overrides)


def fit_half(script: str, folder: str, *overrides: str) -> None:
    """Train in bf16; assert that weights and optimiser states are fp32 at the end."""

    def check(export: Export, trainer, module) -> None:
        assert {p.dtype for p in module.parameters()} == {torch.float32}
        for optimizer in trainer.optimizers:
            states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
            assert {state.dtype for state in states} <= {torch.float32}
        assert output(module.net, trainer).dtype == torch.float32

    fit_and_check(check, script, folder, *overrides)


def fit_traced(script: str, folder: str, *overrides: str) -> None:
    """Train with compiled blocks; assert that they were compiled, since uncompiled ones would compute the same.

    There are no graph breaks, except in rollouts, whose caches are written within a block.
    """
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    fitted(script, Path(folder), *overrides)
    assert counters["stats"]["unique_graphs"] > 0, counters
    assert script == "distill" or not counters["graph_break"], counters


def fit_and_check(check, script: str, folder: str, *overrides: str) -> None:
    on_fit_end = Export.on_fit_end

    def export_and_check(self, trainer, module):
        on_fit_end(self, trainer, module)
        check(self, trainer, module)

    Export.on_fit_end = export_and_check
    try:
        fitted(script, Path(folder), *overrides)
    finally:
        Export.on_fit_end = on_fit_end


@torch.no_grad()
def output(net, trainer) -> torch.Tensor:
    batch = trainer.datamodule.held_out(2, torch.device("cpu"))
    x = batch.latents
    return Bidirectional().velocity(net.eval(), x, torch.full(x.shape[:3:2], 0.5), batch.conditioning, x)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def load_bundle(run: Path) -> dict[str, torch.Tensor]:
    (path,) = run.glob("*.safetensors")
    return load_file(path)


@pytest.mark.parametrize(
    "run, alone",
    [
        ("flow_traced", "flow"),
        ("flow_traced_ddp", "flow"),
        ("flow_traced_fsdp", "flow"),
        ("dmd_traced_fsdp", "dmd"),
        ("lora_ddp", "lora"),
        ("lora_fsdp", "lora"),
        ("dmd_lora_ddp", "dmd_lora"),
        ("dmd_lora_fsdp", "dmd_lora"),
    ],
)
def test_a_transformed_run_equals_one_process(folder, run, alone):
    torch.testing.assert_close(load_bundle(folder / run), load_bundle(folder / alone), rtol=1e-5, atol=1e-5)


def test_adapters_train_and_base_weights_stay_frozen(folder):
    """Only layers that are trained directly or by adapters have changed."""
    before = load_file(folder / "student.safetensors")
    after = load_bundle(folder / "dmd_lora")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"labels.emotion.weight", "blocks.0.attention.q.weight", "blocks.1.ffn.2.weight"} <= moved
    assert not moved & {"blocks.0.attention.q.bias", "modulation.weight", "patches.proj.weight"}


@pytest.mark.parametrize("run", ["flow", "dmd"])
def test_half_precision_loses_little_under_sharding(folder, run):
    """Compares the critic's losses for distribution matching: the student's is a small difference of two networks."""
    expected, got = ([float(row[0]) for row in losses(path).values()] for path in (folder / run, half(folder, run)))
    assert len(set(expected)) > 1 and got != expected and got == pytest.approx(expected, rel=0.01)


def half(folder: Path, run: str) -> Path:
    return folder / f"{run}_half_fsdp"
