"""Folders that must not be published: each fault alone, and all of them in one report."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion import publish_checks
from conversion.card import file_table
from conversion.publish_checks import Check, ProbeError, check_folder, check_loading, list_files, run_probe
from modeling_keye.checkpoint_keye import Checkpoint

FIRST_SHARD = "model-00001-of-00004.safetensors"


@pytest.fixture
def without_loading(monkeypatch) -> None:
    """The last check takes seconds; here it is always right."""
    monkeypatch.setattr(publish_checks, "check_loading", lambda *arguments: (Check("loading", True, "loads"), {}))


def wrong(folder: Path, **options) -> dict[str, str]:
    """Failed checks of a folder, by name."""
    checks, _ = check_folder(folder, **options)
    return {check.name: check.text for check in checks if check.ok is False}


def edit_json(path: Path, **changes) -> None:
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def test_a_good_folder_is_ready(without_loading, folder):
    checks, _ = check_folder(folder)
    assert {check.ok for check in checks} == {True}
    assert [check.name for check in checks] == ["config", "weights", "code", "files", "secrets", "card", "loading"]


def test_everything_wrong_is_said_at_once(monkeypatch, folder):
    monkeypatch.setattr(publish_checks, "run_probe", None)
    edit_json(folder / "config.json", auto_map={})
    (folder / FIRST_SHARD).unlink()
    (folder / "training_args.bin").write_bytes(b"PK\x03\x04")
    (folder / "notes.txt").write_text("to do")
    (folder / ".env").write_text("A=1")
    (folder / "README.md").unlink()
    checks, found = check_folder(folder)
    assert [check.name for check in checks if check.ok is False] == [
        "config", "weights", "pickles", "stray files", "secrets", "card",
    ]  # fmt: skip
    assert str(checks[-1]) == "not checked loading: not tried until config, weights and code are right"
    assert found is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "KeyeVL2"}, "convert a published checkpoint first: python -m conversion.convert SRC DST"),
        (
            {"auto_map": None},
            "auto_map of config.json lacks AutoConfig -> configuration_keye.KeyeConfig, Auto",
        ),
        (
            {"auto_map": {"AutoConfig": "configuration_keye.KeyeConfig"}},
            "lacks AutoModel -> modeling_keye.KeyeFor",
        ),
    ],
)
def test_config(without_loading, folder, change, words):
    edit_json(folder / "config.json", **change)
    assert words in wrong(folder)["config"]


@pytest.mark.parametrize(("text", "words"), [(None, "is missing"), ("{", "as JSON"), ("[]", "no JSON object")])
def test_unreadable_config(folder, text, words):
    (folder / "config.json").unlink() if text is None else (folder / "config.json").write_text(text)
    assert words in wrong(folder)["config"]


def test_weights_must_be_whole(folder):
    shard = folder / FIRST_SHARD
    shard.write_bytes(shard.read_bytes()[:-1])
    assert FIRST_SHARD in wrong(folder)["weights"]


def test_an_index_beside_a_single_file_is_refused(folder):
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    assert "remove the one that does not belong to this checkpoint" in wrong(folder)["weights"]


def test_a_damaged_file_of_scales_is_refused(folder):
    (folder / "fp8_scales.safetensors").write_bytes(b"\0" * 16)
    assert "fp8_scales.safetensors" in wrong(folder)["weights"]


def test_code_that_is_missing(folder):
    (folder / "cache_keye.py").unlink()
    assert "cache_keye.py is missing, which modeling_keye.py needs" in wrong(folder)["code"]


def test_code_of_the_processor_that_is_missing(folder):
    (folder / "video_reader_keye.py").unlink()
    assert "video_reader_keye.py is missing, which video_processing_keye.py needs" in wrong(folder)["code"]


@pytest.mark.parametrize("entry", ["someone/other--modeling_keye.KeyeForVideoQA", "KeyeForVideoQA", "a.b.C"])
def test_code_of_another_place(folder, entry):
    auto_map = {**json.loads((folder / "config.json").read_text())["auto_map"], "AutoModelForCausalLM": entry}
    edit_json(folder / "config.json", auto_map=auto_map)
    assert f"{entry!r}, expected FILE.CLASS of a file in this folder" in wrong(folder)["code"]


def test_a_class_that_is_not_there(folder):
    auto_map = {**json.loads((folder / "config.json").read_text())["auto_map"], "AutoModelForCausalLM": "cache_keye.No"}
    edit_json(folder / "config.json", auto_map=auto_map)
    assert "cache_keye.py has no class No" in wrong(folder)["code"]


def test_code_that_is_not_ours_needs_trust(without_loading, folder):
    with open(folder / "cache_keye.py", "a") as file:
        file.write("\n")
    text = wrong(folder)["code"]
    assert text.startswith("cache_keye.py differs from this package's; save the model again") and "--trust-code" in text
    assert wrong(folder, trust_code=True) == {}


def test_stray_files(without_loading, folder):
    (folder / "plots").mkdir()
    for name in ("plots/loss.png", "optimizer.safetensors", "cli_keye.py", "model-00009-of-00009.safetensors"):
        (folder / name).write_bytes(b"x")
    text = wrong(folder)["stray files"]
    assert text.startswith(
        "cli_keye.py, model-00009-of-00009.safetensors, optimizer.safetensors, plots/loss.png: no part"
    )
    assert "plots/loss.png" not in wrong(folder, allow=["plots/*.png"])["stray files"]


def test_what_training_leaves(without_loading, folder):
    """The record of a run is published, an adapter that is merged is not, and pickles stay refused."""
    (folder / "training.json").write_text('{"stage": "finetune"}')
    (folder / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "training_args.bin"):
        (folder / "adapter" / name).write_bytes(b"{}")
    checks, _ = check_folder(folder)
    assert {check.ok for check in checks} == {True}
    text = next(check.text for check in checks if check.name == "files")
    assert text.endswith("; adapter/ is left out, because the weights hold it already")
    names = list_files(folder)
    assert "training.json" in names and not any(name.startswith("adapter") for name in names)
    assert "`training.json`" in file_table(folder) and not any("adapter" in name for name in file_table(folder))

    (folder / "training_args.bin").write_bytes(b"PK\x03\x04")
    assert wrong(folder)["pickles"].startswith("training_args.bin: may run code when opened")


def test_a_folder_that_is_no_adapter_is_a_stray(without_loading, folder):
    (folder / "adapter").mkdir()
    (folder / "adapter" / "notes.txt").write_text("x")
    assert wrong(folder)["stray files"].startswith("adapter/notes.txt: no part of a checkpoint")


@pytest.mark.parametrize(
    ("name", "data"),
    [("training_args.bin", b""), ("a.pt", b""), ("notes.txt", b"\x80\x04K\x01."), ("LICENSE", b"PK\x03\x04data")],
)
def test_pickles_are_known_by_name_and_by_content(without_loading, folder, name, data):
    (folder / name).write_bytes(data)
    assert f"{name}: may run code when opened" in wrong(folder, allow=["*"])["pickles"]


@pytest.mark.parametrize(
    "name", [".env", ".env.local", "id_rsa", "server.pem", "token", "hf_token.txt", "secrets.json"]
)
def test_secrets_by_name(without_loading, folder, name):
    (folder / name).write_text("x")
    assert f"{name} by its name" in wrong(folder, allow=["*"])["secrets"]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("hf_" + "a1B2" * 9, "a Hub token"),
        ("-----BEGIN RSA " + "PRIVATE KEY-----", "a private key"),
        ("AKIA" + "ABCDEFGH12345678", "a cloud access key"),
        ("ghp_" + "a1B2" * 9, "a code host's token"),
        ("sk-" + "proj-" + "a1B2" * 9, "an API key"),
    ],
)
def test_secrets_by_content(without_loading, folder, text, what):
    edit_json(folder / "generation_config.json", note=f"{text} ")
    found = wrong(folder)["secrets"]
    assert f"generation_config.json holds {what}" in found and text not in found


def test_links(without_loading, folder, tmp_path):
    (tmp_path / "outside.json").write_text("{}")
    (tmp_path / "outside").mkdir()
    (folder / "vocab.json").symlink_to(tmp_path / "outside.json")
    (folder / "merges.txt").symlink_to(folder / "absent.txt")
    (folder / "more").symlink_to(tmp_path / "outside")
    (folder / "NOTICE").symlink_to(folder / "README.md")
    text = wrong(folder, allow=["more"])["links"]
    assert text.startswith("more, vocab.json, merges.txt: links to other places or to nothing")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            ("license: apache-2.0\n", ""),
            "has no license; see python -m conversion.card FOLDER --write --license LICENSE",
        ),
        (("pipeline_tag: video-text-to-text\n", ""), "has no pipeline_tag"),
        (("library_name: transformers", "library_name: timm"), "has library_name 'timm', expected 'transformers'"),
        (("## Use", "[More Information Needed]\n\n## Use"), "still says 'More Information Needed'"),
        (("## Use", "TODO: describe\n\n## Use"), "still says 'TODO'"),
        (("## Use", "by {{ author }}\n\n## Use"), "still says '{{ author }}'"),
        (("license: apache-2.0", "license: [apache"), "the metadata of README.md cannot be read"),
    ],
)
def test_card(without_loading, folder, change, words):
    text = (folder / "README.md").read_text()
    assert change[0] in text
    (folder / "README.md").write_text(text.replace(*change, 1))
    assert words in wrong(folder)["card"]


def test_a_card_without_metadata_or_text(without_loading, folder):
    (folder / "README.md").write_text("Just a model.\n")
    text = wrong(folder)["card"]
    for part in ("has no library_name", "has no pipeline_tag", "has no license", "has no tags", "has no heading"):
        assert part in text


def test_code_that_fails_is_noticed(folder):
    (folder / "cache_keye.py").write_text('raise RuntimeError("broken on purpose")\n')
    text = wrong(folder, trust_code=True)["loading"]
    assert text == "AutoModel or AutoProcessor fails in a clean process: RuntimeError: broken on purpose"


def test_weights_that_do_not_fit_are_noticed_without_memory(folder, monkeypatch):
    """A clean process builds the model on the meta device, where the memory is too small for the weights."""
    monkeypatch.setattr(publish_checks, "available_memory", lambda: 0)
    stored = Checkpoint.open(folder)
    check, found = check_loading(folder, stored)
    assert check.ok is True
    assert check.text.startswith(
        f"names and shapes of {len(stored)} tensors are those of KeyeForVideoQA; nothing was gen"
    )
    assert "and 0 bytes of memory are free" in check.text and "tokens" not in found

    shard = folder / FIRST_SHARD
    tensors = load_file(shard)
    gone, other, *_ = tensors
    tensors[other] = tensors[other].reshape(-1)
    tensors["model.extra"] = tensors.pop(gone)
    save_file(tensors, shard, metadata={"format": "pt"})
    text = publish_checks.compare_shapes(found, Checkpoint.from_files(sorted(folder.glob("*.safetensors"))))
    assert f"1 missing ({gone})" in text and "1 unexpected (model.extra)" in text and f"({other})" in text


@pytest.mark.parametrize("kind", ["missing", "unexpected", "mismatched"])
def test_tensors_that_the_library_reports_are_an_error(folder, monkeypatch, kind):
    found = {
        "module": "transformers_modules",
        "missing": [],
        "unexpected": [],
        "mismatched": [],
        kind: ["lm_head.weight"],
    }
    monkeypatch.setattr(publish_checks, "run_probe", lambda *arguments, **options: found)
    check, _ = check_loading(folder, Checkpoint.open(folder))
    assert check.ok is False and check.text == f"{kind} tensors: lm_head.weight; convert or save again"


def test_a_class_of_the_package_is_not_the_folders_code(folder, monkeypatch):
    monkeypatch.setattr(publish_checks, "run_probe", lambda *arguments, **options: {"module": "modeling_keye"})
    check, _ = check_loading(folder, Checkpoint.open(folder))
    assert check.ok is False and "the class comes from modeling_keye, not from the folder's code" in check.text


def test_a_probe_that_hangs_is_given_up(folder, monkeypatch):
    monkeypatch.setattr(publish_checks, "PROBE_SECONDS", 0)
    with pytest.raises(ProbeError, match="it took longer than 0 seconds"):
        run_probe(str(folder), None, processor=False, weights=True, output=None, offline=True)


def test_the_probe_gets_no_token_and_no_other_cache(folder, monkeypatch, tmp_path):
    script = tmp_path / "probe.py"
    script.write_text("import json, os\nprint(json.dumps(dict(os.environ)))\n")
    monkeypatch.setattr(publish_checks, "PROBE", script)
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    monkeypatch.setenv("HF_HUB_CACHE", "/cache")
    seen = run_probe(str(folder), None, processor=False, weights=True, output=None, offline=True)
    assert "HF_TOKEN" not in seen and "HF_HUB_CACHE" not in seen
    assert seen["HF_HUB_OFFLINE"] == "1" and seen["HF_HOME"] != os.environ["HF_HOME"]


def test_available_memory_is_a_number_or_unknown(monkeypatch):
    free = publish_checks.available_memory()
    assert free is None or free > 0
    monkeypatch.setattr(publish_checks.Path, "read_text", lambda self: (_ for _ in ()).throw(OSError("no such file")))
    assert publish_checks.available_memory() is None


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (12_345_678, "12.3 MB"), (6e10, "60.0 GB"), (1.34e12, "1.3 TB")],
)
def test_sizes_for_people(size, text):
    assert publish_checks.human(size) == text


def test_files_in_folders_are_listed_and_links_not_entered(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c.txt").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert list_files(tmp_path) == ["a/b/c.txt", "link"]


def test_no_folder(tmp_path):
    with pytest.raises(NotADirectoryError, match=re.escape(f"there is no folder {tmp_path / 'no'}")):
        check_folder(tmp_path / "no")
