"""Greedy answers: the language lanes extend their own prompts, token by token, with media rows already in place."""

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

    A prompt ends at the first position that has a label; everything behind it is blanked, so nothing of the true answer
    is seen. Every round runs the whole microbatch again: exact under any layout, and evaluation answers are short.

    Args:
        model: the composed model, on a language rank.
        batch: the lane's microbatch, host tensors [B, S].
        microbatch: its place in the manifest.
        media: positions and rows of the media, as the bridges delivered them.
        max_new_tokens: longest answer; an answer also ends at the end of its row.
        stop_ids: token ids that end an answer.
    """
    if not microbatch.sequences:
        _serve_other_lanes(model, max_new_tokens)
        return []
    labelled = (batch.labels != IGNORE).any(dim=1)  # a sample masked for corrupt media has no label and no answer
    last_prompt = (batch.labels != IGNORE).int().argmax(dim=1)  # [B]
    media = [_of_prompts(model, microbatch, part, last_prompt) for part in media]
    open_batch = _blanked_behind(last_prompt, batch)
    rows = torch.arange(microbatch.sequences)
    done = ~labelled
    for offset in range(max_new_tokens):
        at = last_prompt + offset
        done |= at + 1 >= microbatch.seq_length
        if done.all():
            _serve_other_lanes(model, max_new_tokens - offset)
            break
        _any_lane_goes_on(model, True)
        tokens = _next_tokens(model, open_batch, microbatch, media, at.clamp(max=microbatch.seq_length - 1))
        tokens = tokens.masked_fill(done, 0)
        open_batch.input_ids[rows[~done], at[~done] + 1] = tokens[~done]
        done |= torch.isin(tokens, torch.tensor(sorted(stop_ids)))
    return [
        Answer(
            planned.index,
            _until_stop(
                open_batch.input_ids[planned.sequence, last_prompt[planned.sequence] + 1 :].tolist()[:max_new_tokens],
                stop_ids,
            ),
            _until_stop(
                _first_turn(batch.labels[planned.sequence, last_prompt[planned.sequence] :].tolist()), stop_ids
            ),
        )
        for planned in microbatch.samples
        if labelled[planned.sequence]
    ]


def _blanked_behind(last_prompt: torch.Tensor, batch: LanguageBatch) -> LanguageBatch:
    """The prompts of a padded microbatch [B, S], whose rows end at `last_prompt` [B], with room for answers."""
    columns = torch.arange(batch.input_ids.shape[1])
    behind = columns > last_prompt[:, None]
    return LanguageBatch(
        input_ids=batch.input_ids.masked_fill(behind, 0),
        labels=torch.full_like(batch.labels, IGNORE),
        positions=columns.expand_as(batch.positions),
        segments=torch.ones_like(batch.segments),
        groups=batch.groups.masked_fill(behind, 0),
    )


def _serve_other_lanes(model: MimoModel, rounds: int) -> None:
    """Run this rank's experts for the lanes that share them and still extend answers, for at most `rounds` tokens."""
    assert model.language is not None
    for _ in range(rounds):
        if not _any_lane_goes_on(model, False):
            return
        model.language.serve_experts()


def _any_lane_goes_on(model: MimoModel, this_lane: bool) -> bool:
    """Whether this lane, or one that shares its experts, has an answer to extend by another token."""
    assert model.language is not None
    if not model.language.shares_experts:
        return this_lane
    going = torch.tensor(int(this_lane), device=model.platform.device)
    dist.all_reduce(going, op=dist.ReduceOp.MAX, group=model.groups.modules["language"].ep)
    return bool(going.item())


def _of_prompts(
    model: MimoModel, microbatch: Microbatch, media: tuple[torch.Tensor, torch.Tensor], last_prompt: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The media rows that lie in the prompts: those of later turns would overwrite generated tokens."""
    assert model.adapter is not None
    positions, rows = media
    index = model.adapter.token_index(microbatch.seq_length)
    if model.adapter.config.tp_size > 1:  # under sequence parallelism flat positions count this rank's share
        index = index.chunk(model.adapter.config.tp_size)[model.groups.modules["language"].tp.rank()]
    kept = index[positions // microbatch.sequences] <= last_prompt[positions % microbatch.sequences]
    return positions[kept], rows[kept.to(rows.device)]


def _next_tokens(
    model: MimoModel, batch: LanguageBatch, microbatch: Microbatch, media: Media, at: torch.Tensor
) -> torch.Tensor:
    """The most likely token after position `at[b]` of each row: [B] on the host, equal on the whole lane."""
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
    for group in (groups.cp, groups.pp):  # one context parallel rank of the last stage knows it
        dist.all_reduce(chosen, op=dist.ReduceOp.MAX, group=group)
    return chosen.cpu()


def _first_turn(labels: list[int]) -> list[int]:
    """The leading run of labels."""
    end = labels.index(IGNORE) if IGNORE in labels else len(labels)
    return labels[:end]


def _until_stop(ids: list[int], stop_ids: frozenset[int]) -> list[int]:
    for position, token in enumerate(ids):
        if token in stop_ids:
            return ids[:position]
    return ids
