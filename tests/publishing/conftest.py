"""One Hub per session, one folder that is published to it, and processes that know nothing but that Hub."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from huggingface_hub import constants

from conversion import card, publish
from conversion.publish_upload import LocalFile
from tests.hub.conftest import answer_of_the_package
from tests.model.checkpoints import small_model, small_processor
from tests.processing.conftest import write_clip
from tests.publishing.hub_server import WRITER, HubServer

ROOT = Path(__file__).resolve().parents[2]
REMOTE_PROBE = ROOT / "tests" / "hub" / "remote_probe.py"
SHARD = 200_000


@pytest.fixture(scope="session")
def running_hub() -> Iterator[HubServer]:
    with HubServer() as hub:
        yield hub


def connect(patch: pytest.MonkeyPatch, hub: HubServer, token: str | None = WRITER) -> None:
    """What `HF_ENDPOINT` and the like do when they are set before the client is imported."""
    patch.setattr(constants, "ENDPOINT", hub.endpoint)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setenv("HF_HUB_DISABLE_XET", "1")
    for name in ("HF_HUB_OFFLINE", "HUGGING_FACE_HUB_TOKEN"):
        patch.delenv(name, raising=False)
    if token is None:
        patch.delenv("HF_TOKEN", raising=False)
    else:
        patch.setenv("HF_TOKEN", token)


@pytest.fixture
def hub(running_hub, monkeypatch) -> Iterator[HubServer]:
    """The Hub, with nothing planned and nothing recorded; every request must have had a route."""
    running_hub.reset()
    connect(monkeypatch, running_hub)
    yield running_hub
    assert running_hub.unknown == []
    running_hub.reset()


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """Seconds that were asked to be waited, and were not."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


def client_environment(hub: HubServer, home: Path, token: str | None = WRITER) -> dict[str, str]:
    """Environment of a process whose only Hub is this one, with an empty cache."""
    left_out = ("PYTHONPATH", "HF_HUB_OFFLINE", "HF_TOKEN")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_MODULES_CACHE": str(home / "modules")}
    return environment | ({"HF_TOKEN": token} if token else {})


def run_script(script: Path, *arguments: str, environment: dict[str, str], cwd: Path) -> list:
    """The JSON in the last line that a script prints."""
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="session")
def load_remotely(running_hub, tmp_path_factory) -> Callable[..., list]:
    """Run steps of the remote-code tests' probe against the Hub: clean process, empty cache, our packages absent."""

    def run(*steps: tuple[str, dict]) -> list:
        home = tmp_path_factory.mktemp("home")
        script = Path(shutil.copy(REMOTE_PROBE, home))
        request = {"steps": steps, "absent": ("modeling_keye", "conversion", "training", "tests")}
        environment = client_environment(running_hub, home)
        return run_script(script, json.dumps(request, default=str), environment=environment, cwd=home)

    return run


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", count=20, size=(56, 56))


@pytest.fixture(scope="session")
def expected_tokens(clip) -> list[int]:
    return answer_of_the_package(clip)


@pytest.fixture(scope="session")
def ready_folder(tmp_path_factory) -> Path:
    """A tiny model in four shards, with processor, code and card."""
    folder = tmp_path_factory.mktemp("ready") / "keye-small"
    small_model().save_pretrained(folder, max_shard_size="150KB")
    small_processor().save_pretrained(folder)
    assert card.main([str(folder), "--write", "--license", "apache-2.0"]) == card.DONE
    return folder


@pytest.fixture
def folder(ready_folder, tmp_path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(ready_folder, tmp_path / "keye-small"))


class Published:
    """A whole run of the command: exit code, printed lines, report, requests, and the repository."""

    def __init__(self, hub: HubServer, folder: Path, work: Path, repo_id: str):
        self.folder, self.repo_id = folder, repo_id
        patch = pytest.MonkeyPatch()
        try:
            hub.reset()
            connect(patch, hub)
            hub.fail("GET", "/refs$", status=503)
            hub.cut("GET", "/_storage/", after=20_000)
            hub.slow("GET", r"\.py$", chunk=512, times=5)
            patch.setattr(time, "sleep", lambda seconds: None)
            with redirect_stdout(StringIO()) as output:
                self.exit_code = publish.main([str(folder), repo_id, "--json", str(work / "report.json")])
            self.lines = output.getvalue().splitlines()
        finally:
            patch.undo()
        self.report = json.loads((work / "report.json").read_text())
        self.report_file = work / "report.json"
        self.requests, self.unknown = list(hub.requests), list(hub.unknown)
        self.repo = hub.repos[repo_id]
        hub.reset()


@pytest.fixture(scope="session")
def published(running_hub, ready_folder, tmp_path_factory) -> Published:
    return Published(running_hub, ready_folder, tmp_path_factory.mktemp("published"), "someone/keye-small")


@pytest.fixture
def files(tmp_path, request) -> dict[str, LocalFile]:
    """What an upload sends, without a model: three shards of random bytes, an index, settings and a card.

    The bytes are this test's own, so that the Hub does not know them from another one.
    """
    random = np.random.default_rng(crc32(request.node.name.encode()))
    contents = {f"model-0000{n}-of-00003.safetensors": random.bytes(SHARD) for n in (1, 2, 3)}
    contents |= {"model.safetensors.index.json": b"{}", "config.json": b'{"model_type": "keye"}'}
    contents |= {"README.md": b"---\nlicense: apache-2.0\n---\n\n# Keye\n", "modeling_keye.py": b"# code\n"}
    return write_files(tmp_path / "files", contents)


def write_files(folder: Path, contents: dict[str, bytes]) -> dict[str, LocalFile]:
    folder.mkdir(exist_ok=True)
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return {name: LocalFile.read(folder, name) for name in contents}
