"""Nested plain values (YAML, command line) to dataclasses and back; errors name the key and where it was set.

Supported field types: bool, int, float, str, None, `Literal`, unions, `list[T]`, `dict[str, T]` and dataclasses. One
field of a dataclass may be `inline(…)`: a `dict[str, T]` whose entries are written directly among the other fields.
"""

import ast
import difflib
import inspect
import json
import textwrap
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, field, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mimo_gemma4.config.ranges import Range
from mimo_gemma4.errors import ConfigError

Origin = Callable[[str], str]
"""From a dotted key to the file or argument that set it."""


def inline(entry: str) -> Any:
    """A `dict[str, T]` field whose entries stand among the other keys of its dataclass; `entry` names one of them."""
    return field(default_factory=dict, metadata={"inline": entry})


def build[T](cls: type[T], tree: Mapping[str, Any], origin: Origin, prefix: str = "") -> T:
    """A `cls` from nested mappings.

    Raises `ConfigError` for unknown or missing keys and for values of a wrong type or out of their field's range.
    """
    hints = get_type_hints(cls)
    entries = fields(cls)  # type: ignore[arg-type]
    rest = next((entry for entry in entries if entry.metadata.get("inline")), None)
    named = [entry for entry in entries if entry is not rest]
    values: dict[str, Any] = {}
    for entry in named:
        if entry.name in tree:
            key = prefix + entry.name
            values[entry.name] = _convert(hints[entry.name], tree[entry.name], origin, key)
            _check_range(entry, values[entry.name], origin, key)
        elif _required(entry):
            raise ConfigError(f"`{prefix}{entry.name}` is missing ({origin(prefix + entry.name)})")
    unknown = {str(key): value for key, value in tree.items() if key not in values}
    names = [entry.name for entry in named]
    for key, value in unknown.items():
        if rest is None or not isinstance(value, Mapping):
            other = "" if rest is None else f" (a <{rest.metadata['inline']}> there takes a mapping)"
            hint = did_you_mean(key, names)
            raise ConfigError(f"unknown key `{prefix}{key}`{other} ({origin(prefix + key)}){hint}")
    if rest is not None:
        values[rest.name] = {
            key: _convert(get_args(hints[rest.name])[1], value, origin, prefix + key) for key, value in unknown.items()
        }
    return cls(**values)


def dump(value: Any) -> Any:
    """The nested plain values that `build` turns into an equal object."""
    if is_dataclass(value):
        tree: dict[str, Any] = {}
        for entry in fields(value):
            content = dump(getattr(value, entry.name))
            if entry.metadata.get("inline"):
                tree = content | tree
            else:
                tree[entry.name] = content
        return tree
    if isinstance(value, dict):
        return {key: dump(item) for key, item in value.items()}
    if isinstance(value, list):
        return [dump(item) for item in value]
    return value


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`; did you mean …?` with the choice nearest to `word`, else the list of choices."""
    choices = list(choices)
    nearest = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f"; did you mean `{nearest[0]}`?" if nearest else f"; known: {', '.join(choices)}"


def field_docs(cls: type) -> dict[str, str]:
    """The string literal that follows each field in the source of `cls`, by field name."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    docs: dict[str, str] = {}
    for statement, following in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                docs[statement.target.id] = inspect.cleandoc(str(following.value.value))
    return docs


def reference(cls: type) -> str:
    """Markdown reference of every key under `cls`: name, type and range, default and the docstring of the field."""
    lines = [
        "# Configuration",
        "",
        "Generated from `mimo_gemma4/config/options.py` by `python -m mimo_gemma4.config`.",
        "",
    ]
    for entry in fields(cls):
        kind = _dataclass_in(get_type_hints(cls)[entry.name])
        key = f"{entry.name}.<module>" if get_origin(get_type_hints(cls)[entry.name]) is dict else entry.name
        summary = " ".join(filter(None, [inspect.getdoc(kind), field_docs(cls).get(entry.name)]))
        lines += [
            f"## {entry.name}",
            "",
            summary,
            "",
            "| key | type | default | meaning |",
            "|---|---|---|---|",
        ]
        lines += [*_reference_rows(kind, key), ""]
    return "\n".join(lines)


def _reference_rows(cls: type, prefix: str) -> list[str]:
    rows: list[str] = []
    docs, hints = field_docs(cls), get_type_hints(cls)
    for entry in fields(cls):
        annotation, key = hints[entry.name], f"{prefix}.{entry.name}"
        if nested := _dataclass_in(annotation):
            if not entry.metadata.get("inline"):
                rows.append(_row(key, "mapping", entry, docs[entry.name]))
            label = entry.metadata.get("inline")
            rows += _reference_rows(nested, f"{prefix}.<{label}>" if label else key)
        else:
            kind = type_name(annotation, entry.metadata.get("range"))
            rows.append(_row(key, kind, entry, docs[entry.name]))
    return rows


def _row(key: str, kind: str, entry: Field[Any], doc: str) -> str:
    default = "required" if _required(entry) else f"`{json.dumps(entry.default)}`"
    cells = [f"`{key}`", kind, default, " ".join(doc.split())]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _dataclass_in(annotation: Any) -> Any:
    """The dataclass that `annotation` is, or holds as an option or as mapping values; else None."""
    candidates = [annotation, *get_args(annotation)]
    return next((candidate for candidate in candidates if is_dataclass(candidate)), None)


def type_name(annotation: Any, bounds: Range | None = None) -> str:
    """How the reference and the error messages write a field's type; numbers with their range, where it is given."""
    if annotation is None or annotation is types.NoneType:
        return "null"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(str(choice) for choice in arguments)
    if origin in (Union, types.UnionType):
        return " | ".join(type_name(choice, bounds) for choice in arguments)
    if origin is list:
        return f"list of {type_name(arguments[0])}"
    if origin is dict or is_dataclass(annotation):
        return "mapping"
    return f"{annotation.__name__} {bounds}" if bounds and annotation in (int, float) else str(annotation.__name__)


def _required(entry: Field[Any]) -> bool:
    return entry.default is MISSING and entry.default_factory is MISSING


def _check_range(entry: Field[Any], value: Any, origin: Origin, key: str) -> None:
    """Raise `ConfigError` where a number is out of the range that its field was given by `ranges.option`."""
    bounds: Range | None = entry.metadata.get("range")
    if bounds is not None and isinstance(value, int | float) and value not in bounds:
        raise ConfigError(f"`{key}` {bounds.complaint(value)} ({origin(key)})")


def _convert(annotation: Any, value: Any, origin: Origin, key: str) -> Any:
    """`value` as `annotation` asks, or a `ConfigError` that names key, value, expected type and origin."""
    kind, arguments = get_origin(annotation), get_args(annotation)
    if kind in (Union, types.UnionType):
        choice = next((option for option in arguments if _fits(option, value)), None)
        if choice is not None:
            return _convert(choice, value, origin, key)
    elif _fits(annotation, value):
        if is_dataclass(annotation) and isinstance(annotation, type):
            return build(annotation, value, origin, key + ".")
        if kind is list:
            return [_convert(arguments[0], item, origin, f"{key}[{number}]") for number, item in enumerate(value)]
        if kind is dict:
            return {name: _convert(arguments[1], item, origin, f"{key}.{name}") for name, item in value.items()}
        return float(value) if annotation is float else value
    hint = did_you_mean(value, map(str, arguments)) if kind is Literal and isinstance(value, str) else ""
    shown = "null" if value is None else repr(value)
    raise ConfigError(f"`{key}` must be {type_name(annotation)}, not {shown} ({origin(key)}){hint}")


def _fits(annotation: Any, value: Any) -> bool:
    """Whether `value` has the outer type of `annotation`; what it contains is checked on conversion."""
    if annotation is None or annotation is types.NoneType:
        return value is None
    kind = get_origin(annotation)
    if kind is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(annotation))
    if kind is dict or is_dataclass(annotation):
        return isinstance(value, Mapping)
    if kind is list:
        return isinstance(value, list)
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is annotation
