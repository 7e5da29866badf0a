"""Counts the tokens of shards ahead of a training, on several cores."""

import argparse
import os
from collections import Counter
from collections.abc import Sequence

from mimo_gemma4.config import ModelConfig
from mimo_gemma4.data.index import ShardIndex
from mimo_gemma4.data.inspect import build_encoder
from mimo_gemma4.data.shards import Shard
from mimo_gemma4.data.token_index import TokenIndex, encode_ahead, left_out_text
from mimo_gemma4.errors import ConfigError


def index_tokens(shards: Sequence[Shard], options: argparse.Namespace) -> Counter[str]:
    """Keep the token index of every shard beside it and print what is in it; the faults of its samples.

    `options`: hf_path, preset, thoughts and workers of the command. Raises `MimoError`, as the training would.
    """
    workers = len(os.sched_getaffinity(0)) if options.workers is None else options.workers
    if workers < 1:
        raise ConfigError(f"--workers is {workers}; it must be at least 1")
    model = ModelConfig(preset=options.preset or ModelConfig.preset, hf_path=options.hf_path)
    encoder = build_encoder(model, options.thoughts)
    faults, left_out, tokens, loss_tokens = Counter[str](), Counter[str](), 0, 0
    if workers > 1:
        encode_ahead(shards, encoder, workers)
    for shard in shards:
        index = ShardIndex.open(shard)
        table = TokenIndex.open(shard, index, encoder)
        for number, fault, reason in zip(table.bad_samples, table.bad_faults, table.bad_reasons, strict=True):
            print(f"  {fault}: __key__ {index.key(int(number))!r}: {reason}")
        faults.update(table.bad_faults.tolist())
        left_out.update(dict(zip(table.left_out.tolist(), table.left_out_counts.tolist(), strict=True)))
        tokens, loss_tokens = tokens + int(table.length.sum()), loss_tokens + int(table.loss_tokens.sum())
    print(f"{tokens:,} tokens, {loss_tokens:,} with loss")
    if left_out:
        print(f"not trained on: {left_out_text(left_out)}")
    return faults
