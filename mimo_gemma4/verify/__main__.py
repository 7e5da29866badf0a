"""Checks that users can run on their own weights, layout and machine.

Run with:  torchrun --nproc-per-node N -m mimo_gemma4.verify hf-parity config=vlm.yaml model.hf_path=DIR [key=value …]

`hf-parity` computes the same sequences by transformers in fp32 (the truth), by transformers in the run's precision (the
peer: its error is the noise of that precision) and by the configured layout, and compares layer by layer.
"""

import argparse
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mimo_gemma4.config import load_config
from mimo_gemma4.distributed.collective_errors import all_ranks_or_raise
from mimo_gemma4.distributed.platform import destroy_distributed
from mimo_gemma4.errors import ConfigError, MimoError, report_error
from mimo_gemma4.model.mimo_model import PRECISIONS
from mimo_gemma4.train.build import build_model
from mimo_gemma4.train.setup import RunSetup, set_up_run
from mimo_gemma4.verify.parity import Deviation, GreedyAgreement, Outputs, deviation
from mimo_gemma4.verify.sequences import DatasetSequences, RandomSequences, Sequences

ALLOWED_RATIO = 1.1
"""Largest error relative to the peer's: two correct implementations round differently, but not worse."""
ROUNDING = 1e-5
"""Relative error that always passes: the order of fp32 sums alone causes as much."""
PRINTED_AT_MOST = 20
"""Number of disagreeing positions that are printed, of either kind."""


def main(arguments: list[str]) -> int:
    """Run the check that the arguments name and return the exit code: 0 if it passed, else 1."""
    parser = argparse.ArgumentParser(prog="python -m mimo_gemma4.verify", description=__doc__)
    checks = parser.add_subparsers(dest="check", required=True)
    parity = checks.add_parser("hf-parity", help="compare the configured layout with transformers")
    parity.add_argument("--samples", type=int, default=4, help="sequences to compare (default 4)")
    parity.add_argument(
        "--random-tokens", type=int, metavar="LENGTH", help="random token ids instead of samples of data.train"
    )
    parity.add_argument("--reference-device", help="where transformers runs; default: the device of rank 0")
    options, rest = parser.parse_known_args(arguments)
    try:
        return hf_parity(options, rest)
    except MimoError as error:
        report_error(error)
        return 1


def hf_parity(options: argparse.Namespace, arguments: list[str]) -> int:
    """Compare, print the table on rank 0, and return the exit code on every rank."""
    config = load_config(arguments)
    if config.model.hf_path is None:
        raise ConfigError("hf-parity compares with a Hugging Face directory: set `model.hf_path`")
    setup = set_up_run(config)
    host = setup.groups.host
    sequences: Sequences
    if options.random_tokens:
        sequences = RandomSequences(setup, options.samples, options.random_tokens)
    else:
        sequences = DatasetSequences(setup, options.samples)
    device = torch.device(options.reference_device or setup.platform.device)

    def reference() -> tuple[list[Outputs], Deviation] | None:
        return _reference(setup, sequences, device) if setup.platform.rank == 0 else None

    truth_and_peer = all_ranks_or_raise(host, reference)
    model = build_model(setup)
    for module in model.modules.values():
        module.eval()
    with torch.no_grad():
        ours = sequences.run(model)
    passed = [True]
    if truth_and_peer is not None:
        truth, peer = truth_and_peer
        found = Deviation.join([deviation(mine, true) for mine, true in zip(ours, truth, strict=True)])
        passed = [_report(found, peer, config.model.precision)]
    dist.broadcast_object_list(passed, src=0, group=host)
    setup.groups.destroy()
    destroy_distributed()
    return 0 if passed[0] else 1


def _reference(setup: RunSetup, sequences: Sequences, device: torch.device) -> tuple[list[Outputs], Deviation]:
    """Outputs of the truth, and the peer's deviation from them."""
    path, precision = str(setup.config.model.hf_path), setup.config.model.precision
    numbers = range(sequences.count)
    with _transformers_model(path, torch.float32, "eager", device) as model:
        truth = [_transformers_outputs(model, sequences.reference_inputs(number)) for number in numbers]
    with _transformers_model(path, PRECISIONS[precision], "sdpa", device) as model:
        peer = [
            deviation(_transformers_outputs(model, sequences.reference_inputs(number)), truth[number])
            for number in numbers
        ]
    return truth, Deviation.join(peer)


@contextmanager
def _transformers_model(path: str, dtype: torch.dtype, attention: str, device: torch.device) -> Iterator[nn.Module]:
    """transformers' model of a directory; its device memory is freed afterwards."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    text_only = AutoConfig.from_pretrained(path).model_type.endswith("_text")
    kind: Any = AutoModelForCausalLM if text_only else AutoModelForImageTextToText
    print(f"transformers computes the reference in {dtype}, {attention} attention, on {device}", flush=True)
    model = kind.from_pretrained(
        path, dtype=dtype, attn_implementation=attention, device_map={"": device}, local_files_only=True
    )
    yield model.eval()
    del model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@torch.no_grad()
def _transformers_outputs(model: Any, inputs: dict[str, torch.Tensor]) -> Outputs:
    text = getattr(model.model, "language_model", model.model)
    hidden: list[torch.Tensor] = []
    handles = [layer.register_forward_hook(_keep(hidden)) for layer in text.layers]
    dtypes = {True: model.dtype}
    moved = {name: value.to(model.device, dtypes.get(value.is_floating_point())) for name, value in inputs.items()}
    logits = model(**moved, use_cache=False).logits[0].float().cpu()
    for handle in handles:
        handle.remove()
    return Outputs([states[0] for states in hidden], logits)


def _keep(kept: list[torch.Tensor]) -> Callable[..., None]:
    """A forward hook that appends a layer's hidden states, copied to the host."""

    def hook(layer: nn.Module, arguments: Any, output: Any) -> None:
        kept.append((output[0] if isinstance(output, tuple) else output).cpu())

    return hook


def _report(ours: Deviation, peer: Deviation, precision: str) -> bool:
    """Print the comparison and return whether it passed."""
    from rich.console import Console
    from rich.table import Table

    table = Table("after", f"transformers {precision}", "here", "ratio", title="relative error against fp32")
    errors = [(f"layer {number}", *pair) for number, pair in enumerate(zip(peer.layers, ours.layers, strict=True))]
    errors.append(("logits", peer.logits, ours.logits))
    for name, theirs, mine in errors:
        table.add_row(name, f"{theirs:.2e}", f"{mine:.2e}", f"{mine / theirs:.2f}")
    console = Console()
    console.print(table)
    agreement = GreedyAgreement.of(ours, peer)
    positions, decided = len(agreement.decided), int(agreement.decided.sum())
    wrong = len(agreement.near_ties) + len(agreement.faults)
    print(f"greedy tokens: {positions - wrong} of {positions} equal the truth")
    print(f"decided positions (lead above twice the noise): {decided} ({decided / positions:.1%})")
    for name, places in (("near tie", agreement.near_ties), ("BUG", agreement.faults)):
        for place in places[:PRINTED_AT_MOST].tolist():
            print(
                f"  {name}: position {place}: the truth prefers its token by {ours.cost[place]:.2e}, "
                f"transformers' {precision} noise is {peer.noise[place]:.2e}"
            )
        if len(places) > PRINTED_AT_MOST:
            print(f"  … and {len(places) - PRINTED_AT_MOST} more of this kind")
    worst = max(mine / theirs for _, theirs, mine in errors)
    exact = all(mine <= max(ROUNDING, ALLOWED_RATIO * theirs) for _, theirs, mine in errors)
    passed = exact and not len(agreement.faults)
    print(
        f"{'PASSED' if passed else 'FAILED'}: largest ratio {worst:.2f} (allowed {ALLOWED_RATIO}, or errors up to "
        f"{ROUNDING:.0e}), {len(agreement.faults)} disagreements that the noise does not explain",
        flush=True,
    )
    return passed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
