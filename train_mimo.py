"""Train a multimodal Gemma 4 whose modules each live on their own ranks: `mimo-train` of a checkout.

Run with:  torchrun --nproc-per-node 4 train_mimo.py config=quickstart.yaml [key=value …]

`config=` is looked up as given, then under `configs/`. Every key: docs/config.md.
"""

import sys

from mimo_gemma4.cli.train import main, train

__all__ = ["main", "train"]

if __name__ == "__main__":
    sys.exit(main())
