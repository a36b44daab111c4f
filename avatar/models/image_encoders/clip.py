"""CLIP's image encoder (arXiv:2103.00020), whose states Wan 2.1's image-to-video networks take.

They take those that enter the last layer, of all patches and of the picture as a whole.
"""

import hashlib
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionModel

from avatar.errors import UserError
from avatar.media.frames import to_uint8
from avatar.models import hub
from avatar.models.bundle import fingerprint


class CLIP(nn.Module):
    """Pictures → the states of CLIP's layer before the last.

    Args:
        weights: a folder, or a repository's name in the Hugging Face cache, such as a Wan pipeline's.
        encoder, processor: folders in there of the two parts; "." where all is in one.
    """

    def __init__(self, weights: str, encoder: str = "image_encoder", processor: str = "image_processor"):
        super().__init__()
        parts = f'--include "{encoder}/*" "{processor}/*"'
        path = hub.folder(weights, "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", parts)
        hub.file(path / processor / "preprocessor_config.json", weights)
        self.net = hub.load(CLIPVisionModel, path / encoder)
        self.processor = CLIPImageProcessorPil.from_pretrained(path / processor, local_files_only=True)
        self.dim, size = self.net.config.hidden_size, self.net.config.image_size
        made = (self.processor.crop_size["height"], self.processor.crop_size["width"])
        if made != (size, size):
            raise UserError(
                f"{weights} makes pictures of {made[0]}×{made[1]}, but takes {size}×{size}; get its "
                f"{processor}/preprocessor_config.json anew"
            )

    @torch.no_grad()
    def encode(self, pictures: Float[Tensor, "b c 1 h w"]) -> Float[Tensor, "b i g"]:
        """Features of pictures in [-1, 1], of any size: their middle square is what is seen. Errors: no RGB."""
        if pictures.shape[1] != 3:
            raise UserError(
                f"pictures of {pictures.shape[1]} channels for CLIP, which takes RGB; choose another autoencoder="
            )
        frames = list(to_uint8(pictures[:, :, 0].transpose(0, 1)))
        weight = self.net.get_parameter("post_layernorm.weight")
        pixels = self.processor(frames, return_tensors="pt", input_data_format="channels_last").pixel_values
        return self.net(pixels.to(weight), output_hidden_states=True).hidden_states[-2].float()

    @cached_property
    def _fingerprint(self) -> str:
        made = hashlib.sha256(self.processor.to_json_string().encode()).hexdigest()[:16]
        return f"{fingerprint(self.net.state_dict())}, {made}"

    def __repr__(self) -> str:
        """All that the features depend on, wherever it lies."""
        return f"CLIP({self._fingerprint})"
