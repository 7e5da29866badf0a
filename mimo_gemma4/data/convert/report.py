"""The report of a conversion: the shards it wrote and the rows it dropped, as a file and as a printed table."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mimo_gemma4.data.convert.samples import SPLITS, Dropped, PartResult

_SHOWN = 3
"""Most dropped rows per fault that are printed; the file lists all."""


@dataclass(frozen=True)
class Report:
    """The content of `report.json`."""

    plan: Mapping[str, Any]
    """Sources and options, as in `plan.json`."""
    shards: Mapping[str, Sequence[str]]
    """File names by split."""
    samples: Mapping[str, int]
    media: Mapping[str, int]
    dropped: Sequence[Dropped]
    unused: Mapping[str, int] = field(default_factory=dict)
    """Number of samples by what their rows say and nothing uses: columns, or parts of them as in `messages.name`."""

    @classmethod
    def of(
        cls, plan: Mapping[str, Any], shards: Mapping[str, Sequence[str]], results: Sequence[PartResult]
    ) -> "Report":
        """The sum of all parts."""
        samples, media, unused = Counter[str](), Counter[str](), Counter[str]()
        for result in results:
            samples.update(result.samples)
            media.update(result.media)
            unused.update(result.unused)
        dropped = [dropped for result in results for dropped in result.dropped]
        counts = {split: samples[split] for split in SPLITS}
        return cls(plan, shards, counts, dict(sorted(media.items())), dropped, dict(unused.most_common()))

    @property
    def dropped_by_fault(self) -> dict[str, int]:
        """Number of dropped rows by fault, the most frequent first."""
        return dict(Counter(dropped.fault for dropped in self.dropped).most_common())

    def to_json(self) -> str:
        """All fields as one object, the dropped rows last."""
        fields = {"dropped_by_fault": self.dropped_by_fault, **asdict(self)}
        return json.dumps(fields | {"dropped": fields.pop("dropped")}, indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """Read a report that `to_json` wrote."""
        fields = json.loads(text)
        del fields["dropped_by_fault"]
        return cls(**fields | {"dropped": [Dropped(**dropped) for dropped in fields["dropped"]]})

    def print(self, console: Console) -> None:
        """Print a summary, and a table of the faults with a few rows each."""
        total = sum(self.samples.values())
        media = "".join(f", {count} {kind}" for kind, count in self.media.items())
        console.print(Text(f"{total + len(self.dropped)} rows: {total} samples{media}; {len(self.dropped)} dropped"))
        for split, names in self.shards.items():
            if names:
                console.print(Text(f"  {split}: {self.samples[split]} samples in {len(names)} shards, {_span(names)}"))
        if self.unused:
            console.print(Text(f"not used: {counted(self.unused)}; --column MEANING=NAME uses, --ignore NAME silences"))
        if not self.dropped:
            return
        table = Table("fault", "rows", "for example", "why", box=None, pad_edge=False)
        for fault, count in self.dropped_by_fault.items():
            examples = [dropped for dropped in self.dropped if dropped.fault == fault][:_SHOWN]
            for place, dropped in enumerate(examples):
                first = place == 0
                cells = (fault if first else "", str(count) if first else "", dropped.key, dropped.reason[:200])
                table.add_row(*(Text(cell) for cell in cells))
        console.print(table)


def counted(unused: Mapping[str, int]) -> str:
    """Names with their number of samples."""
    return ", ".join(f"{name} ({count} samples)" for name, count in unused.items())


def _span(names: Sequence[str]) -> str:
    """Names that differ only in their number, as a brace list."""
    if len(names) == 1:
        return names[0]
    stem, first = names[0].removesuffix(".tar").rsplit("-", 1)
    last = names[-1].removesuffix(".tar").rsplit("-", 1)[1]
    return f"{stem}-{{{first}..{last}}}.tar"
