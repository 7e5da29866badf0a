"""transformers' audio tower and projector under the names of the whole model, with random weights."""

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers.models.gemma4.configuration_gemma4 import Gemma4AudioConfig, Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4AudioModel, Gemma4MultimodalEmbedder

# Up to 5.19 the tower reads its mask as a boolean one, which `eager` does not make: it would attend to what is masked.
ATTENTION = "eager" if Version(transformers.__version__) >= Version("5.20") else "sdpa"


class AudioReference(nn.Module):
    """Its state dict has the names of `Gemma4Model` without `model.`."""

    def __init__(self, options: dict, language_hidden: int):
        super().__init__()
        config = Gemma4AudioConfig(**options)
        config._attn_implementation = ATTENTION
        self.audio_tower = Gemma4AudioModel(config)
        self.embed_audio = Gemma4MultimodalEmbedder(config, Gemma4TextConfig(hidden_size=language_hidden))

    @torch.no_grad()
    def randomise(self, seed: int) -> None:
        """Weights of unit gain, and clip bounds that some of the activations exceed."""
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in self.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith(("_min", "_max")):
                tensor.copy_((1.5 + 0.2 * noise.abs()) * (1 if name.endswith("max") else -1))
            elif "norm" in name:
                tensor.copy_(1 + 0.2 * noise)
            elif tensor.dim() == 1:
                tensor.copy_(0.5 * noise)
            else:
                tensor.copy_(noise / tensor[0].numel() ** 0.5)

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        """[frames, 128] per sound → [rows, language_hidden], sound by sound."""
        padded = nn.utils.rnn.pad_sequence(features, batch_first=True)
        lengths = torch.tensor([len(sound) for sound in features], device=padded.device)
        mask = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
        output = self.audio_tower(padded, mask)
        return self.embed_audio(output.last_hidden_state)[output.attention_mask]
