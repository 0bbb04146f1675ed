"""Publishing from end to end: what arrives loads as remote code, in a process that knows nothing but the repository."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from conversion import card, publish
from conversion.publish_checks import Check, ProbeError
from conversion.publish_upload import LocalFile
from tests.hub.conftest import ALL_CODE, DATA_FILES
from tests.publishing.conftest import ROOT, client_environment, run_script
from tests.publishing.hub_server import WRITER

pytestmark = pytest.mark.compat

SHARDS = {f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)}


@pytest.fixture(scope="session")
def pushed(running_hub, ready_folder, clip, tmp_path_factory) -> dict[str, list[int]]:
    """Answers of the models that `push_to_hub` and `Trainer` pushed, by repository."""
    work = tmp_path_factory.mktemp("pushed")
    script = ROOT / "tests" / "publishing" / "push_with_the_library.py"
    environment = client_environment(running_hub, work)
    arguments = map(str, (ROOT, ready_folder, clip, work))
    model, trained = run_script(script, *arguments, environment=environment, cwd=work)
    return {"someone/keye-pushed": model, "someone/keye-trained": trained}


@pytest.fixture(scope="session")
def loaded(published, pushed, load_remotely, clip) -> dict[str, dict]:
    """Every repository, loaded in one clean process."""
    repositories = [published.repo_id, *pushed]
    results = load_remotely(*(("load", {"folder": name, "clip": clip}) for name in repositories))
    return dict(zip(repositories, results, strict=True))


def test_the_command_publishes_and_verifies(published):
    assert published.exit_code == publish.DONE, published.lines
    assert published.lines[-1] == f"published and verified: {published.report['uploaded']['url']}"
    assert published.report["passed"] and published.report["verified"] and published.report["generated"]
    assert {check["name"]: check["ok"] for check in published.report["checks"]} == dict.fromkeys(
        [
            "config",
            "weights",
            "code",
            "files",
            "secrets",
            "card",
            "loading",
            "download",
            "loading from the Hub",
            "logits",
        ],
        True,
    )
    assert published.report["uploaded"]["commit"] == published.repo.branches["main"]
    assert "hf_" not in json.dumps(published.report)


def test_the_repository_holds_the_folder_and_nothing_else(published):
    local = {path.name: path.read_bytes() for path in published.folder.iterdir()}
    remote = {name: data for name, data in published.repo.files.items() if name != ".gitattributes"}
    assert remote == local
    assert set(local) == ALL_CODE | (DATA_FILES - {"model.safetensors"}) | SHARDS | {
        "model.safetensors.index.json",
        "README.md",
    }


def test_everything_comes_in_one_commit_after_the_weights(published):
    first, second = published.repo.log()
    assert second.title == "initial commit" and first.title == "Upload Keye checkpoint"
    order = [(seen.method, seen.path.split("/")[1]) for seen in published.requests]
    commit = next(place for place, seen in enumerate(published.requests) if "/commit/" in seen.path)
    puts = [place for place, (method, _) in enumerate(order) if method == "PUT"]
    assert len(puts) == len(SHARDS) and max(puts) < commit


def test_disturbances_on_the_way_did_no_harm(published):
    """The fixture answers one request with 503, cuts a download in the middle and slows others down."""
    assert any("the Hub answered 503" in line and "again in 1 s" in line for line in published.lines)
    downloads = [seen for seen in published.requests if seen.path.startswith("/_storage/")]
    cut = [seen for seen in downloads if seen.sent == 20_000]
    assert len(cut) == 1 and len(downloads) == len(SHARDS) + 1
    assert sum(seen.path == cut[0].path for seen in downloads) == 2
    assert published.unknown == []


def test_the_token_goes_to_the_hub_only(published):
    for seen in published.requests:
        storage = seen.path.startswith(("/_storage/", "/_lfs/"))
        assert seen.host.startswith("localhost" if storage else "127.0.0.1")
        if seen.path != "/api/validate-yaml":  # which needs none
            assert seen.token == (None if storage else WRITER)


def test_a_published_checkpoint_answers_in_a_clean_process(loaded, published, expected_tokens):
    result = loaded[published.repo_id]
    assert result["classes"] == dict.fromkeys(["KeyeForVideoQA", "KeyeProcessor", "KeyeConfig"], "transformers_modules")
    assert result["tokens"] == expected_tokens


def test_push_to_hub_gives_a_repository_that_loads(loaded, pushed, expected_tokens):
    assert loaded["someone/keye-pushed"]["tokens"] == pushed["someone/keye-pushed"] == expected_tokens


def test_trainer_gives_a_repository_that_loads(loaded, pushed, running_hub, published):
    assert loaded["someone/keye-trained"]["tokens"] == pushed["someone/keye-trained"]
    before, after = published.repo.files, running_hub.repos["someone/keye-trained"].files
    assert after["model.safetensors"] not in before.values(), "training changed nothing, so the test shows nothing"


def test_the_report_is_evidence_for_the_card(published, tmp_path):
    folder = shutil.copytree(published.folder, tmp_path / "keye-small")
    text = str(card.make_card(folder, evidence=[published.report_file]))
    commit = published.report["uploaded"]["commit"]
    assert "| Loads and generates in a clean process | device cpu, torch " in text
    assert f"| every file and all logits equal, at commit {commit[:12]} |" in text
    assert "that it loads and generates" not in text and "that a download" not in text


def test_a_dry_run_sends_nothing(hub, folder, monkeypatch, capsys):
    monkeypatch.setattr(publish, "check_folder", lambda *arguments: ([Check("all", True, "fine")], FOUND))
    assert publish.main([str(folder), "someone/keye-dry", "--dry-run"]) == publish.DONE
    output = capsys.readouterr().out
    assert "  model-00002-of-00004.safetensors\n" in output
    assert output.endswith("nothing was sent\nready to be published to someone/keye-dry\n")
    assert hub.requests == []


FOUND = {"tokens": {"text": [1]}, "device": "cpu", "torch": "2", "transformers": "5", "class": "K", "parameters": 1}
FOUND |= {"dtype": "float32", "module": "transformers_modules"}


@pytest.mark.parametrize(
    ("there", "wrong"),
    [
        ({"module": "elsewhere"}, "the class comes from elsewhere"),
        ({"tokens": {"text": [2]}}, "generated {'text': [2]}, the local model {'text': [1]}"),
    ],
)
def test_another_model_on_the_hub_is_noticed(there, wrong):
    check = publish.compare_probes(FOUND, {**FOUND, **there})
    assert check.ok is False and wrong in check.text


def test_other_logits_are_noticed(tmp_path):
    logits = torch.linspace(-1, 1, 10).reshape(1, 2, 5)
    save_file({"text": logits}, tmp_path / "a")
    save_file({"text": logits.nextafter(torch.tensor(2.0))}, tmp_path / "b")
    assert publish.compare_logits(tmp_path / "a", tmp_path / "a").ok is True
    check = publish.compare_logits(tmp_path / "a", tmp_path / "b")
    assert check.ok is False and "text prompt: 1.19" in check.text


def test_another_file_on_the_hub_is_noticed(files, tmp_path):
    snapshot = tmp_path / "snapshot"
    shutil.copytree(next(iter(files.values())).path.parent, snapshot)
    assert publish.compare_files(files, snapshot).ok is True
    (snapshot / "config.json").write_text('{"model_type": "kaye"}')
    (snapshot / "modeling_keye.py").unlink()
    check = publish.compare_files(files, snapshot)
    assert check.ok is False
    assert "config.json differs" in check.text and "modeling_keye.py is not in the repository" in check.text


def run_without_probes(monkeypatch, folder, *options: str, probe=lambda *a, **k: FOUND) -> int:
    monkeypatch.setattr(publish, "check_folder", lambda *arguments: ([Check("all", True, "fine")], FOUND))
    monkeypatch.setattr(publish, "run_probe", probe)
    monkeypatch.setattr(publish, "compare_logits", lambda *arguments: Check("logits", True, "equal"))
    return publish.main([str(folder), "someone/keye-fast", *options])


def test_a_model_that_does_not_load_from_the_hub_fails(hub, files, monkeypatch, capsys):
    def probe(*arguments, **options):
        raise ProbeError("ImportError: no such file")

    folder = files["config.json"].path.parent
    assert run_without_probes(monkeypatch, folder, probe=probe) == publish.WRONG
    output = capsys.readouterr()
    assert "loading from the Hub: AutoModel or AutoProcessor fails on someone/keye-fast at" in output.out
    assert output.err.endswith("is not what it should be.\n")


def test_a_download_that_fails_for_good_says_what_was_done(hub, files, monkeypatch, capsys, waits):
    hub.fail("GET", "/resolve/", status=500, times=10**6)
    folder = files["config.json"].path.parent
    assert run_without_probes(monkeypatch, folder, "--revision", "unlucky") == publish.IMPOSSIBLE
    commit = hub.repos["someone/keye-fast"].branches["unlucky"]
    error = capsys.readouterr().err
    assert f"tree/{commit} is committed but not verified: downloading: the Hub answered 500" in error


def test_weights_too_large_for_the_memory_are_compared_by_their_bytes(hub, files, monkeypatch, capsys):
    shapes = {"class": "K", "module": "transformers_modules", "shapes": {"a": [1]}, "tied": []}
    found = {**shapes, "device": "cpu", "torch": "2", "transformers": "5"}
    monkeypatch.setattr(publish, "check_folder", lambda *arguments: ([Check("all", True, "fine")], found))
    monkeypatch.setattr(publish, "run_probe", lambda *a, **k: found)
    folder = files["config.json"].path.parent
    assert publish.main([str(folder), "someone/keye-large"]) == publish.DONE
    output = capsys.readouterr().out
    assert "names and shapes are the local ones; logits were not compared, the memory is too small" in output
    assert "published, with the same bytes; logits were not compared" in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no/such/folder", "someone/keye"], "there is no folder no/such/folder"),
        (["{folder}", "a name/keye"], "'a name/keye' is not the name of a repository, expected NAMESPACE/NAME"),
        (["{folder}", "someone/keye", "--revision", "0" * 40], "is a commit, which cannot be changed"),
        (
            ["{folder}", "someone/keye", "--cache", "{folder}"],
            "is not empty, so a download into it would prove nothing",
        ),
    ],
)
def test_what_cannot_be_done_is_said_in_one_sentence(hub, files, monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(publish, "run_probe", None)
    if "{folder}" in arguments:
        monkeypatch.setattr(publish, "check_folder", lambda *_: ([Check("all", True, "fine")], FOUND))
    folder = str(files["config.json"].path.parent)
    assert publish.main([argument.replace("{folder}", folder) for argument in arguments]) == publish.IMPOSSIBLE
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert hub.requests == []


def test_a_full_disk_is_noticed_before_anything_is_sent(hub, files, monkeypatch, capsys):
    monkeypatch.setattr(publish.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    assert run_without_probes(monkeypatch, files["config.json"].path.parent) == publish.IMPOSSIBLE
    assert "where 0 bytes are free; give --cache a folder on a larger disk" in capsys.readouterr().err
    assert hub.requests == []


def test_failed_checks_send_nothing(hub, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "Keye"}')
    assert publish.main([str(tmp_path), "someone/keye"]) == publish.WRONG
    output = capsys.readouterr()
    assert "python -m conversion.convert SRC DST" in output.out
    assert output.err.endswith("checks failed; nothing was sent.\n")
    assert hub.requests == []


def test_interrupting_says_how_to_go_on(hub, files, monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(publish, "check_folder", interrupt)
    assert publish.main([str(files["config.json"].path.parent), "someone/keye"]) == publish.INTERRUPTED
    assert "run the same command again" in capsys.readouterr().err


def test_hashes_are_those_of_git_and_of_large_files(tmp_path):
    (tmp_path / "hello.txt").write_bytes(b"hello\n")
    file = LocalFile.read(tmp_path, "hello.txt")
    assert file.git == "ce013625030ba8dba906f756967f9e9ca394464a"
    assert file.sha256 == "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
