"""Networks that start from the weights of a trained network with other inputs or outputs, such as other latents."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from avatar.errors import UserError
from avatar.models import bundle
from avatar.models.video_dit import VideoDiT
from avatar.nn.attention import zero_init_
from avatar.nn.embeddings import ScalarEmbedding


def adapt(network: Any, path: str) -> Any:
    """Build a network with the weights of a bundle where names and shapes agree; the others are initialised as new.

        python train.py model=adapted model.path=outputs/RUN/teacher.safetensors autoencoder.path=…

    Args:
        network: its config, as for `bundle.new`.
        path: of the bundle, of any kind.

    Raises:
        MissingFileError: no file at this path.
        UserError: an unreadable file, or one without any weight of this network.
    """
    net = bundle.new(network)
    expected, trained = net.state_dict(), bundle.read(Path(path)).weights
    same = {name: w for name, w in trained.items() if name in expected and w.shape == expected[name].shape}
    if not same:
        raise UserError(
            f"{path} has no weight of this network's names and shapes; give a bundle of the same dim, ffn and heads, "
            "or start anew with model=nano"
        )
    net.load_state_dict({name: w.to(expected[name].dtype) for name, w in same.items()}, strict=False)
    print(f"initialised anew, not from {path}: {', '.join(sorted(expected.keys() - same.keys())) or 'nothing'}")
    return net


def add_guidance_embedding(net: VideoDiT) -> None:
    """Add the embedding of a guidance scale to a network that has none, zero-initialised: its outputs stay the same."""
    if net.guidance is not None:
        return
    net.guidance = ScalarEmbedding(net.dim).to(net.modulation.weight)
    zero_init_(net.guidance.linear_2)
    origin = bundle.origin_of(net)
    network = {**origin.config["network"], "guidance_embedding": True}
    net.origin = replace(origin, config={**origin.config, "network": network})  # pyright: ignore
