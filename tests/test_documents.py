"""README, docs/checkpoints.md and model_card.md say about published checkpoints what the commands and layouts are."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

from modeling_keye.layouts_keye import LAYOUTS

ROOT = Path(__file__).resolve().parents[1]
README, CHECKPOINTS, CARD = (ROOT / name for name in ("README.md", "docs/checkpoints.md", "model_card.md"))
# How people call the layouts.
PUBLIC_NAMES = {
    "keye_vl_preview": "Keye-VL-8B-Preview",
    "keye_vl_1_5": "Keye-VL-1.5-8B",
    "keye_vl_671b": "Keye-VL-671B-A37B",
    "keye_vl_2": "Keye-VL-2.0-30B-A3B",
    "deepseek_v3": "DeepSeek-V3",
    "deepseek_v32": "DeepSeek-V3.2",
}
COMMAND = re.compile(r"^python -m (conversion\.\w+)(.*)$", flags=re.MULTILINE)


def commands(document: Path) -> list[tuple[str, list[str]]]:
    """Modules and arguments of the command lines; what stands in brackets may be left out, and is given here."""
    found = COMMAND.findall(document.read_text())
    return [(module, shlex.split(re.sub(r"[\[\]]", "", line), comments=True)) for module, line in found]


class Parsed(Exception):
    """The command line was understood; nothing was run."""


@pytest.fixture
def understood(monkeypatch):
    """Whether the command of a module takes these arguments."""
    real = argparse.ArgumentParser.parse_args

    def parse_args(self, args=None, namespace=None):
        raise Parsed(real(self, args, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)

    def understood(module: str, arguments: list[str]) -> bool:
        with pytest.raises((Parsed, SystemExit)) as stopped:
            importlib.import_module(module).main(arguments)
        return stopped.type is Parsed

    return understood


@pytest.mark.parametrize("document", [README, CHECKPOINTS], ids=lambda path: path.name)
def test_conversion_commands_parse(document, understood, capsys):
    wrong = [(module, line) for module, line in commands(document) if not understood(module, line)]
    assert wrong == [], capsys.readouterr().err
    assert not understood("conversion.convert", ["SRC", "DST", "--no-such-option"])


def test_readme_shows_the_four_commands_and_the_guide_all_of_them():
    shown = {module.removeprefix("conversion.") for module, _ in commands(README)}
    assert shown == {"convert", "verify", "compose", "publish"}
    tools = {path.stem for path in (ROOT / "conversion").glob("*.py") if '__name__ == "__main__"' in path.read_text()}
    probes = {"publish_probe"}  # run by `publish`, not by people
    assert {module.removeprefix("conversion.") for module, _ in commands(CHECKPOINTS)} == tools - probes


def test_options_that_the_guide_names_exist():
    """`--option`s that the text mentions outside of command lines."""
    text = COMMAND.sub("", CHECKPOINTS.read_text())
    sources = "".join(path.read_text() for path in (ROOT / "conversion").glob("*.py"))
    known = set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', sources))
    assert set(re.findall(r"`(--[a-z-]+)", text)) <= known


def test_every_layout_is_in_the_guide():
    rows = re.findall(r"^\| `(\w+)` \| (`\w+`(?:, `\w+`)*) \|", CHECKPOINTS.read_text(), flags=re.MULTILINE)
    named = {name: tuple(re.findall(r"\w+", architectures)) for name, architectures in rows}
    assert named == {layout.name: layout.architectures for layout in LAYOUTS.values()}


def test_the_card_says_how_each_layout_was_verified():
    assert PUBLIC_NAMES.keys() == LAYOUTS.keys()
    tables = re.findall(r"(?:^\|.*\n)+", CARD.read_text(), flags=re.MULTILINE)
    table = next(table for table in tables if table.startswith("| Layout |"))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    for name in PUBLIC_NAMES.values():
        # A whole name: DeepSeek-V3 is no part of DeepSeek-V3.2.
        row = [cells for cells in rows if re.search(rf"(^|[\s,]){re.escape(name)}($|[\s,])", cells[0])]
        assert len(row) == 1 and all(row[0]), name
    # The models of the library that the tests compare with.
    oracles = {name for cells in rows for cell in cells[1:3] for name in re.findall(r"`(\w+)`", cell)}
    peers = (ROOT / "tests" / "conversion" / "peers.py").read_text().lower()
    assert oracles and {name for name in oracles if f"{name.replace('_', '')}config" not in peers} == set()


@pytest.mark.parametrize("document", [README, CARD], ids=lambda path: path.name)
def test_documents_say_that_no_full_size_weights_were_run(document):
    text = " ".join(document.read_text().split())
    assert "No full-size published weights were run" in text
    assert [name for name in PUBLIC_NAMES.values() if name not in text] == []


def test_what_the_card_refers_to_exists():
    named = re.findall(r"`((?:tests|docs|benchmarks|checkpoints|conversion)/[^`]*)`", CARD.read_text())
    assert named and [path for path in named if not (ROOT / path).exists()] == []
