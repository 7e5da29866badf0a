"""Train a multimodal Gemma 4 whose modules each live on their own ranks.

Run with:  torchrun --nproc-per-node 4 train_mimo.py config=quickstart.yaml [key=value …]

`config=` is looked up as given, then under `configs/`. Every key: docs/config.md.
"""

import logging
import os
import sys
from datetime import timedelta
from pathlib import Path

from mimo_gemma4.errors import MimoError


def main(arguments: list[str]) -> int:
    """Train as the arguments say; the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        train(arguments)
    except MimoError as error:
        # Every rank of a host raises alike: said once. A file may be missing on one host alone, so every host speaks.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"\n{type(error).__name__}: {error}\n", file=sys.stderr, flush=True)
        return 1
    return 0


def train(arguments: list[str]) -> None:
    """Configuration, platform, layout, groups; then build and fit."""
    from mimo_gemma4.config import load_config, print_config, save_config

    config = load_config(arguments)
    # Heavy imports after the configuration is known to be right.
    from mimo_gemma4.build import Foundation, build_trainer
    from mimo_gemma4.layout import build_layout, layout_table
    from mimo_gemma4.platform import create_platform, destroy_distributed, ranks_per_host
    from mimo_gemma4.presets import load_model_config
    from mimo_gemma4.process_groups import create_process_groups
    from mimo_gemma4.report import write_report

    hf_config = load_model_config(config.model)
    platform = create_platform(
        deterministic=config.run.deterministic, timeout=timedelta(seconds=config.run.timeout_seconds)
    )
    layout = build_layout(config.layout, int(os.environ.get("WORLD_SIZE", "1")), ranks_per_host())
    if platform.rank == 0:
        Path(config.run.dir).mkdir(parents=True, exist_ok=True)
        print_config(config)
        save_config(config, Path(config.run.dir) / "config.yaml")
        print(layout_table(layout), flush=True)
    groups = create_process_groups(layout, platform)
    trainer = build_trainer(Foundation(config, hf_config, layout, platform, groups))
    trainer.fit()
    if platform.rank == 0:
        write_report(trainer)
    groups.destroy()
    destroy_distributed()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
