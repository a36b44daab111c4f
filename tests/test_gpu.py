"""Results on a CUDA device match the CPU, and bf16, compilation and checkpointing work: `make test-gpu`."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from avatar.diffusion.packing import Bidirectional, TeacherForced
from avatar.diffusion.plan import Plan, plan_of
from avatar.models import bundle
from avatar.streaming.session import Session
from tests.conftest import make_cond, make_net
from tests.stages import FILTERS, SMALL_NET, TINY, fitted
from tests.test_resume import INTENDED, losses

DEVICE = "cuda"
LARGE = (
    "trainer.accelerator=gpu",
    "trainer.precision=bf16-mixed",
    "transforms=large",
    "+objective.optimizer.fused=true",
)
ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    *(pytest.mark.filterwarnings(text) for text in (*FILTERS, *INTENDED)),
]


@pytest.mark.parametrize("pattern", [Bidirectional(), TeacherForced(Plan((1.0, 0.6), window=4))])
def test_velocities_and_gradients_match_the_cpu(pattern):
    net, cond, x, t = make_net(), make_cond(), torch.randn(2, 3, 5, 4, 4), torch.full((2, 5), 0.5)

    def velocity_and_gradients(device: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        net.to(device).zero_grad()
        v = pattern.velocity(net, x.to(device), t.to(device), cond.map(lambda y: y.to(device)), x.to(device))
        v.square().mean().backward()
        return v.detach().cpu(), {name: p.grad.cpu() for name, p in net.named_parameters() if p.grad is not None}

    torch.testing.assert_close(velocity_and_gradients(DEVICE), velocity_and_gradients("cpu"), rtol=1e-3, atol=1e-4)


def test_every_stage_trains_in_bf16_with_compiled_and_checkpointed_blocks(tmp_path):
    def stage(script: str, name: str, *overrides: str) -> Path:
        own = [*TINY, *LARGE, f"folder='{tmp_path / name}'", f"cache='{tmp_path / 'cache'}'", "steps=6", *overrides]
        # In another process, without runtime checks of shapes, which can't be compiled (pytorch#122093).
        subprocess.run([sys.executable, f"{script}.py", *own], cwd=ROOT, check=True)
        assert all(float(value) < math.inf for row in losses(tmp_path / name).values() for value in row if value)
        (bundle,) = (tmp_path / name).glob("*.safetensors")
        assert {weight.dtype for weight in load_file(bundle).values()} == {torch.float32}  # master weights stay in fp32
        return bundle

    teacher = stage("train", "teacher", *SMALL_NET)
    causal = stage("distill", "causal", "objective=teacher_forcing", f"teacher='{teacher}'")
    jumps = stage("distill", "jumps", "objective=consistency", f"teacher='{causal}'")
    fused = "+objective.critic_optimizer.fused=true"
    stage("distill", "student", "objective=dmd", f"init='{jumps}'", f"teacher='{teacher}'", fused)


def test_a_resumed_run_restores_the_random_state_of_the_device(tmp_path):
    often = ("steps=8", "+callbacks.checkpoint.save_top_k=-1", "callbacks.checkpoint.every_n_train_steps=4")
    own = (*often, *SMALL_NET, "trainer.accelerator=gpu")
    fitted("train", tmp_path / "full", *own)
    (middle,) = (tmp_path / "full" / "checkpoints").glob("*step=4.ckpt")
    fitted("train", tmp_path / "resumed", f"resume='{middle}'", *own)
    full, resumed = (
        torch.tensor([float(row[0]) for step, row in sorted(losses(tmp_path / name).items()) if step >= 4])
        for name in ("full", "resumed")
    )
    # The order of summation on the device may differ.
    torch.testing.assert_close(resumed, full, rtol=1e-4, atol=0)


def test_a_stream_matches_the_cpu():
    portrait, speech = torch.rand(1, 3, 1, 64, 64) * 2 - 1, torch.randn(16_000) * 0.2

    def frames(device: str) -> torch.Tensor:
        student = bundle.load(str(ROOT / "data/nano/student.safetensors")).to(device)
        autoencoder = bundle.load(str(ROOT / "data/nano/autoencoder.safetensors")).to(device)
        origin = bundle.origin_of(student)
        plan = plan_of(origin.plan, {})
        session = Session(
            student, autoencoder, origin.build_encoder("audio"), origin.build_encoder("text"), plan, portrait, seed=1
        )
        with torch.no_grad():
            return torch.cat([session.push(speech), session.finish()], dim=1).cpu()

    torch.testing.assert_close(frames(DEVICE), frames("cpu"), rtol=0, atol=0.02)


def test_the_training_step_benchmark_runs(tmp_path):
    out = tmp_path / "step.json"
    clip = ["--frames", "16", "--height", "128", "--width", "128", "--text-tokens", "96", "--steps", "2"]
    own = ["model=nano", "transforms=large", "trainer.precision=bf16-mixed", "--device", DEVICE, "--out", str(out)]
    subprocess.run([sys.executable, "benchmarks/training_step.py", *own, *clip], cwd=ROOT, check=True)
    measured = json.loads(out.read_text())["measured"]
    assert 0 < measured["utilisation"] < 1 and measured["peak_bytes"] > 4 * measured["parameters"]
