"""Train a multimodal Gemma 4 whose modules each live on their own ranks.

torchrun starts one process per rank. The first two commands do the same; the second needs no `mimo-train` on the PATH,
and the third works in a checkout:

    torchrun --nproc-per-node 4 --no-python mimo-train config=quickstart.yaml [key=value …]
    torchrun --nproc-per-node 4 -m mimo_gemma4.cli.train config=quickstart.yaml [key=value …]
    torchrun --nproc-per-node 4 train_mimo.py config=quickstart.yaml [key=value …]

Without torchrun, `mimo-train` is the only rank. `config=` is looked up as given, then in the folder `configs/` here,
then among the files that come with the package. Every key: docs/config.md.
"""

import logging
import sys

from mimo_gemma4.errors import MimoError, report_error


def main(arguments: list[str] | None = None) -> int:
    """Train as the arguments say (default: those of the command line) and return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        train(arguments)
    except MimoError as error:
        report_error(error)
        return 1
    return 0


def train(arguments: list[str]) -> None:
    """Load the configuration, build the trainer and fit."""
    from mimo_gemma4.config import load_config, print_config

    config = load_config(arguments)
    # Heavy imports only after the configuration is known to be right.
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
    language = trainer.model.language
    if language is not None and setup.platform.rank == setup.layout.language.ranks[0]:
        print("\n".join(f"{name}: {kernel}" for name, kernel in language.attention.described.items()), flush=True)
    trainer.fit()
    if setup.platform.rank == 0:
        write_report(trainer)
    setup.groups.destroy()
    destroy_distributed()


if __name__ == "__main__":
    sys.exit(main())
