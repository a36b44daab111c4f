"""Provenance of results: machine, package versions and revision of the code."""

import functools
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "avatar",
    "torch",
    "lightning",
    "hydra-core",
    "numpy",
    "scipy",
    "diffusers",
    "transformers",
    "av",
    "aggdraw",
)


def machine() -> dict[str, Any]:
    """System, CPU, cores that this process may use, torch's threads and GPU, without the host name."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _processor(),
        "cores": allowed,
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions() -> dict[str, str]:
    """Versions of Python and of those of PACKAGES that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def with_provenance(**results: Any) -> str:
    """Results as JSON, with the command that is running, the machine, the versions and the revision."""
    threads = os.environ.get("OMP_NUM_THREADS")
    command = (f"OMP_NUM_THREADS={threads} " if threads else "") + shlex.join(["python", *sys.argv])
    provenance = {"command": command, "machine": machine(), "versions": versions(), "revision": git_revision()}
    return json.dumps(provenance | results, indent=1) + "\n"


def git_revision() -> str | None:
    """The commit of this source tree, with "-dirty" if tracked files differ from it; None if it is not the root of a
    git repository."""
    root = Path(__file__).resolve().parents[1]
    run = functools.partial(subprocess.run, cwd=root, capture_output=True, text=True, check=True)
    try:
        if Path(run(["git", "rev-parse", "--show-toplevel"]).stdout.strip()).resolve() != root:
            return None
        revision = run(["git", "rev-parse", "HEAD"]).stdout.strip()
        changes = run(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{revision}-dirty" if changes else revision


def _processor() -> str | None:
    """The model name of the CPU; None if the system doesn't provide it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or None
