"""Full-size headers whose arithmetic closes, every form there and back, one file or several, kills on the way back.

Full-size files hold no values: their data is a hole that takes no disk.
"""

import json
import math
import random
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from conversion import staging
from conversion.convert import convert
from conversion.staging import partial_folder
from conversion.verify import NotComparableError, Side
from modeling_keye.checkpoint_keye import DTYPES
from tests.conversion import published_tensors
from tests.conversion.folders import assert_nothing_written, contents, different, stored
from tests.conversion.full_size import FULL_SIZE
from tests.conversion.killed_runs import assert_looks_unfinished
from tests.conversion.published import published_checkpoint, write_published

PACKING_TABLE = "visual.vision_model.embeddings.packing_position_embedding.weight"
PACKING, HEAD = {"packing position table": 37_748_736}, {"vision pooling head": 15_238_352}
# Blocks of 128 x 128, matrix by matrix: attention of 61 layers, MLPs of 3, and 257 experts in each of 58.
SCALES = {
    "fp8 scales": 61 * (12 * 56 + 192 * 12 + 5 * 56 + 256 * 4 + 56 * 128)
    + 3 * (3 * 144 * 56)
    + 58 * 257 * (3 * 16 * 56)
}
# Layout, files, numbers in the published files without scales, and those of them that no model uses.
PUBLISHED_SIZES = {
    "2.0": ("keye_vl_2", 13, 31_122_082_160, PACKING),
    "Preview": ("keye_vl_preview", 4, 8_696_828_736, {**PACKING, **HEAD}),
    "671B, fp8": ("keye_vl_671b", 163, 671_493_691_248, SCALES),
    "671B, 16 bit": ("keye_vl_671b", 163, 671_493_691_248, {}),
}


@pytest.fixture
def no_values(monkeypatch):
    """The tests' own published tensors are names, dtypes and shapes only."""

    def draw(self, name, shape, scale=1.0, offset=0.0):
        return torch.empty(shape, dtype=self.dtype, device="meta")

    def quantise(weight, block, draw, name):
        grid = [math.ceil(size / step) for size, step in zip(weight.shape, block)]
        return weight.to(torch.float8_e4m3fn), torch.empty(grid, device="meta")

    monkeypatch.setattr(published_tensors._Draw, "__call__", draw)
    monkeypatch.setattr(published_tensors, "quantise", quantise)


def full_size_tensors(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """Configuration and tensors, on the meta device, of a published checkpoint."""
    layout, _, _, unused = PUBLISHED_SIZES[name]
    config = dict(FULL_SIZE[layout])
    if "16 bit" in name:
        del config["quantization_config"]
    packing, head = (set(part) <= set(unused) for part in (PACKING, HEAD))
    tensors = published_tensors.published_tensors(config, layout=layout, packing=packing, head=head)
    if packing:
        tensors[PACKING_TABLE] = torch.empty(32768, 1152, dtype=torch.bfloat16, device="meta")
    return config, tensors


def write_headers(folder: Path, config: dict, tensors: dict[str, torch.Tensor], shards: int) -> Path:
    """A folder with the files of these tensors, whose data is a hole; every second name goes on to the next file."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    dtypes = {dtype: name for name, dtype in DTYPES.items()}
    weight_map = {}
    for number in range(shards):
        header, end = {}, 0
        for name in list(tensors)[number::shards]:
            tensor = tensors[name]
            begin, end = end, end + tensor.numel() * tensor.element_size()
            header[name] = {"dtype": dtypes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        file = folder / f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        with open(file, "wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
        weight_map.update(dict.fromkeys(header, file.name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture
def full_size(no_values, tmp_path):
    """Writes a full-size folder; it goes right after the test, because tools that know no holes would see terabytes."""

    def write(name: str, without: str | None = None) -> Path:
        config, tensors = full_size_tensors(name)
        if without is not None:
            del tensors[without]
        return write_headers(tmp_path / "full-size", config, tensors, PUBLISHED_SIZES[name][1])

    yield write
    shutil.rmtree(tmp_path / "full-size")


@pytest.mark.parametrize("name", PUBLISHED_SIZES)
def test_full_size_headers_open_and_their_arithmetic_closes(name, full_size):
    layout, shards, published, unused = PUBLISHED_SIZES[name]
    side = Side.open("A", full_size(name))
    scales = unused.get("fp8 scales", 0)
    assert side.layout_name == layout and side.is_fp8 == bool(scales) and len(side.stored.files) == shards
    facts = side.arithmetic()
    implied = published + scales - sum(unused.values())
    assert (facts["stored"], facts["implied"], facts["unused"]) == (published + scales, implied, unused)
    terms = [f"{implied:,} implied by the configuration", *(f"{count:,} {group}" for group, count in unused.items())]
    if len(unused) < 2:
        assert facts["equation"] == f"A: {published + scales:,} stored = {' + '.join(terms)}"
    assert facts["closes"]
    # Every tensor of the model has a recipe of its shape.
    assert {name: recipe.shape for name, recipe in side.plan().items()} == side.expected


def test_a_full_size_file_that_lacks_128_numbers_does_not_close(full_size):
    lost = "model.layers.35.self_attn.k_norm.weight"
    side = Side.open("A", full_size("Preview", without=lost))
    facts = side.arithmetic()
    assert not facts["closes"] and facts["equation"].endswith("it differs by -128")
    with pytest.raises(NotComparableError, match=r"missing: model\.language_model\.layers\.35\.self_attn\.k_norm"):
        side.plan()


def test_a_full_size_conversion_is_planned_from_headers(full_size, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**50))
    numbers = convert(full_size("2.0"), tmp_path / "ours", dry_run=True)
    assert numbers["parameters"] == 31_122_082_160 - 37_748_736
    assert numbers["bytes"] == 2 * numbers["parameters"] and numbers["shards"] == 13
    assert "31,084,333,424 parameters in 13 shard(s)" in capsys.readouterr().err
    assert_nothing_written(tmp_path / "ours")


FORMS = {
    "Preview": {"layout": "keye_vl_preview"},
    "1.5": {"layout": "keye_vl_1_5"},
    "671B, 16 bit": {"layout": "keye_vl_671b"},
    "671B, fp8": {"layout": "keye_vl_671b", "fp8": True},
    "2.0, fused": {"layout": "keye_vl_2"},
    "2.0, one by one": {"layout": "keye_vl_2", "experts": "unfused"},
    "V3, 16 bit": {"layout": "deepseek_v3", "mtp": True},
    "V3, fp8": {"layout": "deepseek_v3", "fp8": True, "mtp": True},
    "V3.2, 16 bit": {"layout": "deepseek_v32", "mtp": True},
    "V3.2, fp8": {"layout": "deepseek_v32", "fp8": True, "mtp": True},
}


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_comes_back_bit_for_bit(form, sharded, small_new_towers, tmp_path):
    options = FORMS[form]
    write_published(tmp_path / "published", shards=3 if sharded else 1, **options)
    size = "300KB" if sharded else "5GB"
    there = convert(tmp_path / "published", tmp_path / "ours", max_shard_size=size, progress=False)
    back = convert(tmp_path / "ours", tmp_path / "back", to="published", max_shard_size=size, progress=False)
    for numbers, folder in ((there, "ours"), (back, "back")):
        assert (numbers["shards"] > 1) == sharded
        assert (tmp_path / folder / "model.safetensors").exists() != sharded
        assert (tmp_path / folder / "model.safetensors.index.json").exists() == sharded
    config, tensors = published_checkpoint(**options)
    ignorable = ("visual.vision_model.head.", PACKING_TABLE, f"model.layers.{config['num_hidden_layers']}.")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(ignorable)}
    assert different(stored(tmp_path / "back"), kept) == []


KILLS = 6


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Path:
    """fp8, whose blocks are made again on the way back, out of experts in one tensor."""
    folder = tmp_path_factory.mktemp("ours")
    write_published(folder / "published", "keye_vl_671b", fp8=True, num_hidden_layers=2)
    convert(folder / "published", folder / "ours", progress=False)
    return folder / "ours"


@pytest.fixture(scope="module")
def go_back(convert_and_die, ours) -> Callable[..., tuple[int, list[dict]]]:
    return partial(convert_and_die, ours, to="published", max_shard_size="400KB")


def while_writing(events: list[dict]) -> list[dict]:
    return events[next(number for number, event in enumerate(events) if "start" in event) :]


def reads_per_tensor(events: list[dict]) -> dict[str, list]:
    """What was read for each finished tensor, in order, once writing had begun."""
    reads, pending = {}, []
    for event in while_writing(events):
        if "read" in event:
            pending.append(event["read"])
        elif event.get("finished"):
            reads[event["finished"]], pending = pending, []
    return reads


def test_the_way_back_goes_on_after_kills(go_back, tmp_path):
    """The same bytes, and the reads of exactly those tensors that were not finished.

    Sources cannot tell what was finished: a scale is copied, and read for the weight that it belongs to as well.
    """
    code, events = go_back(tmp_path / "whole")
    assert code == 0
    expected, reads, calls = contents(tmp_path / "whole"), reads_per_tensor(events), events[-1]["calls"]
    assert len(reads) == events[-1]["numbers"]["tensors"] and all(reads.values())
    generator = random.Random(3)
    resumed = set()
    # Not the last two, which remove the journal and its folder: there is nothing to go on with then.
    for moment in generator.sample(range(len(calls) - 2), KILLS):
        dst = tmp_path / f"back-{moment}"
        code, before = go_back(dst, moment, generator.random() < 0.5)
        assert code == -signal.SIGKILL
        assert_looks_unfinished(dst, expected)
        finished = [event["finished"] for event in before if event.get("finished")]
        code, after = go_back(dst)
        assert code == 0 and contents(dst) == expected and not partial_folder(dst).exists(), moment
        # With nothing finished, the checks before writing may be made again.
        again = [event["read"] for event in (after if finished else while_writing(after)) if "read" in event]
        assert again == [read for name, parts in reads.items() if name not in finished for read in parts], moment
        assert after[-1]["numbers"]["resumed_tensors"] == len(finished)
        resumed.add(len(finished))
    # The moments fall into the weights, not only before and after them.
    assert len(resumed) > KILLS // 2
