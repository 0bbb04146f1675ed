"""Model cards say what the folder and the reports say, and list the rest as not verified."""

import json
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from conversion import card
from conversion.card import make_card
from conversion.card_evidence import CLAIMS, CardError
from conversion.publish_checks import check_card
from modeling_keye import KeyeConfig
from tests.model.checkpoints import save_checkpoint, small_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """A tiny model in one file, without a card."""
    return save_checkpoint(tmp_path_factory.mktemp("card") / "keye-one")


@pytest.fixture
def plain(source, tmp_path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "keye-one"))


def table(text: str, heading: str) -> dict[str, str]:
    """First and second column of the first table under a heading."""
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE).group(1)
    rows = [re.split(r" \| ", line.strip("| ")) for line in section.splitlines() if line.startswith("| ")]
    return {row[0]: row[1] for row in rows if len(row) > 1}


def open_claims(text: str) -> list[str]:
    section = re.search(r"^## Not verified\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE).group(1)
    return [line[2:] for line in section.splitlines() if line.startswith("- ")]


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_facts_are_those_of_the_folder(plain):
    model = small_model()
    facts = table(str(make_card(plain, license="mit")), "Facts")
    parameters = dict(model.named_parameters())
    text = model.config.text_config
    assert facts["Source"] == "no record of a conversion in the folder"
    assert facts["Parameters"] == f"{sum(parameter.numel() for parameter in parameters.values()):,}"
    active = sum(
        parameter.numel() * text.num_experts_per_tok // text.n_routed_experts
        if ".mlp.experts." in name
        else parameter.numel()
        for name, parameter in parameters.items()
        if name.startswith(("model.language_model.", "lm_head."))
    )
    assert facts["Parameters per text token"].startswith(f"{active:,}: decoder, embedding and head, with ")
    assert f"with {text.num_experts_per_tok} of {text.n_routed_experts} routed" in facts["Parameters per text token"]
    assert facts["Context"].startswith(f"{text.max_position_embeddings:,} tokens")
    assert f"top {text.index_topk} tokens of the deepseek_v32 indexer" in facts["Selection"]
    assert f"the {text.local_window} tokens before, every {text.anchor_stride}-th token" in facts["Selection"]
    assert facts["Decoder"].startswith(f"2 layers of width {text.hidden_size}, multi-head latent attention")
    stored = sum(value.numel() for name, value in model.state_dict().items())
    assert facts["Stored as"] == f"float32 ({stored:,} numbers)"


def test_parts_add_up(plain):
    text = str(make_card(plain, license="mit"))
    section = text.split("| Part | Parameters |")[1].split("## Files")[0]
    counts = [int(count.replace(",", "")) for count in re.findall(r"\| ([\d,]+) \|", section)]
    assert sum(counts) == sum(value.numel() for value in small_model().state_dict().values())


def test_files_are_listed_with_their_sizes(plain):
    files = table(str(make_card(plain, license="mit")), "Files")
    code = len(list(plain.glob("*.py")))
    assert set(files) - {"File", "---"} == {f"`{path.name}`" for path in plain.iterdir() if path.suffix != ".py"} | {
        f"{code} code files (`*.py`)"
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"index_topk": 4096, "max_position_embeddings": 4096}, "that is the whole context, so attention is dense"),
        (
            {"indexer_type": None, "local_window": None, "anchor_stride": None},
            "none, every token attends to all",
        ),
    ],
)
def test_a_selection_of_everything_is_called_dense(changes, words):
    text = KeyeConfig.from_preset("keye-tiny", text_config={"layer_types": None, **changes}).text_config
    assert words in card._selection(text)


def test_without_evidence_nothing_is_verified(plain):
    text = str(make_card(plain, license="mit"))
    assert "## Verified\n\nNothing yet.\n" in text
    claims = open_claims(text)
    # There is no source that the weights could equal.
    assert len(claims) == len(CLAIMS) - 1 and "that it loads and generates in a clean process" in claims[0]
    assert claims[-1] == "prompts near the 4,096 tokens that the configuration allows"
    assert "model-index" not in text


def test_the_written_card_is_complete_and_stable(plain):
    assert card.main([str(plain), "--write", "--license", "apache-2.0"]) == card.DONE
    assert check_card(plain).ok is True
    first = (plain / "README.md").read_text()
    assert card.main([str(plain), "--write"]) == card.DONE
    assert (plain / "README.md").read_text() == first
    data = ModelCard(first).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "video-text-to-text", "apache-2.0")
    assert "custom_code" in data.tags and data.base_model is None


def test_the_code_in_the_card_runs_as_python(plain):
    text = str(make_card(plain, license="mit"))
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    compile(code, "card", "exec")
    assert 'name = "keye-one"' in code and "apply_chat_template" in code
    (plain / "processor_config.json").unlink()
    code = re.search(r"```python\n(.*?)```", str(make_card(plain, license="mit")), re.DOTALL).group(1)
    compile(code, "card", "exec")
    assert "AutoProcessor.from_pretrained" not in code


def test_what_people_wrote_stays(plain):
    (plain / "README.md").write_text(
        "---\nlicense: mit\nlanguage: en\ntags: [cats]\npipeline_tag: image-text-to-text\nbase_model: a/b\n---\n\n"
        "# Cat watcher\n\nIt watches cats.\n\n```\n## Use\nno heading\n```\n\n## Facts\n\nold\n\n"
        "## Limits\n\nOnly cats.\n\n```\n## Files\n```\n"
    )
    text = str(make_card(plain))
    data = ModelCard(text).data
    assert (data.license, data.language, data.base_model, data.pipeline_tag) == (
        "mit",
        "en",
        "a/b",
        "image-text-to-text",
    )
    assert data.tags[0] == "cats" and "custom_code" in data.tags
    assert "# Cat watcher\n\nIt watches cats.\n\n```\n## Use\nno heading\n```\n\n## Use\n" in text
    assert text.rstrip().endswith("## Limits\n\nOnly cats.\n\n```\n## Files\n```")
    assert "\nold\n" not in text
    assert str(make_card(plain, license="apache-2.0", base_models=["c/d", "e/f"])).count("a/b") == 0


def conversion_record(**changes) -> dict:
    return {
        "format": 1,
        "source": {"name": "Org/Keye", "revision": "0123456789abcdef"},
        "layout": "keye_vl_671b",
        "published_config": {"architectures": ["KeyeVLMoe"]},
        "fp8_block": [128, 128],
        "dropped": ["a.inv_freq", "b.inv_freq"],
        "initialised": [],
        **changes,
    }


@pytest.mark.parametrize(
    ("record", "expected", "base"),
    [
        (
            conversion_record(),
            "Org/Keye at 0123456789ab (layout keye_vl_671b), published as KeyeVLMoe, in fp8 blocks of 128 x 128; 2 "
            "tensors without use left out (`a.inv_freq`, ...)",
            "Org/Keye",
        ),
        (
            conversion_record(
                source={"name": "local", "revision": None},
                fp8_block=None,
                dropped=[],
                initialised=["projector.x"],
            ),
            "local (layout keye_vl_671b), published as KeyeVLMoe; 1 tensor newly initialised, not trained "
            "(`projector.x`)",
            None,
        ),
        (
            {
                "format": "composed",
                "text": {"name": "deep/seek", "revision": "f" * 40, "layout": "deepseek_v32"},
                "vision": {"name": "org/keye", "revision": "e" * 40, "layout": "keye_vl_2"},
                "initialised": ["a", "b"],
            },
            f"decoder of deep/seek at {'f' * 12} (layout deepseek_v32) under the tower of org/keye at {'e' * 12} "
            "(layout keye_vl_2); 2 tensors newly initialised, not trained (`a`, ...)",
            ["deep/seek", "org/keye"],
        ),
    ],
)
def test_the_source_is_that_of_the_record(plain, record, expected, base):
    write(plain / "conversion.json", record)
    text = str(make_card(plain, license="mit"))
    assert table(text, "Facts")["Source"] == expected
    assert ModelCard(text).data.base_model == base
    assert any("equal their source" in claim for claim in open_claims(text))


def verify_report(folder: Path, **changes) -> dict:
    size = sum(len(value.numpy().tobytes()) for value in small_model().state_dict().values())
    ours = {"folder": str(folder), "layout": "ours", "tensors": len(small_model().state_dict()), "bytes": size}
    theirs = {"folder": "/downloads/Keye-671B", "layout": "keye_vl_671b", "tensors": 1, "bytes": 2}
    return {"verdict": "EQUAL: 9 tensors", "equal": True, "a": theirs, "b": ours, **changes}


def test_a_comparison_is_evidence(plain, tmp_path):
    write(plain / "conversion.json", conversion_record())
    report = write(tmp_path / "verify.json", verify_report(plain))
    text = str(make_card(plain, license="mit", evidence=[report]))
    row = (
        "| Weights equal those of Keye-671B (layout keye_vl_671b), value for value | EQUAL: 9 tensors | "
        "`python -m conversion.verify Keye-671B keye-one` |"
    )
    assert row in text and "/downloads" not in text
    assert not any("equal their source" in claim for claim in open_claims(text))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"equal": False, "verdict": "DIFFERENT: 1 tensor differs"},
            "says DIFFERENT: 1 tensor differs; that verifies",
        ),
        ({"b": {"folder": "/elsewhere"}}, "and neither is"),
        ({"b": {"tensors": 3}}, "is about other weights than those in"),
        ({"b": {"bytes": 3}}, "is about other weights than those in"),
    ],
)
def test_a_comparison_of_something_else_is_refused(plain, tmp_path, changes, words):
    report = verify_report(plain)
    report |= {name: {**report[name], **value} if isinstance(value, dict) else value for name, value in changes.items()}
    with pytest.raises(CardError, match=words):
        make_card(plain, license="mit", evidence=[write(tmp_path / "verify.json", report)])


def test_an_evaluation_is_evidence(plain, tmp_path):
    path = tmp_path / "evaluate.txt"
    scores = {"questions": 500, "exact_match": 99.8, "by_kind": {"what": 100.0, "when": 99.6}, "seed": 3}
    path.write_text(f"some other output\n{json.dumps(scores)}\n")
    text = str(make_card(plain, license="mit", evidence=[path]))
    assert "| Answers about synthetic clips, 500 questions (what, when), seed 3 | 99.8 % exact match |" in text
    assert not any("quality" in claim for claim in open_claims(text))
    (result,) = ModelCard(text).data.eval_results
    assert (result.metric_type, result.metric_value, result.task_type) == ("exact_match", 99.8, "video-text-to-text")


def test_anything_else_can_be_evidence_when_it_says_what_it_is(plain, tmp_path):
    content = {"what": "Runs on a GPU", "result": "H100, 3 tokens/s", "command": "make test-gpu", "covers": ["gpu"]}
    text = str(make_card(plain, license="mit", evidence=[write(tmp_path / "gpu.json", content)]))
    assert "| Runs on a GPU | H100, 3 tokens/s | `make test-gpu` |" in text
    assert not any("GPU" in claim for claim in open_claims(text))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"a": 1}, "is no report that is known here"),
        ({"what": "x", "result": "y", "command": "z", "covers": ["moon"]}, "covers moon; known: weights, loading"),
        ({"kind": "publish", "passed": False}, "says that a check failed, so it verifies nothing"),
        ({"kind": "publish", "passed": True, "files": {}}, "is about another model.safetensors than the one in"),
        ([1], "holds no JSON object"),
        (None, "cannot be read"),
    ],
)
def test_other_reports_are_refused(plain, tmp_path, content, words):
    path = tmp_path / "report.json"
    if content is not None:
        write(path, content)
    with pytest.raises(CardError, match=words):
        make_card(plain, license="mit", evidence=[path])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{plain}"], "no license is known; pass --license"),
        (["{plain}/no"], "there is no folder"),
        (["{plain}", "--license", "mit", "--evidence", "{plain}/config.json"], "is no report that is known here"),
    ],
)
def test_errors_are_one_sentence(plain, capsys, arguments, words):
    assert card.main([argument.replace("{plain}", str(plain)) for argument in arguments]) == card.IMPOSSIBLE
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and error.startswith("card: ")


def test_a_folder_of_another_make(plain, capsys):
    write(plain / "config.json", {"model_type": "KeyeVL2"})
    assert card.main([str(plain), "--license", "mit"]) == card.IMPOSSIBLE
    assert "convert it first" in capsys.readouterr().err


def test_damaged_weights(plain, capsys):
    (plain / "model.safetensors").write_bytes(b"\0" * 8)
    assert card.main([str(plain), "--license", "mit"]) == card.IMPOSSIBLE
    assert "model.safetensors" in capsys.readouterr().err


def test_damaged_metadata(plain, capsys):
    (plain / "README.md").write_text("---\nlicense: [mit\n---\n# x\n")
    assert card.main([str(plain)]) == card.IMPOSSIBLE
    assert "the metadata of" in capsys.readouterr().err


def test_the_embedded_checkpoint_gets_a_card(capsys):
    assert card.main([str(ROOT / "checkpoints" / "keye-tiny")]) == card.DONE
    text = capsys.readouterr().out
    assert table(text, "Facts")["Parameters"] == "4,144,032"
    assert "## What it can do" in text
