"""Compose and train multimodal Gemma 4 models whose modules each live on their own process-group grid."""

import logging
import warnings

__version__ = "0.1.0"

# Importing megatron-core reports what it does without: packages that are optional here too, and CUDA on a CPU machine.
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
warnings.filterwarnings("ignore", message="absl.logging is not installed")
warnings.filterwarnings("ignore", message="invalid escape sequence", category=SyntaxWarning, module=".*megatron.core")
logging.getLogger("torch.utils.cpp_extension").addFilter(
    lambda record: not record.getMessage().startswith("No CUDA runtime is found")
)
