"""SigLIP in place of Gemma 4's vision tower, as an example of an encoder: transformers' SigLIP and an MLP projector.

Every image is resized to one square; each patch becomes a soft token.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, SiglipVisionConfig

from mimo_gemma4.distributed.megatron_config import module_config
from mimo_gemma4.distributed.module_context import ModuleContext
from mimo_gemma4.encoders.base import Encoder
from mimo_gemma4.encoders.image_file import read_image
from mimo_gemma4.errors import ConfigError, LayoutError
from mimo_gemma4.media import MediaHeader
from mimo_gemma4.weights.bindings import ONES, Binding, Constant, Normal, bind_replicated

DEFAULTS: dict[str, Any] = {
    "do_resize": True,
    "size": None,
    "resample": Image.Resampling.BICUBIC,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": 0.5,
    "image_std": 0.5,
}
"""The keys of `preprocessor_config.json` that change pixels, with transformers' defaults."""
IGNORED = frozenset(
    "image_processor_type feature_extractor_type processor_class data_format input_data_format device do_convert_rgb "
    "default_to_square return_tensors disable_grouping image_seq_length".split()
)
"""Keys that change no pixel."""


@dataclass(frozen=True)
class SiglipProcessor:
    """Images as squares of pixels; an item is {"pixels": [3, image_size, image_size] uint8}."""

    image_size: int
    """Pixels on the side of the square."""
    patch_size: int
    """Pixels on the side of a patch."""
    resample: int = Image.Resampling.BICUBIC
    """Filter of Pillow."""
    divisor: tuple[float, ...] = (127.5,) * 3
    """Of each channel: the encoder sees pixels / divisor - shift."""
    shift: tuple[float, ...] = (1.0,) * 3

    modality = "vision"
    content_type = "image"

    @classmethod
    def from_config(cls, hf_config: dict[str, Any]) -> Self:
        """Read `vision_config`, and SigLIP's `preprocessor_config.json` in `vision_processor`. Raises `ConfigError`."""
        vision = SiglipVisionConfig(**hf_config["vision_config"]).to_dict()
        square = {"height": vision["image_size"], "width": vision["image_size"]}
        given = {key: value for key, value in (hf_config.get("vision_processor") or {}).items() if value is not None}
        options = DEFAULTS | given
        wrong = {key: value for key, value in given.items() if key not in DEFAULTS.keys() | IGNORED and value}
        if not options["do_resize"] or options["size"] not in (None, square):
            wrong |= {key: options[key] for key in ("do_resize", "size")}
        if wrong:
            raise ConfigError(
                f"vision_processor: {wrong} is not supported; SigLIP's images are resized to {square}, rescaled and "
                "normalised. Correct preprocessor_config.json or modules.vision.processor"
            )
        factor = options["rescale_factor"] if options["do_rescale"] else 1.0
        mean, std = (options["image_mean"], options["image_std"]) if options["do_normalize"] else (0.0, 1.0)
        try:
            means, deviations = np.broadcast_to(mean, 3), np.broadcast_to(std, 3)
            if not (deviations > 0).all() or not factor > 0 or not np.isfinite([means, deviations]).all():
                raise ValueError("image_std and rescale_factor must be positive, image_mean finite")
            divisor, shift = deviations / factor, means / deviations
            resample = Image.Resampling(options["resample"])
        except (TypeError, ValueError) as error:
            raise ConfigError(f"vision_processor: {options} cannot be followed: {error}") from error
        return cls(square["width"], vision["patch_size"], resample, tuple(divisor.tolist()), tuple(shift.tolist()))

    def soft_tokens(self, header: MediaHeader) -> int:
        """One per patch, whatever the image's size."""
        return (self.image_size // self.patch_size) ** 2

    def cost(self, header: MediaHeader) -> float:
        """All images cost the same."""
        return 1.0

    def decode(self, data: bytes) -> dict[str, Tensor]:
        """Read and resize a file. Raises `OSError` or `ValueError` for a damaged one."""
        image = read_image(data).resize((self.image_size, self.image_size), Image.Resampling(self.resample))
        return {"pixels": torch.from_numpy(np.array(image)).permute(2, 0, 1)}

    def placeholder(self, header: MediaHeader) -> dict[str, Tensor]:
        """A black square."""
        return {"pixels": torch.zeros(3, self.image_size, self.image_size, dtype=torch.uint8)}

    def collate(self, items: list[dict[str, Tensor]]) -> dict[str, Any]:
        """Stack images: pixels [images, 3, image_size, image_size] uint8."""
        return {"pixels": torch.stack([item["pixels"] for item in items])}


class SiglipEncoder(Encoder):
    """SigLIP tower without its pooling head, then Linear → GELU → Linear to the language model's width."""

    modality = "vision"
    architecture = "siglip_vision_model"
    processor = SiglipProcessor
    divisor: Tensor
    """[3, 1, 1]; the tower sees pixels / divisor - shift."""
    shift: Tensor
    """[3, 1, 1]."""

    def __init__(self, hf_config: dict[str, Any], context: ModuleContext):
        """Build it as `Encoder` says; "full" recomputes the tower in backward, "selective" is as "none"."""
        super().__init__(hf_config, context)
        tp, dtype, hidden = context.groups.tp.size(), context.dtype, context.language_hidden
        if tp > 1:
            raise LayoutError(f"layout.vision.tp={tp}: SigLIP is not cut; take tp: 1 and more lanes")
        self.vision = SiglipVisionConfig(**{**hf_config["vision_config"], "vision_use_head": False})
        self.images = SiglipProcessor.from_config(hf_config)
        width = self.vision.hidden_size
        self.config = module_config(1, dtype, hidden_size=width)
        with torch.device(context.device):
            self.register_buffer("divisor", torch.tensor(self.images.divisor).view(3, 1, 1), persistent=False)
            self.register_buffer("shift", torch.tensor(self.images.shift).view(3, 1, 1), persistent=False)
            self.tower = AutoModel.from_config(self.vision, dtype=dtype, attn_implementation="sdpa")
            self.projector = nn.Sequential(
                nn.Linear(width, hidden, dtype=dtype),
                nn.GELU(),
                nn.Linear(hidden, hidden, dtype=dtype),
            )
        self.recompute_tower = context.activation_checkpointing == "full"

    def forward(self, pixels: Tensor) -> Tensor:
        """[images, 3, image_size, image_size] uint8 → [soft tokens, language_hidden]."""
        pixels = pixels.float() / self.divisor - self.shift
        if self.recompute_tower and torch.is_grad_enabled():
            hidden = checkpoint(self.tower, pixels, use_reentrant=False, preserve_rng_state=False).last_hidden_state
        else:
            hidden = self.tower(pixels).last_hidden_state  # [images, patches, D]
        return self.projector(hidden.flatten(0, 1))

    def flops(self, headers: Iterable[MediaHeader]) -> float:
        """Forward operations: every weight matrix times every patch, and attention between the patches of an image."""
        patches = self.images.soft_tokens(MediaHeader())
        matrices = sum(parameter.numel() for parameter in self.parameters() if parameter.ndim > 1)
        matrices -= self.tower.embeddings.position_embedding.weight.numel()
        attention = 4.0 * self.vision.num_hidden_layers * self.vision.hidden_size * patches**2
        return sum(2.0 * matrices * patches + attention for _ in headers)

    def bindings(self) -> list[Binding]:
        """The tower under the names of SigLIP's own checkpoints, the projector under `model.multi_modal_projector.`."""
        bindings = []
        for prefix, part in (("vision_model.", self.tower), ("model.multi_modal_projector.", self.projector)):
            for module_name, module in part.named_modules():
                for name, parameter in module.named_parameters(module_name, recurse=False):
                    if name.endswith("bias"):
                        initial: Normal | Constant = Constant(0.0)
                    elif isinstance(module, nn.LayerNorm):
                        initial = ONES
                    else:
                        initial = Normal(parameter[0].numel() ** -0.5)
                    bindings.append(bind_replicated(prefix + name, parameter, initial))
        return bindings

    def projector_parameters(self) -> list[nn.Parameter]:
        """The MLP."""
        return list(self.projector.parameters())
