"""The waiting policy of OpenMP threads is set before torch is imported, and the user's setting is kept."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from avatar import threads

ROOT = Path(__file__).parents[1]
WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")

# Runs a script like `python NAME.py`, and prints the environment at the import of torch.
RUN = """
import os, runpy, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_WAIT_POLICY"))
            sys.stdout.flush()
            os._exit(0)

sys.meta_path.insert(0, Watch())
sys.argv = sys.argv[1:]
if sys.argv[0] == "avatar":
    runpy.run_module("avatar", run_name="__main__", alter_sys=True)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def policy_at_import(script: str, **settings: str) -> list[str]:
    """GOMP_SPINCOUNT and OMP_WAIT_POLICY when this script imports torch."""
    inherited = {name: value for name, value in os.environ.items() if name not in WAITING}
    environment = inherited | {"PYTHONPATH": str(ROOT)} | settings
    name, *arguments = script.split()
    command = [sys.executable, "-c", RUN, name if name == "avatar" else str(ROOT / name), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize("script", ["train.py", "distill.py", "infer.py", "avatar infer", "avatar evaluate"])
def test_scripts_set_the_policy_before_importing_torch(script):
    assert policy_at_import(script) == [threads.SPIN_COUNT, "None"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"GOMP_SPINCOUNT": "7"}, ["7", "None"]), ({"OMP_WAIT_POLICY": "active"}, ["None", "active"])],
)
def test_a_users_setting_is_kept(settings, expected):
    assert policy_at_import("infer.py", **settings) == expected
