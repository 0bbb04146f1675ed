"""The rules by which `modeling_keye/*.py` can be loaded as remote code; the loader finds imports by reading text."""

import ast
import re
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_import_files, get_relative_imports

from modeling_keye.configuration_keye import AUTO_MAP

PACKAGE = Path(__file__).resolve().parents[2] / "modeling_keye"
PACKAGE_ONLY = {"__init__", "__main__", "cli_keye"}
REMOTE_FILES = sorted(path for path in PACKAGE.glob("*.py") if path.stem not in PACKAGE_ONLY)
REQUIRED_PACKAGES = {"torch", "transformers", "accelerate", "safetensors", "huggingface_hub", "numpy", "PIL", "av"}
# Files from which the loader starts: one for each class that an `auto_map` names.
ENTRIES = {
    **AUTO_MAP,
    "AutoProcessor": "processing_keye.KeyeProcessor",
    "AutoVideoProcessor": "video_processing_keye.KeyeVideoProcessor",
    "AutoImageProcessor": "image_processing_keye.KeyeImageProcessor",
}

# `import .x` is no Python, but the loader looks for it, so a line of prose that begins so breaks loading.
LOOKS_LIKE_IMPORT = re.compile(r"^\s*(?:from\s+\.\S*\s+import\b|import\s+\.\S+\s*$)", re.MULTILINE)
IMPORT_BY_NAME = re.compile(r"import_module\(\s*[\"']\.")


def broken_rules(source: str, siblings: set[str]) -> list[str]:
    """Sentences about each place of `source` that the loader would not follow."""
    found = []
    real_lines = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            real_lines.add(node.lineno)
            place = f"line {node.lineno}: "
            if node.level > 1:
                found.append(place + "two dots leave the flat folder")
            elif node.module is None:
                found.append(place + "`from . import x` is not seen by the loader; write `from .x import name`")
            elif "." in node.module:
                found.append(place + f"`.{node.module}` is searched as a file of that name, folders do not exist")
            elif node.module not in siblings:
                found.append(place + f"there is no file {node.module}.py beside it")
        if isinstance(node, (ast.ImportFrom, ast.Import)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            if not getattr(node, "level", 0) and any(name.split(".")[0] == "modeling_keye" for name in names):
                found.append(f"line {node.lineno}: our own package is not installed where remote code runs")
    for match in LOOKS_LIKE_IMPORT.finditer(source):
        line = source.count("\n", 0, match.start() + len(match.group()) - len(match.group().lstrip())) + 1
        if line not in real_lines:
            found.append(f"line {line}: text that begins like a relative import is taken for one")
    if IMPORT_BY_NAME.search(source):
        found.append("import_module of a relative name is not copied by the loader")
    return found


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("from . import vision_keye", "not seen"),
        ("def f():\n    from . import vision_keye", "not seen"),
        ("from .vision.tower import x", "folders"),
        ("from ..other import x", "two dots"),
        ("from .absent_keye import x", "no file"),
        ("try:\n    from .absent_keye import x\nexcept ImportError:\n    x = None", "no file"),
        ("from modeling_keye.vision_keye import x", "not installed"),
        ("import modeling_keye", "not installed"),
        ('"""Text.\n\nfrom .vision_keye import x\n"""', "taken for one"),
        ("'''\n    import .vision_keye\n'''", "taken for one"),
        ("import importlib\nimportlib.import_module('.x', __package__)", "import_module"),
    ],
)
def test_lint_finds_what_the_loader_would_miss(source, word):
    assert any(word in sentence for sentence in broken_rules(source, {"vision_keye"})), broken_rules(source, set())


@pytest.mark.parametrize(
    "source",
    [
        "from .vision_keye import x",
        "from .vision_keye import (\n    x,\n    y,\n)  # why",
        '"""Everything comes from .vision_keye import chains."""',
        "try:\n    import triton\nexcept ImportError:\n    triton = None",
    ],
)
def test_lint_accepts_what_the_loader_follows(source):
    assert broken_rules(source, {"vision_keye"}) == []


@pytest.mark.parametrize("path", REMOTE_FILES, ids=lambda path: path.stem)
def test_relative_imports_can_be_followed(path):
    assert broken_rules(path.read_text(), {file.stem for file in REMOTE_FILES}) == []


@pytest.mark.compat
@pytest.mark.parametrize("path", REMOTE_FILES, ids=lambda path: path.stem)
def test_loader_sees_the_imports_that_python_sees(path):
    tree = ast.walk(ast.parse(path.read_text()))
    real = {node.module for node in tree if isinstance(node, ast.ImportFrom) and node.level == 1}
    assert set(get_relative_imports(path)) == real


@pytest.mark.compat
@pytest.mark.parametrize("path", REMOTE_FILES, ids=lambda path: path.stem)
def test_only_required_packages_are_imported_outside_try(path):
    assert set(get_imports(path)) - set(sys.stdlib_module_names) <= REQUIRED_PACKAGES


@pytest.mark.compat
def test_every_remote_file_is_copied_and_no_package_only_file():
    copied = set()
    for name in ENTRIES.values():
        entry = PACKAGE / f"{name.split('.')[0]}.py"
        copied |= {entry.stem} | {Path(file).stem for file in get_relative_import_files(entry)}
    assert copied == {path.stem for path in REMOTE_FILES}


@pytest.mark.parametrize("auto_class", ENTRIES)
def test_auto_map_names_a_class_at_the_root(auto_class):
    module, _, name = ENTRIES[auto_class].partition(".")
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def test_the_folder_is_flat():
    assert [path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"] == []


@pytest.mark.parametrize("path", REMOTE_FILES, ids=lambda path: path.stem)
def test_no_check_of_configuration_classes(path):
    """From a local folder the configuration and the model come from two copies of one file: classes are not equal."""
    assert not re.search(r"isinstance\([^()]*Keye\w*Config", path.read_text())


@pytest.mark.parametrize("path", REMOTE_FILES, ids=lambda path: path.stem)
def test_auto_classes_are_not_registered_in_remote_files(path):
    assert not re.search(r"\bAuto\w+\.register\(|register_for_auto_class\(", path.read_text())
