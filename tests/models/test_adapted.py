"""A network starts from the weights that fit it, and keeps its own initialisation elsewhere."""

import pytest
import torch

from avatar.models import bundle
from avatar.models.adapted import adapt
from avatar.types import Bundle
from tests.models.test_bundle import NETWORK, make_bundle


@pytest.fixture
def path(tmp_path):
    bundle.write(make_bundle(), tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def test_weights_of_the_same_name_and_shape_are_kept(path, capsys):
    stored = bundle.read(path).weights
    net = adapt(NETWORK | {"widths": [4, 8]}, str(path))
    own = net.state_dict()
    same = [name for name in own if own[name].shape == stored[name].shape]
    assert 0 < len(same) < len(own)
    for name in same:
        torch.testing.assert_close(own[name], stored[name], rtol=0, atol=0)
    assert bundle.origin_of(net).kind == "new"
    new = capsys.readouterr().out
    assert all((name in new) == (name not in same) for name in own)


def test_a_bundle_without_any_fitting_weight_is_rejected(path, tmp_path):
    weights = {f"other.{name}": w for name, w in bundle.read(path).weights.items()}
    bundle.write(Bundle("teacher", weights, {"network": NETWORK}), tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="has no weight of this network's names and shapes"):
        adapt(NETWORK, str(tmp_path / "b.safetensors"))
