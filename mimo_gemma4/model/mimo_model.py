"""What this rank holds of the composed model, and what each role computes.

A `MimoModel` is built on every rank and holds only the modules whose grids contain the rank. Encoders turn media into
soft tokens; bridges move them; the language role embeds its local tokens, splices the soft tokens over the placeholders
and runs Gemma 4; decoders turn its final hidden states at soft tokens into a loss. No rank ever builds a whole
`[S, B, H]`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mimo_gemma4.config import Config
from mimo_gemma4.data.collate import LanguageBatch
from mimo_gemma4.data.manifest import Microbatch
from mimo_gemma4.decoders.base import Decoder
from mimo_gemma4.decoders.registry import build_decoder
from mimo_gemma4.distributed.layout import Layout
from mimo_gemma4.distributed.module_context import ModuleContext
from mimo_gemma4.distributed.pipeline import Pipeline
from mimo_gemma4.distributed.platform import Platform
from mimo_gemma4.distributed.process_groups import ProcessGroups
from mimo_gemma4.encoders.base import Encoder, StagedEncoder
from mimo_gemma4.encoders.registry import build_encoder
from mimo_gemma4.language.attention_context import AttentionContext, attention_context
from mimo_gemma4.language.config import Gemma4TextConfig
from mimo_gemma4.language.model import Gemma4LanguageModel
from mimo_gemma4.language.stages import LanguageStage, StageTensors, cut_stages
from mimo_gemma4.model.bridge import Bridge
from mimo_gemma4.partition import PartitionAdapter, PartitionConfig, cp_token_index
from mimo_gemma4.weights.bindings import BoundModule

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
Media = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Per encoder: flat positions [n] on the host and soft tokens [n, H], as its bridge delivered them."""


@dataclass(frozen=True)
class LocalTokens:
    """One microbatch as this language rank sees it: everything cut to the CP-local sequence, on the device."""

    input_ids: torch.Tensor
    """[B, S/cp] (local)."""
    labels: torch.Tensor
    """[B, S/cp] (local), -100 where there is no loss."""
    context: AttentionContext
    """Positions, and what local queries see in each type of attention."""


class MimoModel:
    """The modules, bridges and partition adapter of one rank."""

    def __init__(
        self, config: Config, hf_config: dict[str, Any], layout: Layout, groups: ProcessGroups, platform: Platform
    ):
        """Build the modules that this rank holds; their weights are uninitialised (see `weights.bindings`).

        Args:
            config: the run's options.
            hf_config: model configuration in the shape of a Hugging Face `config.json`.
            layout: all grids.
            groups: process groups of this rank.
            platform: device and backend.
        """
        self.config, self.layout, self.groups, self.platform = config, layout, groups, platform
        self.rank = platform.rank
        self.dtype = PRECISIONS[config.model.precision]
        self.text = Gemma4TextConfig.from_hf(hf_config)
        self.language: Gemma4LanguageModel | None = None
        self.encoders: dict[str, Encoder] = {}
        self.decoders: dict[str, Decoder] = {}
        self.adapter: PartitionAdapter | None = None
        if "language" in groups.modules:
            self._build_language()
        for name in layout.encoders:
            if name in groups.modules:
                self.encoders[name] = build_encoder(name, hf_config, self._context(name))
        for name in layout.decoders:
            if name in groups.modules:
                self.decoders[name] = self._decoder(name)
        held: dict[str, BoundModule] = {**self.encoders, **self.decoders}
        if self.language is not None:
            held["language"] = self.language
        self.modules = {name: held[name] for name in layout.grids if name in held}
        """This rank's modules by name, in the layout's order, as they are trained: with their adapters, if any."""
        self.trained_from: dict[str, int] = {}
        """The first pipeline stage that trains of each encoder that does; `train.build.build_modules` finds it out.
        Decoders are in it where something trains that the gradient of their states reaches."""
        self.pipelines = {name: self._pipeline(name) for name in self.modules if layout.grids[name].pp > 1}
        """This rank's neighbours in the pipelines of its modules."""
        names = (*layout.encoders, *layout.decoders)
        self.bridges = {name: self._bridge(name) for name in names if self.rank in sum(layout.edge(name), ())}
        """By encoder or decoder, the edge between it and the language module, where this rank has a part in it."""

    def _build_language(self) -> None:
        grid, groups = self.layout.language, self.groups.modules["language"]
        sequence_parallel = grid.sequence_parallel and grid.tp > 1
        self.language = Gemma4LanguageModel(
            self.text,
            groups,
            sequence_parallel=sequence_parallel,
            dtype=self.dtype,
            device=self.platform.device,
            activation_checkpointing=self.config.train.activation_checkpointing,
            backend=self.config.model.backend,
            attention=self.config.model.attention,
            stage=self._stage(),
        )
        self.adapter = PartitionAdapter(
            PartitionConfig(
                sequence_parallel=sequence_parallel,
                tp_group=groups.tp,
                cp_group=groups.cp,
                max_seq_len=self.config.data.seq_length,
            )
        )

    def _stage(self) -> LanguageStage:
        """What of the language model this rank holds."""
        grid, options = self.layout.language, self.config.layout.modules["language"]
        stages = cut_stages(
            self.text,
            grid.pp,
            sequence_length=self.config.data.seq_length,
            part_shared_key_values=options.part_shared_key_values,
        )
        return stages[grid.coordinate(self.rank).pp]

    def _pipeline(self, module: str) -> Pipeline:
        forward_group, backward_group = self.groups.modules[module].pp, self.groups.pipeline_backward[module]
        assert backward_group is not None
        grid = self.layout.grids[module]
        return Pipeline(grid, self.rank, forward_group, backward_group, self.dtype, self.platform.device)

    def _decoder(self, name: str) -> Decoder:
        options = self.config.module(name)
        return build_decoder(name, options.decoder, options.decoder_options, self._context(name))

    def _context(self, name: str) -> ModuleContext:
        """What this rank's part of an encoder or decoder is built from."""
        grid = self.layout.grids[name]
        return ModuleContext(
            self.groups.modules[name],
            language_hidden=self.text.hidden_size,
            dtype=self.dtype,
            device=self.platform.device,
            activation_checkpointing=self.config.train.activation_checkpointing,
            pp_rank=grid.coordinate(self.rank).pp,
            pp_size=grid.pp,
        )

    def _bridge(self, name: str) -> Bridge:
        module_groups, language_groups = self.groups.modules.get(name), self.groups.modules.get("language")
        to_language, to_module = self.groups.bridge_to_language[name], self.groups.bridge_to_module[name]
        assert to_language is not None and to_module is not None
        return Bridge(
            self.layout,
            name,
            self.rank,
            to_language_group=to_language,
            to_module_group=to_module,
            module_tp_group=None if module_groups is None else module_groups.tp,
            language_tp_group=None if language_groups is None else language_groups.tp,
            hidden_size=self.text.hidden_size,
            dtype=self.dtype,
            platform=self.platform,
        )

    def encode(self, name: str, inputs: Mapping[str, Any], received: Sequence[torch.Tensor]) -> torch.Tensor:
        """Soft tokens [n, H] of media items; on stages before the encoder's last, what the next one works on.

        Args:
            name: the encoder.
            inputs: what its processor collated, on the host.
            received: what its previous stage has sent, empty on the first.
        """
        encoder, given = self.encoders[name], dict(inputs)
        if received:
            assert isinstance(encoder, StagedEncoder)
            given |= dict.fromkeys(encoder.only_first)
        given = self._put(given)
        if received:
            (given["hidden"],) = received
        return encoder(**given)

    def decode(self, name: str, states: torch.Tensor, targets: Mapping[str, Any]) -> torch.Tensor:
        """The summed loss of a decoder, a scalar.

        Args:
            name: the decoder.
            states: final hidden states [n, H] of its lane's media items.
            targets: what its processor collated, on the host.
        """
        return self.decoders[name](states, **self._put(targets))

    def _put(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {key: self.platform.put(value) if torch.is_tensor(value) else value for key, value in inputs.items()}

    def local_tokens(self, batch: LanguageBatch, microbatch: Microbatch) -> LocalTokens:
        """Cut a lane's microbatch (host tensors [B, S]) to this rank's CP part and move it to the device."""
        adapter, cp = self.adapter, self.layout.language.cp
        assert adapter is not None
        length, starts, layout = microbatch.seq_length, microbatch.segment_starts, microbatch.cp_layout
        index = adapter.token_index(length, starts, layout)
        context = attention_context(
            self.text,
            batch.positions,
            batch.segments,
            batch.groups,
            held=[cp_token_index(length, cp, rank, starts, layout) for rank in range(cp)],
            cp_group=self.groups.modules["language"].cp,
            put=self.platform.put,
        )
        input_ids, labels = (self.platform.put(adapter.cut(whole, index)) for whole in (batch.input_ids, batch.labels))
        return LocalTokens(input_ids, labels, context)

    def stage_inputs(self, tokens: LocalTokens, media: Media, received: Sequence[torch.Tensor]) -> StageTensors:
        """What this rank's stage works on.

        Args:
            tokens: the local tokens.
            media: soft tokens to put over the placeholders, on the first stage.
            received: what the previous stage has sent, empty on the first.
        """
        assert self.language is not None
        if not self.language.stage.first:
            return self.language.received(received)
        embeddings = self.language.embed(tokens.input_ids)
        if torch.is_grad_enabled() and not embeddings.requires_grad:
            # A frozen table: soft tokens may need a gradient on this rank's peers alone, whose backward pass then waits
            # for this rank in its collectives. It also makes every stage's output need one.
            embeddings.requires_grad_()
        flat = embeddings.view(-1, embeddings.shape[-1])
        for positions, soft_tokens in media:  # [n] and [n, H] into [S/(cp*tp) * B, H] (local)
            flat = flat.index_copy(0, self.platform.put(positions), soft_tokens)
        return self.language.first_inputs(flat.view_as(embeddings))

    def run_stage(self, tokens: LocalTokens, inputs: StageTensors) -> StageTensors:
        """What the next stage works on; on the last stage, the final hidden states."""
        assert self.language is not None
        return self.language(inputs, tokens.input_ids, tokens.context)

    def hidden(self, tokens: LocalTokens, media: Media) -> torch.Tensor | None:
        """Final hidden states of one microbatch, which goes through all stages; collective over the pipeline.

        Args:
            tokens: the local tokens.
            media: soft tokens to put over the placeholders, on the first stage.

        Returns:
            [S/(cp*tp), B, H] (local) on the last stage, None on others.
        """
        assert self.language is not None
        received: list[torch.Tensor] = []
        if not self.language.stage.first:
            shapes = self.language.received_shapes(tokens.input_ids, tokens.context)
            received = self.pipelines["language"].forward.post_recv(shapes).wait()
        outputs = self.run_stage(tokens, self.stage_inputs(tokens, media, received))
        if self.language.stage.last:
            return outputs.hidden
        self.pipelines["language"].forward.send(outputs.flat())
        return None
