"""`python -m conversion.convert OWNER/NAME DST`: data files come from the Hub, code and pickles do not."""

import json

import pytest
from huggingface_hub import constants

from conversion.convert import main
from tests.conversion.folders import contents
from tests.conversion.published import write_published


@pytest.fixture
def published(hub, tmp_path, monkeypatch) -> dict[str, bytes]:
    """Files of the repository someone/keye-1.5, with code and a pickle that must stay where they are."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    folder = write_published(tmp_path / "published", "keye_vl_1_5", shards=2)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files |= {"modeling_keye_vl_1_5.py": b"raise RuntimeError", "optimizer.bin": b"\x80\x04.", "old/config.json": b"{}"}
    hub.create("someone/keye-1.5", files=files)
    return files


def test_a_repository_is_converted_like_a_folder(hub, published, tmp_path):
    assert main(["someone/keye-1.5", str(tmp_path / "from-hub")]) == 0
    assert main([str(tmp_path / "published"), str(tmp_path / "from-folder")]) == 0
    from_hub, from_folder = contents(tmp_path / "from-hub"), contents(tmp_path / "from-folder")
    assert {k: v for k, v in from_hub.items() if k != "conversion.json"} == {
        k: v for k, v in from_folder.items() if k != "conversion.json"
    }
    source = json.loads((tmp_path / "from-hub" / "conversion.json").read_text())["source"]
    assert source["name"] == "someone/keye-1.5" and len(source["revision"]) == 40
    fetched = {path.name for path in (tmp_path / "cache").rglob("*") if path.parent.parent.name == "snapshots"}
    assert fetched == {
        name for name in published if name.endswith((".json", ".safetensors", ".txt")) and "/" not in name
    }


def test_an_absent_repository_is_refused(hub, tmp_path, capsys):
    assert main(["someone/nothing", str(tmp_path / "x")]) == 1
    assert "there is no folder someone/nothing, and the Hub says" in capsys.readouterr().err
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.partial").exists()
