"""Checkpoint folders load as remote code, in clean processes and beside the package, and are saved complete."""

import json

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

from modeling_keye.configuration_keye import AUTO_MAP
from tests.hub.conftest import ALL_CODE, DATA_FILES, OURS, PACKAGE, code_files
from tests.model.checkpoints import save_checkpoint, small_model, small_processor

pytestmark = pytest.mark.compat

AUTO_MODELS = (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM)
OPTIONAL = ("torchvision", "flash_attn", "triton", "torchcodec", "decord", "kernels")


@pytest.fixture(scope="module")
def clean_process(probe, bare_folder, clip, tmp_path_factory) -> dict:
    """One process that loads the bare folder by every Auto class and saves it again."""
    target = tmp_path_factory.mktemp("resaved") / "keye-resaved"
    model_only = tmp_path_factory.mktemp("resaved") / "model-only"
    auto_classes = ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
    *loaded, eager, _, _, imported = probe(
        *(("load", {"folder": bare_folder, "clip": clip, "auto_class": name}) for name in auto_classes),
        ("load_eager", {"folder": bare_folder, "clip": clip}),
        ("resave", {"folder": bare_folder, "to": target}),
        ("resave_model_only", {"folder": bare_folder, "to": model_only}),
        ("imported", {"names": OURS}),
    )
    loaded = dict(zip(auto_classes, loaded, strict=True))
    return {"loaded": loaded, "eager": eager, "resaved": target, "model_only": model_only, "imported": imported}


@pytest.fixture(scope="module")
def without_optional_packages(probe, clean_process, clip, expected_tokens) -> list:
    """A second process, with nothing but required packages, over what the first one saved."""
    folder = clean_process["resaved"]
    return probe(
        ("load", {"folder": folder, "clip": clip}),
        ("run_pipeline", {"folder": folder, "clip": clip}),
        ("decode", {"folder": folder, "tokens": expected_tokens}),
        ("load_model_only", {"folder": clean_process["model_only"]}),
        ("imported", {"names": OPTIONAL}),
        absent=(*OURS, *OPTIONAL),
    )


@pytest.mark.parametrize("auto_class", ["AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"])
def test_a_bare_folder_answers_where_the_package_is_absent(clean_process, auto_class, expected_tokens):
    result = clean_process["loaded"][auto_class]
    assert result["classes"] == dict.fromkeys(["KeyeForVideoQA", "KeyeProcessor", "KeyeConfig"], "transformers_modules")
    assert result["tokens"] == expected_tokens
    assert result["ids"] == small_processor().tokenizer("a red ball").input_ids
    assert clean_process["imported"] == []


def test_remote_code_takes_the_fast_paths_and_gives_them_up_when_asked(clean_process, expected_tokens):
    """The library decides by the text of the model file whether attention and experts can be switched at all."""
    for result in clean_process["loaded"].values():
        assert result["runs"] == ["keye_sparse", "sdpa", "grouped_mm"]
    assert clean_process["eager"] == [expected_tokens] * 2


def test_saving_from_remote_code_keeps_every_file(clean_process):
    assert {path.name for path in clean_process["resaved"].iterdir()} == ALL_CODE | DATA_FILES


def test_saving_the_model_alone_keeps_the_model_code(clean_process):
    names = {path.name for path in clean_process["model_only"].iterdir()}
    assert names == code_files("modeling_keye") | {"config.json", "generation_config.json", "model.safetensors"}


def test_a_folder_saved_from_remote_code_answers_again(without_optional_packages, expected_tokens):
    assert without_optional_packages[0]["tokens"] == expected_tokens
    assert without_optional_packages[3] == "KeyeForVideoQA"


def test_no_optional_package_is_needed(without_optional_packages):
    assert without_optional_packages[4] == []


def test_pipeline_answers_a_video_message(without_optional_packages):
    assert without_optional_packages[1] == without_optional_packages[2]


def test_saving_through_the_package_keeps_every_file(saved_folder):
    assert {path.name for path in saved_folder.iterdir()} == ALL_CODE | DATA_FILES
    assert json.loads((saved_folder / "config.json").read_text())["auto_map"] == AUTO_MAP
    settings = json.loads((saved_folder / "processor_config.json").read_text())
    assert settings["auto_map"]["AutoProcessor"] == AUTO_MAP["AutoProcessor"]
    assert settings["video_processor"]["auto_map"]["AutoVideoProcessor"] == "video_processing_keye.KeyeVideoProcessor"
    assert settings["image_processor"]["auto_map"]["AutoImageProcessor"] == "image_processing_keye.KeyeImageProcessor"


def test_two_copies_and_the_package_share_a_process(probe, saved_folder, bare_folder, clip, expected_tokens, tmp_path):
    other = save_checkpoint(tmp_path / "keye-other", kind="gqa", seed=1)
    copies, beside, single = probe(
        ("two_copies", {"first": saved_folder, "second": other, "clip": clip}),
        ("beside_package", {"package_root": PACKAGE.parent, "folder": bare_folder, "clip": clip}),
        ("load", {"folder": other, "clip": clip}),
        absent=(),
    )
    assert copies["tokens"][0] == expected_tokens
    assert copies["tokens"][1] == single["tokens"] != expected_tokens
    assert len(set(copies["modules"])) == 2
    assert beside["tokens"] == [expected_tokens] * 4
    assert beside["remote"] == "transformers_modules"
    # The library prefers a registered class to the repository's code.
    assert beside["auto"] == "modeling_keye.modeling_keye"


def test_auto_classes_of_the_package_need_no_trust(saved_folder):
    processor = AutoProcessor.from_pretrained(saved_folder)
    loaded = [AutoConfig.from_pretrained(saved_folder), processor, processor.image_processor, processor.video_processor]
    loaded += [auto.from_pretrained(saved_folder) for auto in AUTO_MODELS]
    assert {type(part).__module__.split(".")[0] for part in loaded} == {"modeling_keye"}


@pytest.fixture
def commits(monkeypatch) -> list[dict]:
    """The Hub, cut off behind the client: commits are kept instead of sent."""
    kept = []

    def create_commit(self, repo_id, operations, **kwargs):
        kept.append({operation.path_in_repo: operation for operation in operations})
        return huggingface_hub.CommitInfo(
            commit_url=f"https://huggingface.co/{repo_id}/commit/0", commit_message="", commit_description="", oid="0"
        )

    def no_card(*args, **kwargs):
        raise EntryNotFoundError("there is no card yet")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "create_repo",
        lambda self, repo_id, **kwargs: huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}"),
    )
    monkeypatch.setattr(huggingface_hub.ModelCard, "load", no_card)
    monkeypatch.setattr(huggingface_hub.ModelCard, "validate", lambda self, *args, **kwargs: None)
    return kept


def test_push_to_hub_carries_the_code(commits):
    small_model().push_to_hub("someone/keye")
    small_processor().push_to_hub("someone/keye")
    model, processor = (set(commit) for commit in commits)
    assert code_files("modeling_keye") | {"config.json", "generation_config.json", "model.safetensors"} <= model
    assert (
        code_files("processing_keye") | {"processor_config.json", "chat_template.jinja", "tokenizer.json"} <= processor
    )
    assert ALL_CODE | DATA_FILES <= model | processor
    assert not any(name.startswith("__") or name == "cli_keye.py" for name in model | processor)
