"""One published folder and what it becomes, small towers for text checkpoints, and runs that are killed."""

import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest

import modeling_keye.configuration_keye as configuration_keye
from conversion import convert as convert_module
from conversion.convert import convert
from tests.conversion import killed_runs
from tests.conversion.published import write_published
from tests.model.factories import VISION


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """Keye-VL-2.0, which the tests that change it copy."""
    return write_published(tmp_path_factory.mktemp("source") / "keye-2", "keye_vl_2", shards=2)


@pytest.fixture(scope="session")
def ours(source, tmp_path_factory) -> Path:
    """`source` converted, in several shards."""
    folder = tmp_path_factory.mktemp("ours") / "ours"
    convert(source, folder, max_shard_size="300KB")
    return folder


@pytest.fixture
def small_new_towers(monkeypatch) -> None:
    """A text checkpoint gets a tower of the default size, 0.4 billion parameters; here it gets a small one."""
    real = configuration_keye.our_config

    def our_config(raw: dict) -> dict:
        ours = real(raw)
        return ours if ours["vision_config"] else {**ours, "vision_config": VISION}

    for module in (configuration_keye, convert_module):
        monkeypatch.setattr(module, "our_config", our_config)


@pytest.fixture(scope="session")
def convert_and_die(tmp_path_factory) -> Callable[..., tuple[int, list[dict]]]:
    """Run a conversion, in a process of its own, to its end or to `moment`; exit code, and what happened in order."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([killed_runs.__name__])
    log = tmp_path_factory.mktemp("log") / "log"

    def run(src: Path, dst: Path, moment: int = -1, halfway: bool = False, **options) -> tuple[int, list[dict]]:
        log.unlink(missing_ok=True)
        arguments = (str(src), str(dst), str(log), moment, halfway, options)
        process = context.Process(target=killed_runs.run_and_die, args=arguments)
        process.start()
        process.join()
        return process.exitcode, [json.loads(line) for line in log.read_text().splitlines()]

    return run
