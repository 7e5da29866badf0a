"""The wheel works without the checkout: it holds the package alone, its commands start, and it trains the quickstart.

It is built through the source distribution, as `uv build` does, by the build backend that pyproject.toml names, and
installed into an environment that finds the libraries of this one but not the checkout. The training has 5 steps on 2
ranks, which is enough for every file of a run to be written; what it learns is tested by test_quickstart.py.
"""

import json
import os
import stat
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest

import mimo_gemma4
from mimo_gemma4.cli.__main__ import COMMANDS, main
from tests import REPOSITORY

TRACE = """
import atexit, json, os, sys
from pathlib import Path

def write():
    modules = list(sys.modules.items())
    files = {name: str(module.__file__) for name, module in modules if getattr(module, "__file__", None)}
    Path(os.environ["IMPORTED"], f"{os.getpid()}.json").write_text(json.dumps(files))

if "IMPORTED" in os.environ:
    atexit.register(write)
"""
"""`sitecustomize.py` of the new environment: every process writes which modules it imported from which files."""
SHORT = [
    "train.steps=5",
    "eval.samples=8",
    "layout.vision.ranks=1",
    "layout.language={ranks: 1, tp: 1, sequence_parallel: false}",
]


@dataclass(frozen=True)
class Environment:
    """A virtual environment with the wheel in it."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def packages(self) -> Path:
        (found,) = self.folder.glob("lib/python*/site-packages")
        return found

    def run(self, *command: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the environment as in a shell that has activated it."""
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            [str(self.folder / "bin" / command[0]), *command[1:]],
            cwd=cwd,
            env=inherited | {"PATH": path, "OMP_NUM_THREADS": "1"} | variables,
            capture_output=True,
            text=True,
            timeout=200,
        )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the source distribution, unpack it elsewhere, and build the wheel there."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run([*build, "-t", "sdist"], cwd=REPOSITORY, check=True, timeout=60)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert all(member.isfile() for member in archive)
        archive.extractall(folder, filter="data")
    subprocess.run([*build, "-t", "wheel"], cwd=folder / sdist.name.removesuffix(".tar.gz"), check=True, timeout=60)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Install the wheel where the libraries of this environment are found, but not what its `.pth` files add."""
    made = Environment(tmp_path_factory.mktemp("environment"))
    subprocess.run([sys.executable, "-m", "venv", str(made.folder)], check=True, timeout=100)
    install = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", str(wheel)]
    subprocess.run([str(made.python), *install], check=True, timeout=100)
    libraries = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (made.packages / "libraries.pth").write_text("\n".join(libraries))
    (made.packages / "sitecustomize.py").write_text(TRACE)
    return made


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [entry.filename for entry in archive.infolist()]
        assert not any(stat.S_ISLNK(entry.external_attr >> 16) for entry in archive.infolist())
    assert {name.partition("/")[0] for name in names} == {
        "mimo_gemma4",
        f"mimo_gemma4-{mimo_gemma4.__version__}.dist-info",
    }
    expected = {
        str(Path(folder, file).relative_to(REPOSITORY))
        for folder, _, files in os.walk(REPOSITORY / "mimo_gemma4", followlinks=True)
        for file in files
        if "__pycache__" not in folder
    }
    assert {name for name in names if name.startswith("mimo_gemma4/")} == expected
    assert {"mimo_gemma4/py.typed", "mimo_gemma4/encoders/siglip.py", "mimo_gemma4/configs/quickstart.yaml"} <= expected
    assert mimo_gemma4.__version__ == version("mimo-gemma4")


def test_importing_the_package_imports_the_standard_library_alone(environment: Environment, tmp_path: Path) -> None:
    code = "import sys; before = set(sys.modules); import mimo_gemma4; print(*sorted(set(sys.modules) - before))"
    told = environment.run("python", "-c", code, cwd=tmp_path)
    imported = {name.partition(".")[0] for name in told.stdout.split()}
    assert imported - sys.stdlib_module_names == {"mimo_gemma4"}


def test_commands_start(environment: Environment, tmp_path: Path) -> None:
    listed = environment.run("mimo", "--help", cwd=tmp_path)
    assert listed.returncode == 0 and all(f"mimo {name} " in listed.stdout for name in COMMANDS)
    convert = environment.run("mimo", "data", "convert", "--help", cwd=tmp_path)
    assert convert.returncode == 0 and "--out FOLDER" in convert.stdout
    train = environment.run("mimo-train", "--help", cwd=tmp_path)
    assert train.returncode == 0 and "torchrun --nproc-per-node 4 --no-python mimo-train config=" in train.stdout
    nothing = environment.run("mimo-train", "config=quikstart.yaml", cwd=tmp_path)
    assert nothing.returncode == 1 and "did you mean `quickstart.yaml`?" in nothing.stderr


def test_the_quickstart_trains_without_the_checkout(environment: Environment, tmp_path: Path) -> None:
    (imported := tmp_path / "imported").mkdir()
    torchrun = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command = [*torchrun, "mimo-train", "config=quickstart.yaml", *SHORT]
    told = environment.run(*command, cwd=tmp_path, IMPORTED=str(imported))
    assert told.returncode == 0, told.stderr
    lines = (tmp_path / "runs" / "quickstart" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert (tmp_path / "runs" / "quickstart" / "eval.json").is_file()
    processes = [json.loads(path.read_text()) for path in imported.iterdir()]
    assert sum("mimo_gemma4.train.trainer" in modules for modules in processes) == 2  # the ranks
    libraries = Path(sysconfig.get_path("purelib"))
    for name, file in ((name, tmp_path / file) for modules in processes for name, file in modules.items()):
        if name.partition(".")[0] == "mimo_gemma4":
            assert file.is_relative_to(environment.packages), name
        assert file.is_relative_to(libraries) or not file.resolve().is_relative_to(REPOSITORY), name


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ([], 2, "mimo data inspect"),
        (["data"], 2, "mimo data inspect"),
        (["data", "-h"], 0, "mimo data inspect"),
        (["convrt"], 2, "there is no command `convrt`; did you mean `convert`?"),
        (["index"], 2, "there is no command `index`; did you mean `data index`?"),
        (["data", "inspct"], 2, "there is no command `data inspct`; did you mean `data inspect`?"),
        (["data", "index", "none.tar"], 2, "none.tar"),
    ],
)
def test_a_command_line_that_names_no_command(
    arguments: list[str], code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code
    told = capsys.readouterr()
    assert text in (told.err if code else told.out)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help_text(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*name.split(), "--help"])
    assert ended.value.code == 0 and capsys.readouterr().out.startswith("usage: ")
