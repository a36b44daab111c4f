"""CLIP's image encoder (arXiv:2103.00020), for Wan 2.1's image-to-video networks.

Its features are the hidden states before the last layer, of all patches and the class token.
"""

import hashlib
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPVisionModel

from avatar.errors import UserError
from avatar.media.frames import to_uint8
from avatar.models import hub


class CLIP(hub.FrozenNetwork):
    """Image encoder: CLIP's hidden states before its last layer.

    Args:
        weights: a folder, or a repository's name in the Hugging Face cache, such as a Wan pipeline's.
        encoder, processor: subfolders of the two parts; "." if there are none.

    Raises:
        MissingFileError: no weights.
        UserError: damaged weights, or a preprocessor config that does not fit them.
    """

    def __init__(self, weights: str, encoder: str = "image_encoder", processor: str = "image_processor"):
        super().__init__()
        parts = f'--include "{encoder}/*" "{processor}/*"'
        path = hub.folder(weights, "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", parts)
        hub.file(path / processor / "preprocessor_config.json", weights)
        self.net = hub.load(CLIPVisionModel, path / encoder)
        self.processor = CLIPImageProcessorPil.from_pretrained(path / processor, local_files_only=True)
        self.dim, size = self.net.config.hidden_size, self.net.config.image_size
        crop = (self.processor.crop_size["height"], self.processor.crop_size["width"])
        if crop != (size, size):
            raise UserError(
                f"{weights} crops images to {crop[0]}×{crop[1]}; expected {size}×{size}: download its "
                f"{processor}/preprocessor_config.json again"
            )

    @torch.no_grad()
    def encode(self, pictures: Float[Tensor, "b c 1 h w"]) -> Float[Tensor, "b i g"]:
        """Features (i tokens of width g = `dim`) of the centre crop of images in [-1, 1], of any size.

        Raises:
            UserError: images that are not RGB.
        """
        if pictures.shape[1] != 3:
            raise UserError(f"got images of {pictures.shape[1]} channels; expected RGB: choose another autoencoder=")
        frames = list(to_uint8(pictures[:, :, 0].transpose(0, 1)))
        weight = self.net.get_parameter("post_layernorm.weight")
        pixels = self.processor(frames, return_tensors="pt", input_data_format="channels_last").pixel_values
        return self.net(pixels.to(weight), output_hidden_states=True).hidden_states[-2].float()

    @property
    def fingerprint(self) -> str:
        """The weights and the preprocessing that features depend on."""
        return f"clip({self.weights_hash},processor={self._processor_hash})"

    @cached_property
    def _processor_hash(self) -> str:
        return hashlib.sha256(self.processor.to_json_string().encode()).hexdigest()[:16]
