"""What the documents show exists: files they link to, configuration keys, and the commands that CI runs."""

import re
import shlex
from pathlib import Path

import pytest

from mimo_gemma4.config import load_config
from mimo_gemma4.data.convert.__main__ import command_parser as convert_parser
from mimo_gemma4.data.inspect import command_parser as inspect_parser
from tests import REPOSITORY

DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def commands(document: Path) -> list[str]:
    """The shell commands in the fenced bash blocks, continued lines joined, comments dropped."""
    blocks = re.findall(r"^```bash\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path):
    targets = re.findall(r"\]\(([^)#]+)", document.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (document.parent / target).exists()]
    assert not missing


TRAINING = [
    pytest.param(shlex.split(command, comments=True), id=f"{document.name}-{number}")
    for document in DOCUMENTS
    for number, command in enumerate(commands(document))
    if "train_mimo.py" in command
]


@pytest.mark.parametrize("words", TRAINING)
def test_training_commands_have_valid_options(words: list[str]):
    config = load_config(words[words.index("train_mimo.py") + 1 :])
    ranks = [grid.ranks for grid in config.layout.modules.values()]
    started = int(words[words.index("--nproc-per-node") + 1])
    if config.layout.placement == "disjoint":
        assert sum(count for count in ranks if isinstance(count, int)) == started
    else:
        assert ranks == [None] * len(ranks)


def test_keys_in_the_documents_exist():
    reference = (REPOSITORY / "docs" / "config.md").read_text(encoding="utf-8")
    known = set(re.findall(r"^\| `([^`]+)`", reference, re.MULTILINE))
    sections = {key.partition(".")[0] for key in known}
    for document in DOCUMENTS:
        for name in re.findall(r"`([a-z]+(?:\.[a-z_<>]+)+)`", document.read_text(encoding="utf-8")):
            if name.partition(".")[0] in sections and not name.endswith((".py", ".json", ".jsonl")):
                assert name in known, f"{document.name}: {name}"


def test_tests_in_the_documents_exist():
    text = "\n".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    named = set(re.findall(r"`(tests/[^`\s]+\.py)(?:::(\w+))?`", text))
    assert any(function for _, function in named)
    for file, function in sorted(named):
        source = (REPOSITORY / file).read_text(encoding="utf-8")
        assert not function or f"\ndef {function}(" in source, f"{file}::{function}"


def test_every_limit_has_a_test_or_is_out_of_scope():
    rows = re.findall(r"^\| (\d+) \|.*\| (.*) \|$", (REPOSITORY / "docs/limits.md").read_text(), re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 27))
    assert [number for number, shown in rows if "`tests/" not in shown] == ["22"]


def test_ci_runs_the_readme_s_test_command():
    test_command = commands(REPOSITORY / "README.md")[1]
    assert test_command.endswith("pytest")
    assert f'run "${{uv[@]}}" {test_command.removeprefix("uv ")}\n' in (REPOSITORY / ".ci" / "run").read_text()


DATA_COMMANDS = {"mimo_gemma4.data.convert": convert_parser, "mimo_gemma4.data.inspect": inspect_parser}


def test_data_commands_have_valid_options():
    shown = [shlex.split(command, comments=True) for document in DOCUMENTS for command in commands(document)]
    checked = set()
    for words in shown:
        for module in DATA_COMMANDS.keys() & set(words):
            DATA_COMMANDS[module]().parse_args(words[words.index(module) + 1 :])
            checked.add(module)
    assert checked == DATA_COMMANDS.keys()
