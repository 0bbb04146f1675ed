"""README, Makefile and metadata say the same as the files."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")))]
FOLDERS = ("modeling_keye", "conversion", "training", "checkpoints", "benchmarks", "examples", "docs", "tests", ".ci")
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def code_words(text: str) -> list[str]:
    """What stands in `code` and in code blocks."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    return [word for part in (*blocks, *spans) for word in part.split()]


def named_paths(text: str) -> set[str]:
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text)
    words = [word.strip("\"'.,;:()") for word in code_words(text)]
    ours = [
        word.removeprefix("./") for word in words if word.removeprefix("./").startswith(tuple(f"{f}/" for f in FOLDERS))
    ]
    return {path for path in (*links, *ours) if not re.search(r"[*<>{}$]", path)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_in_documents_exist(document):
    missing = [
        path
        for path in named_paths(document.read_text())
        if not (ROOT / path).exists() and not (document.parent / path).exists()
    ]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_make_commands_in_documents_exist(document):
    assert set(re.findall(r"\bmake ([a-z][a-z-]*)", " ".join(code_words(document.read_text())))) <= TARGETS


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_modules_run_by_documents_exist(document):
    named = re.findall(r"python3? -m ([\w.]+)", " ".join(code_words(document.read_text())))
    ours = [name for name in named if name.split(".")[0] in FOLDERS]
    assert [
        name
        for name in ours
        if not (ROOT / f"{name.replace('.', '/')}.py").exists() and not (ROOT / name / "__main__.py").exists()
    ] == []


def test_keye_commands_in_readme_parse():
    """Options that README shows exist."""
    from modeling_keye.cli_keye import build_parser

    lines = re.findall(r"^\s*(?:\$ )?keye (.+)$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    commands = [shlex.split(line, comments=True) for line in lines]
    assert commands, "README shows no `keye` command"
    for command in commands:
        build_parser().parse_args(command)


def test_readme_begins_with_the_two_commands():
    """`make demo` and `make test` are what a newcomer needs, so they stand on README's first screen."""
    first_screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:60])
    assert "make demo" in first_screen and "make test" in first_screen


def test_makefile_help_lists_every_target():
    listed = set(re.findall(r"^([a-z-]+):[^\n]*## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    phony = set(re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE).group(1).split())
    assert listed == phony == TARGETS


def test_version_is_the_same_everywhere():
    version = project()["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    package = (ROOT / "modeling_keye" / "__init__.py").read_text()
    assert re.findall(r"^__version__ = \"(.*)\"$", package, flags=re.MULTILINE) in ([], [version])


def test_transformers_range_is_the_one_that_make_compat_runs():
    bounds = next(entry for entry in project()["dependencies"] if entry.startswith("transformers"))
    low, high = re.fullmatch(r"transformers>=(\d+\.\d+),<(\d+\.\d+)", bounds).groups()
    oldest, newest = re.search(
        r"^COMPAT_VERSIONS \?= (\S+) (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE
    ).groups()
    assert oldest == f"{low}.0"
    major, minor = (int(part) for part in high.split("."))
    assert newest.startswith(f"{major}.{minor - 1}.")


def test_constraints_are_exact_and_free_of_this_machine():
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert [line for line in pins if not re.fullmatch(r"[\w.-]+==[\w.]+(; python_version >= \"3\.\d+\")?", line)] == []
    pinned = {line.split("==")[0] for line in pins}
    extras = project()["optional-dependencies"]
    wanted = [*project()["dependencies"], *extras["test"], *extras["train"]]
    # CUDA builds of torch ask for a Triton of their own, so only CI pins one.
    assert re.search(r"triton==[\d.]+", (ROOT / ".ci" / "run").read_text())
    assert {re.match(r"[\w-]+", entry).group() for entry in wanted} - {"triton"} <= pinned


def test_licence_is_apache():
    text = (ROOT / "LICENSE").read_text()
    assert project()["license"] == "Apache-2.0"
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text


def test_ci_runs_lint_and_tests():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111, ".ci/run is not executable"
    assert "make lint" in script.read_text() and "make test" in script.read_text()


def test_embedded_checkpoint_is_small_safe_and_has_its_card():
    folder = ROOT / "checkpoints" / "keye-tiny"
    files = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    assert {"config.json", "model.safetensors", "processor_config.json", "README.md"} <= set(files)
    assert sum(files.values()) < 25e6
    config = json.loads((folder / "config.json").read_text())
    for name in config["auto_map"].values():
        assert f"{name.split('.')[0]}.py" in files, f"config.json names {name}, but its file is not in the folder"


def test_embedded_checkpoint_carries_the_present_code():
    folder = ROOT / "checkpoints" / "keye-tiny"
    stale = [
        path.name
        for path in folder.glob("*.py")
        if path.read_bytes() != (ROOT / "modeling_keye" / path.name).read_bytes()
    ]
    assert stale == [], f"{stale} differ from modeling_keye; copy them to checkpoints/keye-tiny"


def test_help_needs_no_model():
    """`--help` works and names every command, whatever else is broken."""
    done = subprocess.run([sys.executable, "-m", "modeling_keye", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ask" in done.stdout and "info" in done.stdout
