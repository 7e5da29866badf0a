"""`docs/config.md` says what the dataclasses say; every option is documented, and every number has a range."""

from dataclasses import fields, is_dataclass
from typing import get_args, get_type_hints

import pytest

from mimo_gemma4 import config
from mimo_gemma4.config.structured import field_docs, reference
from tests import REPOSITORY

SECTIONS = [
    value
    for name, value in vars(config).items()
    if is_dataclass(value) and name.endswith(("Config", "Layout")) and value is not config.Config
]
CHECKED_ELSEWHERE = [
    (config.RunConfig, "seed"),  # every integer is legal
    (config.ModuleLayout, "ranks"),  # a count or a list of ranks: `build_layout` compares it with the world
    (config.ProfileConfig, "steps"),  # numbers, lists and spans: `validate` compares them with `train.steps`
]


def test_reference_is_up_to_date():
    text = (REPOSITORY / "docs" / "config.md").read_text(encoding="utf-8")
    assert text == reference(config.Config), "run `python -m mimo_gemma4.config`"


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_option_has_a_docstring(section: type):
    documented = field_docs(section)
    missing = [
        entry.name for entry in fields(section) if not entry.metadata.get("inline") and not documented.get(entry.name)
    ]
    assert not missing


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_number_has_a_range_that_holds_its_default(section: type):
    for entry in fields(section):
        annotation = get_type_hints(section)[entry.name]
        numeric = {int, float} & {annotation, *get_args(annotation)}
        bounds = entry.metadata.get("range")
        if (section, entry.name) in CHECKED_ELSEWHERE:
            assert bounds is None
        elif numeric:
            assert entry.default is None or entry.default in bounds
