"""Import the heavy libraries once, before any test forks ranks."""

import os

# Counting GPUs must not initialise CUDA, which forked ranks could not use any more.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import megatron.core  # noqa: E402, F401
import pytest  # noqa: E402
import torch  # noqa: E402
import transformers.models.gemma4.modeling_gemma4  # noqa: E402, F401
import transformers.utils.chat_template_utils  # noqa: E402, F401

import mimo_gemma4.train.build  # noqa: E402, F401
from mimo_gemma4.encoders.registry import registered_encoders  # noqa: E402

registered_encoders()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests where there is no GPU, and say so."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no GPU on this machine"))
