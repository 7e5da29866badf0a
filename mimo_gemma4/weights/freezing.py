"""Which parameters of a module train: the option `modules.<name>.freeze`."""

from collections.abc import Collection
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn

from mimo_gemma4.errors import ConfigError
from mimo_gemma4.weights.bindings import Binding, BoundModule

FreezeRule = bool | Literal["tower"] | list[str]


def freeze(name: str, module: BoundModule, rule: FreezeRule, elsewhere: Collection[str] = ()) -> None:
    """Set `requires_grad` to false for the parameters that `rule` freezes.

    True freezes everything, False nothing, `tower` everything but the projector. A list of patterns (`*` wildcards)
    freezes the parameters whose Hugging Face names match one. If a parameter matches several, the last one decides; a
    pattern after `!` makes it train.

    Args:
        name: the module's name in the layout.
        module: has `bindings()`, and `projector_parameters()` if it has a projector.
        rule: the option.
        elsewhere: Hugging Face names of parameters on other pipeline stages of the module; a pattern may match only
            these.

    Raises `ConfigError` for a pattern that matches no parameter, for patterns that match a part of a fused parameter,
    and for `tower` with a module that has no projector.
    """
    if isinstance(rule, bool):
        frozen = list(module.parameters()) if rule else []
    elif rule == "tower":
        projector = getattr(module, "projector_parameters", None)
        if projector is None:
            raise ConfigError(
                f"modules.{name}.freeze is tower, but {name} has no projector; use true, false or patterns"
            )
        trainable = {id(parameter) for parameter in projector()}
        frozen = [parameter for parameter in module.parameters() if id(parameter) not in trainable]
    elif isinstance(rule, str):
        raise ConfigError(f"modules.{name}.freeze is {rule!r}; it takes true, false, tower or a list of name patterns")
    else:
        frozen = _matching(name, module.bindings(), rule, elsewhere)
    for parameter in frozen:
        parameter.requires_grad_(False)


def _matching(
    name: str, bindings: list[Binding], patterns: list[str], elsewhere: Collection[str]
) -> list[nn.Parameter]:
    """The parameters to freeze: the last pattern that matches their Hugging Face name has no `!`."""
    names: dict[nn.Parameter, set[str]] = {}
    for binding in bindings:
        if isinstance(binding.tensor, nn.Parameter):
            names.setdefault(binding.tensor, set()).add(binding.name)
    known = set(elsewhere).union(*names.values())
    matched: set[str] = set()
    for pattern in patterns:
        found = {name for name in known if fnmatchcase(name, pattern.removeprefix("!"))}
        if not found:
            raise ConfigError(
                f"modules.{name}.freeze: no parameter matches {pattern!r}; names look like {bindings[0].name!r}"
            )
        matched = matched - found if pattern.startswith("!") else matched | found
    for together in names.values():
        if together & matched and together - matched:
            raise ConfigError(
                f"modules.{name}.freeze matches {sorted(together & matched)} but not {sorted(together - matched)}, "
                "which are one parameter here: add a pattern for all of them or for none"
            )
    return [parameter for parameter, found in names.items() if found & matched]
