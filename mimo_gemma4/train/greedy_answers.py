"""Greedy answers: the language lanes extend the prompts of a microbatch token by token, its soft tokens in place."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from mimo_gemma4.data.chat import IGNORE
from mimo_gemma4.data.collate import LanguageBatch
from mimo_gemma4.data.manifest import Microbatch
from mimo_gemma4.model.mimo_model import Media, MimoModel


@dataclass(frozen=True)
class Answer:
    """One sample's first assistant turn, as generated and as written in the data; token ids, end-of-turn excluded."""

    index: int
    """Number of the sample in the dataset index."""
    predicted: list[int]
    true: list[int]


@torch.no_grad()
def greedy_answers(
    model: MimoModel,
    batch: LanguageBatch,
    microbatch: Microbatch,
    media: Media,
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int],
) -> list[Answer]:
    """Answer the first assistant turn of every sample of a padded microbatch, or of an empty one.

    Collective over the language lane and the lanes that share its experts.

    A prompt ends at the first position that has a label; everything after it is blanked, so that the model sees nothing
    of the true answer. Every new token takes a forward pass over the whole microbatch: exact under any layout, and
    affordable because evaluation answers are short.

    Args:
        model: the composed model, on a language rank.
        batch: the lane's microbatch, host tensors [B, S].
        microbatch: its place in the manifest.
        media: positions and soft tokens, as the bridges delivered them.
        max_new_tokens: longest answer; an answer also ends with its sequence.
        stop_ids: token ids that end an answer.
    """
    if not microbatch.sequences:
        _serve_other_lanes(model, max_new_tokens)
        return []
    labelled = (batch.labels != IGNORE).any(dim=1)  # a sample masked for corrupt media has no label and no answer
    last_prompt = (batch.labels != IGNORE).int().argmax(dim=1)  # [B]
    media = [_media_of_prompts(model, microbatch, part, last_prompt) for part in media]
    open_batch = _without_answers(batch, last_prompt)
    sequences = torch.arange(microbatch.sequences)
    done = ~labelled
    for offset in range(max_new_tokens):
        at = last_prompt + offset
        done |= at + 1 >= microbatch.seq_length
        if done.all():
            _serve_other_lanes(model, max_new_tokens - offset)
            break
        _any_lane_generates(model, True)  # answers the lanes that share its experts
        tokens = _next_tokens(model, open_batch, microbatch, media, at.clamp(max=microbatch.seq_length - 1))
        tokens = tokens.masked_fill(done, 0)
        open_batch.input_ids[sequences[~done], at[~done] + 1] = tokens[~done]
        done |= torch.isin(tokens, torch.tensor(sorted(stop_ids)))
    answers = []
    for planned in microbatch.samples:
        if labelled[planned.sequence]:
            start = last_prompt[planned.sequence]
            predicted = open_batch.input_ids[planned.sequence, start + 1 :].tolist()[:max_new_tokens]
            true = _first_turn(batch.labels[planned.sequence, start:].tolist())
            answers.append(Answer(planned.index, _until_stop(predicted, stop_ids), _until_stop(true, stop_ids)))
    return answers


def _without_answers(batch: LanguageBatch, last_prompt: torch.Tensor) -> LanguageBatch:
    """A padded microbatch [B, S] whose positions after `last_prompt` [B] are blanked, as room for answers."""
    columns = torch.arange(batch.input_ids.shape[1])
    after = columns > last_prompt[:, None]
    return LanguageBatch(
        input_ids=batch.input_ids.masked_fill(after, 0),
        labels=torch.full_like(batch.labels, IGNORE),
        positions=columns.expand_as(batch.positions),
        segments=torch.ones_like(batch.segments),
        groups=batch.groups.masked_fill(after, 0),
    )


def _serve_other_lanes(model: MimoModel, tokens: int) -> None:
    """Run this rank's experts for the lanes that share them and still generate, for at most `tokens` tokens."""
    assert model.language is not None
    for _ in range(tokens):
        if not _any_lane_generates(model, False):
            return
        model.language.serve_experts()


def _any_lane_generates(model: MimoModel, this_lane: bool) -> bool:
    """Whether this lane, or one that shares its experts, has an answer that needs another token."""
    assert model.language is not None
    if not model.language.shares_experts:
        return this_lane
    generating = torch.tensor(int(this_lane), device=model.platform.device)
    dist.all_reduce(generating, op=dist.ReduceOp.MAX, group=model.groups.modules["language"].ep)
    return bool(generating.item())


def _media_of_prompts(
    model: MimoModel, microbatch: Microbatch, media: tuple[torch.Tensor, torch.Tensor], last_prompt: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The soft tokens that lie in the prompts: those of later turns would overwrite generated tokens."""
    assert model.adapter is not None
    positions, soft_tokens = media
    index = model.adapter.token_index(microbatch.seq_length)
    if model.adapter.config.tp_size > 1:  # under sequence parallelism flat positions count this rank's share
        index = index.chunk(model.adapter.config.tp_size)[model.groups.modules["language"].tp.rank()]
    kept = index[positions // microbatch.sequences] <= last_prompt[positions % microbatch.sequences]
    return positions[kept], soft_tokens[kept.to(soft_tokens.device)]


def _next_tokens(
    model: MimoModel, batch: LanguageBatch, microbatch: Microbatch, media: Media, at: torch.Tensor
) -> torch.Tensor:
    """The most likely token after position `at[b]` of each sequence: [B] on the host, equal on the whole lane."""
    assert model.adapter is not None
    groups = model.groups.modules["language"]
    hidden = model.hidden(model.local_tokens(batch, microbatch), media)
    chosen = torch.full((microbatch.sequences,), -1)
    if hidden is not None:
        assert model.language is not None
        predicted = model.language.greedy_tokens(hidden).cpu()  # [B, S/cp] (local)
        here = model.adapter.token_index(microbatch.seq_length)[None, :] == at[:, None]
        chosen = torch.where(here, predicted, -1).amax(dim=1)
    chosen = chosen.to(model.platform.device)
    for group in (groups.cp, groups.pp):  # one context-parallel rank of the last stage knows it
        dist.all_reduce(chosen, op=dist.ReduceOp.MAX, group=group)
    return chosen.cpu()


def _first_turn(labels: list[int]) -> list[int]:
    """The labels before the first position without one."""
    end = labels.index(IGNORE) if IGNORE in labels else len(labels)
    return labels[:end]


def _until_stop(ids: list[int], stop_ids: frozenset[int]) -> list[int]:
    for position, token in enumerate(ids):
        if token in stop_ids:
            return ids[:position]
    return ids
