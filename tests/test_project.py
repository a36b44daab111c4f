"""Rules of the repository: import order, empty __init__ files, file lengths, declared dependencies."""

import ast
import re
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]

# A module imports lower ranks and its own package, nothing else of the project.
RANKS = {
    0: {"threads", "errors"},
    1: {"types", "provenance", "files", "process", "renamed"},
    2: {"protocols"},
    3: {"nn", "media", "conditioning"},
    4: {"puppet", "diffusion", "models"},
    5: {"data", "metrics"},
    6: {"objectives", "streaming"},
    7: {"training", "cli"},
    8: {"commands"},
    9: {"__main__", "train", "distill", "infer"},
}
RANK = {part: rank for rank, parts in RANKS.items() for part in parts}
SEPARATE = {("objectives", "data")}  # they meet at avatar/types.py


def part(module: str) -> str:
    """The unit that has a rank: the package or module under avatar, or the script."""
    return module.removeprefix("avatar.").split(".")[0]


def imports(module: str, source: str) -> set[str]:
    """The project's modules that `source` imports, also within functions; `module` is its name, with .__init__ for a
    package."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            origin = ".".join(base + (node.module.split(".") if node.module else []))
            found |= {f"{origin}.{alias.name}" for alias in node.names} if origin == "avatar" else {origin}
    return {name for name in found if name.startswith("avatar.") or name in {"train", "distill", "infer"}}


def violations(module: str, source: str) -> list[str]:
    own = part(module)
    return [
        f"{module} (rank {RANK[own]}) imports {name} (rank {RANK[part(name)]})"
        for name in sorted(imports(module, source))
        if part(name) != own and (RANK[part(name)] >= RANK[own] or (own, part(name)) in SEPARATE)
    ]


def modules() -> dict[str, Path]:
    files = [*(ROOT / "avatar").rglob("*.py"), *ROOT.glob("*.py")]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}


def test_modules_import_only_lower_ranks():
    found = []
    for name, file in modules().items():
        if name != "avatar.__init__":  # without a rank, and empty by another test
            assert part(name) in RANK, f"{name} has no rank: give {part(name)} one in RANKS"
            found += violations(name, file.read_text())
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("avatar.nn.rope", "from avatar.objectives.dmd import DistributionMatching"),
        ("avatar.nn.rope", "from avatar import objectives"),
        ("avatar.nn.rope", "import avatar.diffusion.path as path"),
        ("avatar.nn.rope", "def late():\n    from avatar.models import video_dit"),
        ("avatar.nn.rope", "from ..models.video_dit import VideoDiT"),
        ("avatar.nn.rope", "from .. import models"),
        ("avatar.types", "from avatar.nn import rope"),
        ("avatar.data.shards", "from avatar.metrics.drift import drift"),  # the same rank
        ("avatar.objectives.dmd", "from avatar.data.shards import ShardClips"),  # a lower rank, but in SEPARATE
        ("avatar.data.shards", "from avatar.objectives.dmd import losses"),
        ("avatar.training.fit", "import train"),
        ("distill", "from train import main"),
    ],
)
def test_an_import_of_a_higher_rank_is_detected(module, source):
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("avatar.nn.rope", "import torch\nfrom avatar.types import Latents\nfrom avatar.nn.masks import dense"),
        ("avatar.puppet.render", "from . import motion\nfrom ..media.decode import read_image"),
        ("avatar.metrics.lip_sync", "from avatar.puppet import render"),
        ("train", "from avatar.training.fit import fit"),
        ("avatar.models.__init__", "from .video_dit import VideoDiT"),
    ],
)
def test_an_import_of_a_lower_rank_or_the_same_package_is_allowed(module, source):
    assert not violations(module, source)


def test_every_init_is_empty():
    assert not [name for name, file in modules().items() if file.name == "__init__.py" and file.read_text().strip()]


def test_nothing_is_called_utils():
    vague = {"utils", "util", "helpers", "misc", "common"}
    assert not [name for name in modules() if vague & set(name.split("."))]


def test_every_package_folder_has_an_init():
    folders = {file.parent for name, file in modules().items() if name.startswith("avatar")}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]


LONG = {}  # file -> why it is above 300 lines


def test_files_have_at_most_300_lines():
    lengths = {name: len(file.read_text().splitlines()) for name, file in modules().items()}
    assert not {name: length for name, length in lengths.items() if length > 300 and name not in LONG}


def exists(dotted: str) -> bool:
    """Whether `avatar.package.module` or `avatar.package.module.member` exists."""
    parts, path = dotted.split(".")[1:], Path("avatar")
    while parts and (path / parts[0]).is_dir():
        path /= parts.pop(0)
    if not parts:
        return True
    module = path / f"{parts[0]}.py"
    if not module.is_file() or len(parts) == 1:
        return module.is_file()
    return bool(re.search(rf"^ *(class |def )?{parts[1]}\b", module.read_text(), re.MULTILINE))


def missing_references(text: str) -> set[str]:
    """Modules, their members, files and configs that a text names and that do not exist."""
    paths = re.findall(r"\b(?:avatar|configs|benchmarks|tests)/[\w/]+\.\w+", text)
    modules = re.findall(r"\bavatar(?:\.(?!mp4)[A-Za-z_]\w*)+", text)
    missing = {path for path in paths if not Path(path).exists()} | {name for name in modules if not exists(name)}
    return missing | {
        name for name in re.findall(r'compose\("(\w+)"', text) if not Path(f"configs/{name}.yaml").exists()
    }


def test_missing_references_are_detected():
    assert missing_references('avatar.nn.rope, avatar/nn/rope.py, avatar.nn.rope.Rope, compose("train")') == set()
    wrong = {"avatar.nn.ropes", "avatar/nn/ropes.py", "avatar.nn.rope.Ropes", "trains"}
    assert missing_references('avatar.nn.ropes, avatar/nn/ropes.py, avatar.nn.rope.Ropes, compose("trains")') == wrong


def test_code_configs_and_documents_name_what_exists():
    files = [Path(name) for name in ("README.md", "CONTRIBUTING.md", "Makefile", "train.py", "distill.py", "infer.py")]
    folders = {"avatar": "py", "benchmarks": "py", "configs": "yaml", "data": "md", "notebooks": "ipynb"}
    files += [file for folder, suffix in folders.items() for file in sorted(Path(folder).rglob(f"*.{suffix}"))]
    missing = {str(file): names for file in files if (names := missing_references(file.read_text(encoding="utf-8")))}
    assert not missing


def test_packages_have_no_circular_imports():
    edges = {(part(name), part(other)) for name, file in modules().items() for other in imports(name, file.read_text())}
    edges = {(a, b) for a, b in edges if a != b}
    while leaves := {b for _, b in edges} - {a for a, _ in edges}:
        edges = {(a, b) for a, b in edges if b not in leaves}
    assert not edges


# Modules whose names differ from those of their distributions.
DISTRIBUTIONS = {"PIL": "pillow", "hydra": "hydra-core", "espeakng_loader": "espeakng-loader"}


def test_third_party_imports_are_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [*project["dependencies"], *project["optional-dependencies"]["speech"]]
    declared = {re.split(r"[<>=; ]", requirement, maxsplit=1)[0].lower() for requirement in required}
    found = set()
    for file in modules().values():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                found.add(node.module.split(".")[0])
    found -= {*sys.stdlib_module_names, "avatar"}
    assert not {name for name in found if DISTRIBUTIONS.get(name, name).replace("_", "-").lower() not in declared}


def test_the_workflow_runs_the_ci_script_on_every_supported_python():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    job = workflow["jobs"]["test"]
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]


def test_conda_environment_lists_the_dependencies_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip,) = [entry["pip"] for entry in conda if isinstance(entry, dict)]
    assert sorted(pip) == sorted([*required, "--editable ."])
    assert f"python{project['requires-python']}" in conda
