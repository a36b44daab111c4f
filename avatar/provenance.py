"""Where a result was made: the machine, the versions of what ran, the revision of the code."""

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
    """What it ran on, without a name: processor, cores that this process may use, torch's threads, GPU."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _processor(),
        "cores": allowed,
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that results depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def recorded(**results: Any) -> str:
    """Results as JSON, with the command that is running, the machine, the versions and the revision."""
    threads = os.environ.get("OMP_NUM_THREADS")
    command = (f"OMP_NUM_THREADS={threads} " if threads else "") + shlex.join(["python", *sys.argv])
    made = {"command": command, "machine": machine(), "versions": versions(), "revision": git_revision()}
    return json.dumps(made | results, indent=1) + "\n"


def git_revision() -> str | None:
    """The commit of this source tree, with "-dirty" if tracked files differ from it; None outside a repository of its
    own."""
    root = Path(__file__).resolve().parents[1]
    ask = functools.partial(subprocess.run, cwd=root, capture_output=True, text=True, check=True)
    try:
        if Path(ask(["git", "rev-parse", "--show-toplevel"]).stdout.strip()).resolve() != root:
            return None
        revision = ask(["git", "rev-parse", "HEAD"]).stdout.strip()
        changes = ask(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{revision}-dirty" if changes else revision


def _processor() -> str | None:
    """The processor's model name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or None
