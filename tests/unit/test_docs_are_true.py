"""What the documents show exists: links, anchors, configuration keys, files, layers, and the commands that CI runs."""

import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mimo_gemma4.cli.__main__ import COMMANDS
from mimo_gemma4.config import load_config
from mimo_gemma4.convert.__main__ import parse as parse_weights_command
from mimo_gemma4.data.convert.__main__ import command_parser as convert_parser
from mimo_gemma4.data.inspect import command_parser as inspect_parser
from mimo_gemma4.timeline import command_parser as timeline_parser
from tests import REPOSITORY

DOCUMENTS = [
    *(REPOSITORY / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]
AREAS = sorted((REPOSITORY / "docs" / "design").glob("*.md"))


def relative(path: Path) -> str:
    """The path of a document, for the name of a test."""
    return str(path.relative_to(REPOSITORY))


def text_of(document: Path, code: bool = True) -> str:
    """The document, or, without `code`, what of it is outside of fenced blocks."""
    text = document.read_text(encoding="utf-8")
    return text if code else re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)


def commands(document: Path) -> list[str]:
    """The shell commands in the fenced bash blocks, continued lines joined, comments dropped."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text_of(document), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def headings(document: Path, marks: str = "#+") -> list[str]:
    """The headings of a document that begin with these marks."""
    return re.findall(rf"^{marks} (.*)$", text_of(document, code=False), re.MULTILINE)


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading; mkdocs gives the same ones, or the strict build fails."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# --- links ---


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_links_lead_somewhere(document: Path):
    for path, fragment in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", text_of(document, code=False)):
        if "://" in path:
            continue
        target = document.parent / path if path else document
        assert target.exists(), path
        if fragment:
            assert fragment in map(anchor, headings(target)), f"{path}#{fragment}"


def test_site_builds_without_a_warning(tmp_path: Path):
    if importlib.util.find_spec("material") is None:
        pytest.skip("mkdocs-material is not installed: uv sync --extra dev")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "design" / "schedule" / "index.html").exists()


# --- commands ---

TRAINING = [
    pytest.param(shlex.split(command, comments=True), id=f"{document.name}-{number}")
    for document in DOCUMENTS
    for number, command in enumerate(commands(document))
    if re.search(r"train_mimo\.py|mimo-train", command)
]


@pytest.mark.parametrize("words", TRAINING)
def test_training_commands_have_valid_options(words: list[str]):
    (program,) = {"train_mimo.py", "mimo-train"} & set(words)
    config = load_config(words[words.index(program) + 1 :])
    ranks = [grid.ranks for grid in config.layout.modules.values()]
    started = int(words[words.index("--nproc-per-node") + 1])
    if config.layout.placement == "disjoint":
        assert sum(count for count in ranks if isinstance(count, int)) == started
    else:
        assert ranks == [None] * len(ranks)


PARSERS: dict[str, Callable[[list[str]], object]] = {
    "mimo_gemma4.convert": parse_weights_command,
    "mimo_gemma4.data.convert": convert_parser().parse_args,
    "mimo_gemma4.data.inspect": inspect_parser().parse_args,
    "mimo_gemma4.timeline": timeline_parser().parse_args,
}
"""What reads the arguments of a command, by module."""


def shown_commands() -> Iterator[tuple[str, list[str]]]:
    """Module and arguments of each `python -m mimo_gemma4.…` and each `mimo …` in the documents."""
    for document in DOCUMENTS:
        for command in commands(document):
            words = shlex.split(command, comments=True)
            if "-m" in words:
                at = words.index("-m") + 1
                yield words[at], words[at + 1 :]
            elif words[0] == "mimo":
                count = next(count for count in (1, 2) if " ".join(words[1 : 1 + count]) in COMMANDS)
                module = COMMANDS[" ".join(words[1 : 1 + count])].module
                yield module.removesuffix(".__main__"), words[1 + count :]


def test_other_commands_have_valid_options():
    checked = set()
    for module, arguments in shown_commands():
        if module in PARSERS:
            PARSERS[module](arguments)
            checked.add(module)
    assert checked == PARSERS.keys()


def test_ci_runs_the_readme_s_test_command():
    test_command = commands(REPOSITORY / "README.md")[1]
    assert test_command.endswith("pytest")
    assert f'run "${{uv[@]}}" {test_command.removeprefix("uv ")}\n' in (REPOSITORY / ".ci" / "run").read_text()


def test_ci_of_the_repository_host_runs_the_same_script():
    assert "- run: .ci/run\n" in (REPOSITORY / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")


# --- keys, files, tests, layers ---


def is_module(name: str) -> bool:
    """Whether `name` is a module's below `mimo_gemma4`."""
    return (REPOSITORY / "mimo_gemma4" / name.replace(".", "/")).with_suffix(".py").exists()


def test_keys_in_the_documents_exist():
    known = set(re.findall(r"^\| `([^`]+)`", text_of(REPOSITORY / "docs" / "config.md"), re.MULTILINE))
    sections = {key.partition(".")[0] for key in known}
    for document in DOCUMENTS:
        for name in re.findall(r"`([a-z]+(?:\.[a-z_<>]+)+)`", text_of(document)):
            if document.name == "CHANGELOG.md" and is_module(name):
                continue
            if name.partition(".")[0] in sections and not name.endswith((".py", ".json", ".jsonl")):
                assert name in known, f"{relative(document)}: {name}"


def test_files_in_the_documents_exist():
    folders = "benchmarks|configs|docs|encoders|mimo_gemma4|tests"
    for document in DOCUMENTS:
        for name in re.findall(rf"`((?:{folders})/[^`\s:]*)(?:::\w+)?`", text_of(document, code=False)):
            found = "…" in name or any(REPOSITORY.glob(name.rstrip("/")))
            assert found, f"{relative(document)}: {name}"


def test_tests_in_the_documents_exist():
    text = "\n".join(map(text_of, DOCUMENTS))
    named = set(re.findall(r"`(tests/[^`\s]+\.py)::(\w+)`", text))
    assert named
    for file, function in sorted(named):
        assert f"\ndef {function}(" in text_of(REPOSITORY / file), f"{file}::{function}"


def test_new_import_paths_of_the_changelog_exist():
    table = text_of(REPOSITORY / "CHANGELOG.md").partition("#### Import paths")[2].partition("####")[0]
    rows = re.findall(r"^\| (`.*`) \| (`[^|]*) \|$", table, re.MULTILINE)
    assert len(rows) > 40
    for _, new in rows:
        for name in re.findall(r"`([a-z_]+(?:\.[a-z_]+)*)`", new.partition(" (")[0]):
            assert importlib.util.find_spec(f"mimo_gemma4.{name}") is not None, name


def test_every_limit_has_a_test_or_is_out_of_scope():
    rows = re.findall(r"^\| (\d+) \|.*\| (.*) \|$", text_of(REPOSITORY / "docs" / "limits.md"), re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 27))
    assert [number for number, shown in rows if "`tests/" not in shown] == ["22"]


def test_the_house_shows_the_layers_that_are_checked():
    tree = text_of(REPOSITORY / "docs" / "design.md").partition("## The house")[2].partition("```text\n")[2]
    layers: list[set[str]] = [set()]
    for line in tree.partition("```")[0].splitlines():
        if line.startswith("─"):
            layers.append(set())
        else:
            layers[-1].add(re.split(r"/|\.py", line)[0])
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = (each for each in project["tool"]["importlinter"]["contracts"] if each["type"] == "layers")
    assert layers == [set(layer.split(" | ")) for layer in contract["layers"]]


# --- decisions ---


@pytest.mark.parametrize("area", AREAS, ids=relative)
def test_decisions_have_context_decision_and_consequence(area: Path):
    for decision in re.split(r"^## ", text_of(area), flags=re.MULTILINE)[1:]:
        parts = re.findall(r"^\*\*(\w+)\.\*\*", decision, re.MULTILINE)
        assert parts == ["Context", "Decision", "Consequence"], decision.splitlines()[0]


def test_index_lists_every_decision():
    linked = set(
        re.findall(r"^- \[(.*)\]\(design/(\w+)\.md#", text_of(REPOSITORY / "docs" / "design.md"), re.MULTILINE)
    )
    assert linked == {(heading, area.stem) for area in AREAS for heading in headings(area, "##")}
