"""Losses, gradients and the final bundle don't depend on the number of processes and micro-batches."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from avatar.objectives.distributed import average_gradients, sample_globally
from avatar.types import REGIONS, Batch
from tests import ranks
from tests.conftest import make_cond
from tests.objectives.test_modules import SCALED, make_consistency, make_dmd, make_flow_matching
from tests.stages import FILTERS, SMALL_NET, TINY, fitted, random_bundle
from tests.test_resume import INTENDED, losses

pytestmark = [pytest.mark.filterwarnings(text) for text in (*FILTERS, *INTENDED)]

# With SGD, differences of weights are no larger than those of gradients.
SGD = ("objective.optimizer._target_=torch.optim.SGD", "~objective.optimizer.betas", "objective.optimizer.lr=0.03")
CRITIC_SGD = tuple(text.replace("optimizer", "critic_optimizer") for text in SGD)
RUN = (*SMALL_NET, *SGD, "steps=3", "data.buckets.max_latents_per_batch=32", "data.buckets.batch_multiple_of=4")
TWO = ("trainer.devices=2", "accumulate=2")  # four micro-batches: two for each process


def objectives() -> dict:
    """Objective name → the trained network and the function from a batch to its loss."""
    torch.manual_seed(1)
    teacher, student, jumps = make_flow_matching(), make_dmd(gradient="replayed"), make_consistency()
    scaled = make_consistency(plan=SCALED, guidance_range=[1.0, 4.0])
    return {
        "flow_matching": (
            teacher.net,
            lambda batch: teacher._loss(
                batch, teacher.dropout(batch.conditioning, sample_globally(torch.rand, batch.shard))
            ),
        ),
        "consistency": (jumps.net, lambda batch: jumps.training_step(batch, 0)),
        "guidance_range": (scaled.net, lambda batch: scaled.training_step(batch, 0)),
        "student": (student.net, student.student_loss),
        "critic": (student.critic, student.critic_loss),
    }


def batch_shard(part: slice) -> Batch:
    torch.manual_seed(2)
    x0, cond, regions = torch.randn(4, 3, 5, 4, 4), make_cond(batch=4), torch.rand(4, len(REGIONS), 5, 4, 4)
    regions *= torch.arange(4)[:, None, None, None, None] / 4  # every clip has another region weight, one has none
    return Batch(x0[part], cond.map(lambda x: x[part]), regions[part], list("abcd")[part], part)


def loss_and_gradients(rank: int, count: int, micro_batches: int = 1) -> dict[str, dict[str, torch.Tensor]]:
    """Loss and gradients of each objective for one batch, split over `count` ranks and into `micro_batches`."""
    found = {}
    for name, (net, loss_of) in objectives().items():
        total = torch.zeros(())
        for number in range(micro_batches):
            batch = batch_shard(slice(number * count + rank, None, count * micro_batches))
            torch.manual_seed(3)
            loss = loss_of(batch) / micro_batches
            loss.backward()
            total += loss.detach() / count
        if count > 1:
            dist.all_reduce(total)
        average_gradients(net)
        found[name] = {key: p.grad for key, p in net.named_parameters() if p.grad is not None} | {"loss": total}
    return found


def write_gradients(path: str) -> None:
    """Compute `loss_and_gradients` in one of several processes; rank 0 writes it."""
    dist.init_process_group("gloo")
    found = loss_and_gradients(dist.get_rank(), dist.get_world_size())
    if dist.get_rank() == 0:
        torch.save(found, path)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> list[str]:
    """Overrides that give distribution matching random bundles."""
    folder, states = tmp_path_factory.mktemp("bundles"), ("autoencoder=states", "model=states")
    student, teacher = (random_bundle(folder / kind, kind, *states) for kind in ("causal_teacher", "teacher"))
    return [f"init='{student}'", f"teacher='{teacher}'"]


@pytest.fixture(scope="module")
def dmd(bundles) -> list[str]:
    few = ["data.buckets.lengths=[2,3]", "data.buckets.max_latents_per_batch=12", "objective.critic_steps=2"]
    return [*RUN, "objective=dmd", *bundles, *CRITIC_SGD, *few, "objective.gradient=replayed"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, dmd) -> Path:
    """Runs of one process and of two; the same two processes train all runs of two."""
    folder = tmp_path_factory.mktemp("runs")
    fitted("train", folder / "flow", *RUN)
    fitted("distill", folder / "dmd", *dmd)
    ranks.run(
        2,
        ("tests.test_distributed:write_gradients", [str(folder / "gradients.pt")]),
        ("tests.ranks:fit", ["train", str(folder / "flow_ddp"), *RUN, "trainer=ddp", *TWO]),
        ("tests.ranks:fit", ["distill", str(folder / "dmd_ddp"), *dmd, "trainer=ddp", *TWO]),
        ("tests.ranks:fit", ["train", str(folder / "flow_fsdp"), *RUN, "trainer=fsdp", *TWO]),
        ("tests.ranks:fit", ["distill", str(folder / "dmd_fsdp"), *dmd, "trainer=fsdp", *TWO]),
    )
    return folder


def assert_close_gradients(got: dict, expected: dict) -> None:
    """Compare to 1e-5 of the loss and of the largest gradient of each objective.

    Small gradients are sums of large terms that nearly cancel, so a relative tolerance would be too strict for them.
    """
    for name, values in expected.items():
        assert len(values) > 10 and values["loss"] > 0.01
        largest = max(float(value.abs().max()) for key, value in values.items() if key != "loss")
        assert got[name].keys() == values.keys()
        for key, value in values.items():
            atol, at = 0.0 if key == "loss" else 1e-5 * largest, f"{name}, {key}"
            torch.testing.assert_close(
                got[name][key], value, rtol=1e-5, atol=atol, msg=lambda text, at=at: f"{at}: {text}"
            )


def test_two_processes_have_the_losses_and_gradients_of_one(folder):
    assert_close_gradients(torch.load(folder / "gradients.pt", weights_only=True), loss_and_gradients(0, 1))


def test_two_micro_batches_have_the_losses_and_gradients_of_one():
    assert_close_gradients(loss_and_gradients(0, 1, micro_batches=2), loss_and_gradients(0, 1))


@pytest.mark.parametrize("run", ["flow_ddp", "flow_fsdp", "dmd_ddp", "dmd_fsdp"])
def test_two_processes_with_two_micro_batches_export_the_weights_of_one(folder, run):
    alone = folder / run.partition("_")[0]
    (expected,), (got,) = ([load_file(path) for path in run.glob("*.safetensors")] for run in (alone, folder / run))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    if run.startswith("dmd"):  # with automatic optimisation Lightning logs one row per update, not per micro-batch
        assert losses_of_updates(folder / run, micro_batches=2) == pytest.approx(
            losses_of_updates(alone, micro_batches=1), 1e-5, 1e-6
        )


def losses_of_updates(folder: Path, micro_batches: int) -> list[float]:
    """The loss of each update of distribution matching: every third is the student's, the others are the critic's.

    Each row of the metrics also repeats the last loss of the other network.
    """
    rows = list(losses(folder).values())
    values = [float(row[(n // micro_batches) % 3 == 2]) for n, row in enumerate(rows)]
    return [sum(values[i : i + micro_batches]) / micro_batches for i in range(0, len(values), micro_batches)]


def test_a_script_ends_its_process_group(tmp_path, monkeypatch):
    own = (*TINY, *RUN, "trainer=ddp", "trainer.devices=1", f"folder={tmp_path}", f"cache={tmp_path}", "name=test")
    monkeypatch.setattr(sys, "argv", ["train.py", *own, f"hydra.run.dir={tmp_path}"])
    monkeypatch.setenv("LOCAL_RANK", "0")  # as torchrun sets it: with one device, Lightning launches no process
    runpy.run_path("train.py", run_name="__main__")
    assert list(tmp_path.glob("*.safetensors")) and not dist.is_initialized()
