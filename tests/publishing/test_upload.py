"""Uploads that are disturbed, refused, interrupted or overtaken: what arrives, what is said, and what is sent twice."""

import os
import signal
import subprocess
import sys
from zlib import crc32

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import BadRequestError

from conversion.publish_upload import LocalFile, PublishError, Uploaded, upload
from tests.publishing.conftest import ROOT, SHARD, client_environment, connect, write_files
from tests.publishing.hub_server import READER, STRANGER, WRITER

pytestmark = pytest.mark.compat

REPO = "someone/keye-upload"


@pytest.fixture
def send(hub, files, request):
    """Upload `files` to a repository of this test's own; `said` holds the lines."""
    said = []

    def run(repo: str | None = None, **options) -> Uploaded:
        api = HfApi(endpoint=constants.ENDPOINT, token=options.pop("token", None))
        return upload(api, options.pop("files", files), repo or run.repo, say=said.append, **options)

    run.repo = f"{REPO}-{crc32(request.node.name.encode())}"
    run.said = said
    return run


def contents(files: dict[str, LocalFile]) -> dict[str, bytes]:
    return {name: file.path.read_bytes() for name, file in files.items()}


def holds(hub, repo: str, files: dict[str, LocalFile], branch: str = "main") -> bool:
    remote = {name: blob.data for name, blob in hub.repos[repo].at(branch).files.items()}
    return {name: data for name, data in remote.items() if name != ".gitattributes"} == contents(files)


def received(hub) -> dict[str, int]:
    """How often each large object arrived whole."""
    whole = [seen.path.split("/")[2] for seen in hub.sent("PUT", "^/_lfs/") if seen.received == SHARD]
    return {oid: whole.count(oid) for oid in whole}


def test_an_upload_arrives(hub, files, send):
    done = send()
    assert holds(hub, send.repo, files)
    assert done.commit == hub.repos[send.repo].branches["main"]
    assert done.url == f"{hub.endpoint}/{send.repo}/tree/{done.commit}"
    assert (done.removed, done.kept) == ([], [".gitattributes"])
    assert list(received(hub).values()) == [1, 1, 1]


def test_parts_arrive(hub, files, send):
    hub.part_size = 60_000
    send()
    assert holds(hub, send.repo, files)
    assert len(hub.sent("PUT", r"^/_lfs/\w+/\d+$")) == 3 * 4


def test_a_second_upload_of_the_same_files_sends_and_commits_nothing(hub, files, send):
    first = send()
    hub.reset()
    second = send()
    assert second.commit == first.commit
    assert hub.sent("PUT", ".") == hub.sent("POST", "/commit/") == []


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/api/whoami-v2", 500),
        ("POST", "/api/repos/create", 502),
        ("POST", "/api/validate-yaml", 503),
        ("GET", "/refs$", 504),
        ("GET", "/tree/", 429),
        ("POST", "/preupload/", 500),
        ("POST", "/objects/batch", 503),
        ("PUT", "/_lfs/", 500),
        ("PUT", "/_lfs/", 503),
        ("POST", "/objects/verify", 502),
        ("POST", "/commit/", 429),
        ("POST", "/commit/", 500),
        ("POST", "/commit/", 504),
    ],
)
def test_a_server_error_anywhere_is_survived(hub, files, send, waits, method, path, status):
    hub.fail(method, path, status=status, times=2)
    send()
    assert holds(hub, send.repo, files)
    assert len(hub.repos[send.repo].log()) == 2
    assert len(waits) == 2


@pytest.mark.parametrize(("method", "path"), [("PUT", "/_lfs/"), ("POST", "/commit/"), ("POST", "/preupload/")])
def test_a_cut_connection_is_survived(hub, files, send, waits, method, path):
    hub.cut(method, path, after=1_000 if method == "PUT" else 50, times=2)
    send()
    assert holds(hub, send.repo, files)
    assert len(hub.repos[send.repo].log()) == 2
    assert list(received(hub).values()) == [1, 1, 1]


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub, files, send, waits):
    hub.lose_reply("POST", "/commit/")
    done = send()
    assert holds(hub, send.repo, files)
    assert len(hub.repos[send.repo].log()) == 2
    assert len(hub.sent("POST", "/commit/")) == 1
    assert done.commit == hub.repos[send.repo].branches["main"]


def test_a_commit_that_fails_for_good(hub, files, send, waits):
    hub.fail("POST", "/commit/", status=500, times=100, message="disk on fire")
    with pytest.raises(PublishError, match=r"committing: the Hub answered 500 \(disk on fire\), also after waiting"):
        send()
    assert waits == [1, 2, 4, 8, 8]
    assert len(hub.repos[send.repo].log()) == 1


def test_a_slow_link_is_no_error(hub, files, send, waits):
    hub.slow("PUT", "/_lfs/", chunk=256, times=3)
    send()
    assert holds(hub, send.repo, files)
    assert waits == []


@pytest.mark.parametrize("kind", ["cut", "fail"])
def test_an_upload_that_stopped_goes_on_where_it_stopped(hub, files, send, waits, kind):
    second = files["model-00002-of-00003.safetensors"].sha256
    if kind == "cut":
        hub.cut("PUT", second, after=100_000, times=1_000)
    else:
        hub.fail("PUT", second, status=503, times=1_000)
    with pytest.raises(PublishError, match="sending model-00002-of-00003.safetensors: .*also after waiting") as error:
        send()
    assert "run the same command again later, files that have arrived are not sent twice" in str(error.value)
    assert len(hub.repos[send.repo].log()) == 1, "nothing may be visible before everything is there"
    assert files["model-00001-of-00003.safetensors"].sha256 in received(hub)
    hub.reset()
    send()
    assert holds(hub, send.repo, files)
    assert set(received(hub)) == {second, files["model-00003-of-00003.safetensors"].sha256}


def test_an_upload_that_was_killed_goes_on_where_it_stopped(hub, files, send, tmp_path):
    code = (
        "import sys; from pathlib import Path; from huggingface_hub import HfApi;"
        "from conversion.publish_upload import LocalFile, upload;"
        "folder = Path(sys.argv[1]);"
        "files = {path.name: LocalFile.read(folder, path.name) for path in folder.iterdir()};"
        "upload(HfApi(), files, sys.argv[2])"
    )
    folder = files["config.json"].path.parent
    environment = {**client_environment(hub, tmp_path), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder), send.repo], env=environment, stdout=subprocess.DEVNULL
    )
    second = files["model-00002-of-00003.safetensors"].sha256
    hub.before("PUT", second, lambda: os.kill(process.pid, signal.SIGKILL))
    assert process.wait(timeout=300) == -signal.SIGKILL
    assert len(hub.repos[send.repo].log()) == 1
    first = received(hub)
    hub.reset()
    send()
    assert holds(hub, send.repo, files)
    assert files["model-00001-of-00003.safetensors"].sha256 in first
    assert files["model-00001-of-00003.safetensors"].sha256 not in received(hub)


def test_somebody_else_commits_in_between(hub, files, send):
    hub.before("POST", "/commit/", lambda: hub.commit(send.repo, {"notes.txt": b"mine"}))
    with pytest.raises(PublishError, match="somebody else changed main of someone/keye-upload") as error:
        send()
    newest, parent = hub.repos[send.repo].log()
    assert f"from {parent.oid[:8]} to {newest.oid[:8]}" in str(error.value)
    assert "run the same command again" in str(error.value)
    assert newest.title == "somebody else's commit"
    hub.reset()
    assert send().kept == [".gitattributes", "notes.txt"]
    assert hub.sent("PUT", ".") == []


def test_what_others_put_into_the_repository_stays(hub, files, send):
    hub.create(send.repo, files={"assets/plot.png": b"png", "pytorch_model.bin": b"old", "train.py": b"#"})
    done = send()
    assert done.removed == []
    assert done.kept == [".gitattributes", "assets/plot.png", "pytorch_model.bin", "train.py"]
    assert {"assets/plot.png", "pytorch_model.bin", "train.py"} <= set(hub.repos[send.repo].files)


def test_what_an_earlier_upload_left_goes_in_the_same_commit(hub, files, send):
    old = {
        "model.safetensors": b"one file, which the library would prefer",
        "model-00004-of-00004.safetensors": b"a shard",
        "preprocessor_config.json": b"{}",
        "old_keye.py": b"#",
    }
    hub.create(send.repo, files={**old, "config.json": b"{}"})
    done = send()
    assert done.removed == sorted(old)
    assert holds(hub, send.repo, files)
    assert len(hub.repos[send.repo].log()) == 3
    assert any(line.startswith("removed with this commit, left by an earlier upload: ") for line in send.said)


def test_one_file_after_shards(hub, files, send, tmp_path):
    send()
    single = write_files(tmp_path / "single", {**contents(files), "model.safetensors": b"all in one"})
    single = {name: file for name, file in single.items() if "-of-" not in name and "index" not in name}
    done = send(files=single)
    assert done.removed == sorted(name for name in files if "-of-" in name or "index" in name)
    assert holds(hub, send.repo, single)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "custom_generate/generate.py"])
def test_files_that_change_what_is_loaded_are_refused(hub, send, name):
    hub.create(send.repo, files={name: b"{}"})
    with pytest.raises(PublishError, match=f"the repository holds {name}, with which it would not load this model"):
        send()
    assert hub.sent("PUT", ".") == hub.sent("POST", "/commit/") == []


def test_a_branch_is_made_and_the_main_one_left_alone(hub, files, send):
    done = send(revision="v1")
    assert done.revision == "v1" and holds(hub, send.repo, files, "v1")
    assert list(hub.repos[send.repo].files) == [".gitattributes"]
    assert send(revision="v1").commit == done.commit


def test_a_pull_request_can_be_filled(hub, files, send):
    api = HfApi(endpoint=constants.ENDPOINT)
    api.create_repo(send.repo)
    asked = api.create_commit(send.repo, [CommitOperationAdd("note.txt", b"1")], commit_message="ask", create_pr=True)
    assert asked.pr_revision == "refs/pr/1"
    assert send(revision="refs/pr/1").kept == [".gitattributes", "note.txt"]
    assert list(hub.repos[send.repo].files) == [".gitattributes"]
    with pytest.raises(PublishError, match="has no refs/pr/7; it has main, refs/pr/1"):
        send(revision="refs/pr/7")


def test_a_name_without_a_namespace_is_that_of_the_token(hub, send):
    assert send("keye-short").repository == "someone/keye-short"


def test_an_organisation_that_one_belongs_to(hub, send):
    assert send("lab/keye-lab").repository == "lab/keye-lab"


def test_a_private_repository(hub, files, send):
    assert send(private=True).repository == send.repo
    assert hub.repos[send.repo].private
    assert send.said[0] == f"private repository {send.repo}, as someone"
    assert send(private=True).commit == send().commit
    with pytest.raises(PublishError, match="the Hub does not find|may not do this"):
        send(token=STRANGER)


def test_a_public_repository_is_not_private(hub, send):
    send()
    hub.reset()
    with pytest.raises(PublishError, match="exists and is public, so --private cannot be kept"):
        send(private=True)
    assert hub.sent("POST", "/preupload/") == []


@pytest.mark.parametrize(
    ("token", "repo", "words"),
    [
        (READER, None, r"the token may not do this in .*\(the Hub answered 403 .*use a token with write permission"),
        (WRITER, "stranger/keye", r"creating the repository: the token may not do this in stranger/keye"),
        (WRITER, "nobody/keye", r"creating the repository: the token may not do this in nobody/keye"),
        ("hf_revoked", None, r"the Hub does not accept the token .*make a new one that may write"),
    ],
)
def test_missing_permission(hub, send, token, repo, words):
    with pytest.raises(PublishError, match=words):
        send(repo, token=token)
    assert hub.sent("POST", "/preupload/") == hub.sent("PUT", ".") == []


def test_permission_to_read_an_existing_repository_is_not_enough(hub, files, send):
    send()
    files["README.md"].path.write_text("---\nlicense: mit\n---\n# Other\n")
    changed = {**files, "README.md": LocalFile.read(files["README.md"].path.parent, "README.md")}
    hub.reset()
    with pytest.raises(PublishError, match="the token may not do this in"):
        send(token=READER, files=changed)
    assert hub.sent("PUT", ".") == [] and len(hub.repos[send.repo].log()) == 2


def test_no_token(hub, send, monkeypatch):
    connect(monkeypatch, hub, token=None)
    with pytest.raises(PublishError, match="there is no access token; run `hf auth login`, or set HF_TOKEN"):
        send()
    assert hub.requests == []


def test_offline(hub, send, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PublishError, match="HF_HUB_OFFLINE is set, so nothing can be sent; unset it"):
        send()


def test_a_hub_that_is_not_there(hub, files, waits):
    api = HfApi(endpoint="http://127.0.0.1:9", token=WRITER)
    with pytest.raises(PublishError, match="asking who owns the token: the connection failed .*also after waiting"):
        upload(api, files, "someone/keye", say=lambda line: None)
    assert waits == [1, 2, 4, 8, 8]


def test_a_card_that_the_hub_refuses_stops_before_the_weights(hub, files, send):
    files["README.md"].path.write_text("---\nlicense: 5\n---\n# Keye\n")
    with pytest.raises(PublishError, match=r"refuses the metadata of README.md \(\"license\" must be a string\)"):
        send()
    assert hub.sent("PUT", ".") == []


def test_the_server_checks_what_it_is_sent(hub, send):
    """The tests prove nothing if the Hub of the tests believes everything."""
    send()
    api = HfApi(endpoint=constants.ENDPOINT)
    forged = CommitOperationAdd("model.safetensors", b"x" * 100)
    forged.upload_info.sha256 = b"\0" * 32
    with pytest.raises(RuntimeError) as error:
        api.preupload_lfs_files(send.repo, [forged])
    assert "does not have the promised sha256" in str(error.value.__cause__)
    forged._is_uploaded = True
    with pytest.raises(BadRequestError, match="the LFS object of model.safetensors was not uploaded"):
        api.create_commit(send.repo, [forged], commit_message="forged")
