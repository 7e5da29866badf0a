"""Shows the samples of a shard as a model sees them.

    python -m mimo_gemma4.data.inspect SHARD… [--hf-path DIR | --preset NAME] [--samples N] [--key KEY]

For every shard: the first samples, with their members, image sizes, lengths of sounds, token counts and the rendered
conversation, in which »…« marks text with loss; then the unusable samples, and percentiles of lengths over the whole
shard. As in a training, the index is kept beside the shard.
"""

import argparse
import re
import sys
import tarfile
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mimo_gemma4.config import ModelConfig
from mimo_gemma4.config.presets import load_model_config
from mimo_gemma4.data.chat import ConversationEncoder
from mimo_gemma4.data.index import ShardIndex
from mimo_gemma4.data.messages import Conversation
from mimo_gemma4.data.sample import MEDIA_TYPES, parse_messages
from mimo_gemma4.data.shards import Shard, expand_shards, read_range
from mimo_gemma4.data.template import Located
from mimo_gemma4.data.thoughts import Thoughts
from mimo_gemma4.data.token_index import TokenIndex, left_out_text
from mimo_gemma4.data.tokenizer import byte_media_tokens, load_tokenizer, media_tokens
from mimo_gemma4.encoders.registry import build_processors, registered_encoders
from mimo_gemma4.errors import MimoError

_PERCENTILES = (0, 10, 50, 90, 99, 100)
_LONGEST_TEXT = 4000
"""Most characters of a conversation that are shown."""
_MOST_UNUSABLE = 20
"""Most unusable samples that are listed."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_TAR_BLOCK = 512


class ShardInspector:
    """One shard as a model sees it."""

    def __init__(self, shard: Shard, encoder: ConversationEncoder) -> None:
        """Index the shard, or read its index. Raises `DataError` for media without an encoder in the model."""
        self.shard = shard
        self.encoder = encoder
        self.index = ShardIndex.open(shard)
        self.tokens = TokenIndex.open(shard, self.index, encoder)

    def find(self, keys: Sequence[str], count: int) -> list[int]:
        """Numbers of the samples with these keys, or of the first `count` samples if there are no keys."""
        if keys:
            wanted = {key.encode() for key in keys}
            return [number for number, key in enumerate(self.index.keys.tolist()) if key in wanted]
        return list(range(min(count, len(self.index))))

    def show_sample(self, console: Console, number: int) -> None:
        """Print members, token counts and rendering of a sample."""
        index, tokens = self.index, self.tokens
        console.print(_title(f"{_visible(index.key(number))} · sample {number + 1} of {len(index)}"))
        table = Table(box=None, show_header=False, pad_edge=False)
        name = self._member_name(int(index.json_offset[number]))
        table.add_row(Text(name), Text(_bytes(index.json_size[number])))
        for medium in index.media_range(number):
            header = index.header(medium)
            extent = f"{header.width} × {header.height} pixels"
            if header.sample_rate:
                extent = f"{header.samples / header.sample_rate:.2f} s at {header.sample_rate} Hz"
            name = self._member_name(int(index.media_offset[medium]))
            soft_tokens = f"{tokens.media_soft_tokens[medium]} soft tokens"
            table.add_row(Text(name), Text(_bytes(index.media_size[medium])), Text(extent), Text(soft_tokens))
        console.print(table)
        faults = dict(zip(tokens.bad_samples.tolist(), tokens.bad_reasons.tolist(), strict=True))
        if number in faults:
            console.print(Text(f"unusable: {_visible(faults[number])}", style="red"))
            return
        media = index.media_range(number)
        length, soft = int(tokens.length[number]), int(tokens.media_soft_tokens[media.start : media.stop].sum())
        loss = int(tokens.loss_tokens[number])
        console.print(Text(f"{length:,} tokens: {length - soft:,} text, {soft:,} media; {loss:,} with loss"))
        located = self.encoder.template.locate(self._messages(number))
        if located.left_out:
            console.print(Text(f"not trained on: {', '.join(located.left_out)}", style="yellow"))
        console.print(_render(located))

    def show_unusable(self, console: Console) -> None:
        """Print the samples that a training would leave out, and why."""
        index, tokens = self.index, self.tokens
        encoded = [(index.key(number), fault, reason) for number, fault, reason in
                   zip(tokens.bad_samples, tokens.bad_faults, tokens.bad_reasons, strict=True)]  # fmt: skip
        read = list(zip(index.bad_keys.tolist(), index.bad_faults.tolist(), index.bad_reasons.tolist(), strict=True))
        unusable = read + encoded
        if not unusable:
            return
        console.print(_title(f"{len(unusable)} unusable"))
        for key, fault, reason in unusable[:_MOST_UNUSABLE]:
            console.print(Text(f"{fault}: __key__ {str(key)!r}: {_visible(str(reason))}", style="red"))
        if len(unusable) > _MOST_UNUSABLE:
            console.print(Text(f"… and {len(unusable) - _MOST_UNUSABLE} more"))

    def show_statistics(self, console: Console) -> None:
        """Print percentiles of lengths and sizes over all usable samples, and what is left out of them."""
        usable = self.tokens.length > 0
        values = {"tokens": self.tokens.length[usable], "with loss": self.tokens.loss_tokens[usable]}
        headers = self.index.media_header
        for number, media_type in enumerate(MEDIA_TYPES):
            chosen = (self.index.media_type == number) & (self.tokens.media_soft_tokens > 0)
            values[f"soft tokens of one {media_type}"] = self.tokens.media_soft_tokens[chosen]
            if headers[chosen, 3].any():
                values[f"seconds of one {media_type}"] = headers[chosen, 2] / headers[chosen, 3]
            else:
                values[f"width of one {media_type}"] = headers[chosen, 0]
                values[f"height of one {media_type}"] = headers[chosen, 1]
        table = Table("", "count", "least", *(f"{p}%" for p in _PERCENTILES[1:-1]), "most", "sum", box=None)
        for column in table.columns[1:]:
            column.justify = "right"
        for name, numbers in values.items():
            if len(numbers):
                percentiles = np.percentile(numbers, _PERCENTILES, method="nearest")
                table.add_row(name, *(f"{number:,.10g}" for number in (len(numbers), *percentiles, numbers.sum())))
        console.print(_title(f"all {len(self.index)} samples"))
        console.print(table)
        left_out = dict(zip(self.tokens.left_out.tolist(), self.tokens.left_out_counts.tolist(), strict=True))
        if left_out:
            console.print(Text(f"not trained on: {left_out_text(left_out)}", style="yellow"))

    def _messages(self, number: int) -> Conversation:
        data = read_range(self.shard, int(self.index.json_offset[number]), int(self.index.json_size[number]))
        return parse_messages(data)

    def _member_name(self, offset: int) -> str:
        """Name of the member whose data begin at `offset`, from its header in the block before them."""
        header = read_range(self.shard, offset - _TAR_BLOCK, _TAR_BLOCK)
        return _visible(tarfile.TarInfo.frombuf(header, "utf-8", "backslashreplace").name)


def _render(located: Located) -> Text:
    """A conversation as the template writes it, with marks around text with loss."""
    shown, position = Text(), 0
    for start, end in located.spans:
        shown.append(_visible(located.text[position:start])).append("»", style="green")
        shown.append(_visible(located.text[start:end]), style="green").append("«", style="green")
        position = end
    shown.append(_visible(located.text[position:].rstrip()))
    if len(shown) > _LONGEST_TEXT:
        left = len(shown) - _LONGEST_TEXT
        shown = shown[:_LONGEST_TEXT].append(f" … {left:,} characters more", style="italic")
    return shown


def build_encoder(model: ModelConfig, thoughts: Thoughts = "learn") -> ConversationEncoder:
    """Tokenizer, template and the processors of all encoders of a model. Raises `ConfigError` or `DataError`.

    A preset may have ids of another tokenizer. With the built-in tokenizer its own media ids are used; counts are the
    same.
    """
    hf_config = load_model_config(model)
    processors = [
        processor
        for modality, architecture in sorted(registered_encoders())
        if (hf_config.get(f"{modality}_config") or {}).get("model_type") == architecture
        for processor in build_processors(modality, hf_config)
    ]
    tokens = media_tokens(hf_config) if model.hf_path else byte_media_tokens()
    return ConversationEncoder(load_tokenizer(model.hf_path), processors, tokens, thoughts)


def main(arguments: list[str] | None = None) -> int:
    """Show the shards of the command line. The exit code is 2 if a shard is missing or the model cannot be built."""
    options = command_parser().parse_args(arguments)
    # Lines are not wrapped in a pipe, as the next program may not expect it.
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, soft_wrap=not sys.stdout.isatty())
    model = ModelConfig(preset=options.preset, hf_path=options.hf_path)
    source = options.hf_path or f"the preset {options.preset} and the built-in tokenizer, in which a byte is a token"
    try:
        shards = expand_shards(options.shards)
        encoder = build_encoder(model, options.thoughts)
        for shard in shards:
            inspector = ShardInspector(shard, encoder)
            console.print(Text(shard, style="bold"))
            console.print(Text(f"counted with {source}; »…« has a loss"))
            for number in inspector.find(options.key, options.samples):
                inspector.show_sample(console, number)
            inspector.show_unusable(console)
            inspector.show_statistics(console)
    except MimoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def command_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m mimo_gemma4.data.inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shards", nargs="+", metavar="SHARD", help="tar files, brace lists or globs; paths or URLs")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--hf-path", metavar="DIR", help="Hugging Face directory with config.json and tokenizer")
    model.add_argument("--preset", default=ModelConfig.preset, metavar="NAME", help="default: %(default)s")
    parser.add_argument(
        "--thoughts", choices=("learn", "as_template"), default="learn", help="`data.thoughts` of the training"
    )
    parser.add_argument("--samples", type=int, default=3, metavar="N", help="samples to show (default: %(default)s)")
    parser.add_argument("--key", action="append", default=[], help="show the sample with this __key__ instead")
    return parser


def _title(text: str) -> Text:
    return Text(f"── {text}", style="bold")


def _visible(text: str) -> str:
    """Text without control characters."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def _bytes(size: int) -> str:
    return f"{int(size):,} bytes"


if __name__ == "__main__":
    sys.exit(main())
