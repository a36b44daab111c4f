"""Recorded results contain their command, machine, versions and revision."""

import json
import sys

from avatar import provenance


def test_recorded_results_contain_their_provenance(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks/a.py", "--name", "two words"])
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    made = json.loads(provenance.with_provenance(measured={"ratio": 1.5}))
    assert made["command"] == "OMP_NUM_THREADS=3 python benchmarks/a.py --name 'two words'"
    assert made["measured"] == {"ratio": 1.5} and made["machine"]["cores"] >= 1
    assert made["versions"]["torch"] and "revision" in made
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert json.loads(provenance.with_provenance())["command"].startswith("python benchmarks/a.py")
