"""Train a multimodal Gemma 4 whose modules each live on their own ranks.

Run with:  torchrun --nproc-per-node 4 train_mimo.py config=quickstart.yaml [key=value …]

`config=` is looked up as given, then under `configs/`. Every key: docs/config.md.
"""

import logging
import sys

from mimo_gemma4.errors import MimoError, tell


def main(arguments: list[str]) -> int:
    """Train as the arguments say; the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        train(arguments)
    except MimoError as error:
        tell(error)
        return 1
    return 0


def train(arguments: list[str]) -> None:
    """Configuration, setup, trainer; then fit."""
    from mimo_gemma4.config import load_config, print_config

    config = load_config(arguments)
    # Heavy imports after the configuration is known to be right.
    from mimo_gemma4.distributed.layout import layout_table
    from mimo_gemma4.distributed.platform import destroy_distributed
    from mimo_gemma4.train.build import build_trainer, keep_config
    from mimo_gemma4.train.report import write_report
    from mimo_gemma4.train.setup import set_up_run

    setup = set_up_run(config)
    keep_config(setup)
    if setup.platform.rank == 0:
        print_config(config)
        print(layout_table(setup.layout), flush=True)
    trainer = build_trainer(setup)
    trainer.fit()
    if setup.platform.rank == 0:
        write_report(trainer)
    setup.groups.destroy()
    destroy_distributed()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
