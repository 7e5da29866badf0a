"""`docs/config.md` says what the dataclasses say, and every option is documented."""

from dataclasses import fields, is_dataclass

import pytest

from mimo_gemma4 import config
from mimo_gemma4.config.structured import field_docs, reference
from tests import REPOSITORY

SECTIONS = [
    value
    for name, value in vars(config).items()
    if is_dataclass(value) and name.endswith(("Config", "Layout")) and value is not config.Config
]


def test_reference_is_up_to_date():
    text = (REPOSITORY / "docs" / "config.md").read_text(encoding="utf-8")
    assert text == reference(config.Config), "run `python -m mimo_gemma4.config`"


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_option_has_a_docstring(section: type):
    documented = field_docs(section)
    missing = [entry.name for entry in fields(section) if not entry.metadata and not documented.get(entry.name)]
    assert not missing
