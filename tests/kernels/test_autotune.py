"""Tuning without a device: all values that a kernel may take give one result; what a search and a file do."""

import json
from dataclasses import asdict, replace
from functools import partial
from itertools import product

import pytest
import torch
import triton

from modeling_keye import (
    autotune_keye,
    sparse_attention_keye,
    triton_common_keye,
    triton_gqa_backward_keye,
    triton_gqa_keye,
    triton_kl_dense_keye,
    triton_kl_index_keye,
    triton_kl_keye,
    triton_kl_sparse_keye,
    triton_kl_target_keye,
    triton_mla_backward_keye,
    triton_mla_keye,
    triton_selection_keye,
    triton_tuning_keye,
)
from modeling_keye.configuration_keye import KeyeTextConfig
from modeling_keye.triton_tuning_keye import OPTIONS, asked_by, own_choice, trial
from tests.kernels.aot import SHARED_LIMIT
from tests.kernels.test_ops import COMMON, TINY

DENSE_LOSS = ["kl_attention_lse", "kl_index_lse", "kl_divergence", "kl_gradients"]
# In the order of their calls; heads of latent attention are looked at in two forms.
KERNELS = {
    "mla": ["selection_scores", "mla_forward", "mla_backward_scores", "mla_backward_rows", *DENSE_LOSS, "kl_lists"],
    "gqa": ["selection_scores", "gqa_unions", "gqa_lists", "gqa_backward", *DENSE_LOSS, "kl_unions", "kl_lists"],
}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(triton_common_keye, "MULTIPROCESSORS_OFF_DEVICE", 2)
    monkeypatch.setattr(triton_tuning_keye, "_measured", {})


# Few queries, and lists that tiles do not divide. So many heads share a key that four queries are a unit.
SMALL = autotune_keye.Workload(keys=150, queries=5, run=3, sequences=2)
SIZES = {"mla": TINY["mla"], "gqa": TINY["gqa"] | {"num_attention_heads": 32}}


def kernels_of(kind: str, training: bool) -> list[str]:
    return [name for name in KERNELS[kind] if training or not ("backward" in name or name.startswith("kl_"))]


def configuration(kind: str, **options) -> KeyeTextConfig:
    rule = {"index_topk": 60, "local_window": 4, "anchor_stride": 16}
    learning = {"indexer_loss_coef": 1.0, "indexer_stage": "adaptation"}
    return KeyeTextConfig(**COMMON, **SIZES[kind] | rule | learning | options)


def calls(kind: str, device, training: bool = True):
    return autotune_keye._calls(configuration(kind), device, torch.float16, training, SMALL)


def tune(kind: str, device, **options) -> list[dict]:
    return autotune_keye.autotune(configuration(kind), device, torch.float16, workload=SMALL, **options)


def test_every_kernel_with_options_is_tuned():
    assert {kernel for kernels in KERNELS.values() for kernel in kernels} == set(OPTIONS)
    for kind, kernels in KERNELS.items():
        for training in (False, True):
            assert list(dict(calls(kind, "cpu", training))) == kernels_of(kind, training)
        for options, without in (({"indexer_stage": "warmup"}, ("lists", "unions")), ({"indexer_loss_coef": 0.0}, "")):
            config = configuration(kind, **options)
            names = list(dict(autotune_keye._calls(config, "cpu", torch.float16, True, SMALL)))
            assert names == [n for n in kernels if not (n.startswith("kl_") and n.endswith(without))], options
    dense = TINY["mla"] | {"indexer_type": None, "local_window": None, "anchor_stride": None}
    assert autotune_keye.autotune(KeyeTextConfig(**COMMON, **dense), "cpu") == []


def watch(blocks):
    """The same blocks, and the set of their fields that have been read since."""
    read = set()

    class Watched(type(blocks)):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    values = asdict(blocks)
    watched = Watched(**values)
    read.clear()
    return watched, read


# The dense loss treats all heads alike, and the interpreter takes its time for those of grouped attention.
TRIED = [("mla", kernel) for kernel in KERNELS["mla"]]
TRIED += [("gqa", kernel) for kernel in KERNELS["gqa"] if kernel not in DENSE_LOSS]


@pytest.mark.parametrize(("kind", "kernel"), TRIED)
def test_every_value_gives_the_same_result(kind, kernel, device, monkeypatch):
    step = dict(calls(kind, device))[kernel]()
    _, sizes = asked_by(kernel, step)
    watched, read = watch(own_choice(kernel, sizes))
    with trial(kernel, sizes, watched):
        step()
    only_few = {"rows", "apart"} if (kind, kernel) == ("gqa", "kl_lists") else set()  # of queries that are no unit
    assert set(OPTIONS[kernel]) - only_few <= read, "the call goes past the kernel"
    results = []
    for arch in (89, 90):
        monkeypatch.setattr(triton_common_keye, "SHARED_MEMORY_OFF_DEVICE", SHARED_LIMIT[arch])
        results.append(asked_by(kernel, step))
    (small, _), (expected, sizes) = results
    assert autotune_keye._same(small, expected)
    own = own_choice(kernel, sizes)
    launch = {"num_warps", "num_stages"}  # nothing to the interpreter
    fields = [field for field in OPTIONS[kernel] if field not in launch]
    for values in product(*(OPTIONS[kernel][field] for field in fields)):
        blocks = replace(own, **dict(zip(fields, values)))
        with trial(kernel, sizes, blocks):
            assert autotune_keye._same(step(), expected), blocks


SHARED = SHARED_LIMIT[90]
CHOICES = {
    "selection_scores": (triton_selection_keye.score_tiles, (16, 64, torch.bfloat16, SHARED)),
    "mla_forward": (triton_mla_keye.forward_tiles, (128, 512, 576, 2, SHARED)),
    "mla_backward_scores": (triton_mla_backward_keye.score_tiles, (128, 512, 576, 2, SHARED)),
    "mla_backward_rows": (triton_mla_backward_keye.row_tiles, (128, 576, 2, SHARED)),
    "gqa_unions": (triton_gqa_keye.union_tiles, (8, 128, 128, 2, SHARED)),
    "gqa_lists": (triton_gqa_keye.list_tiles, (8, 128, 128, 2, SHARED)),
    "gqa_backward": (triton_gqa_backward_keye.tiles_for, (8, 128, 128, 2, SHARED)),
    "kl_attention_lse": (triton_kl_keye.walk_tiles, (128, 2, SHARED)),
    "kl_index_lse": (triton_kl_index_keye.index_lse_tiles, (64, 2, SHARED)),
    "kl_divergence": (triton_kl_dense_keye.divergence_tiles, (128, 2, SHARED)),
    "kl_gradients": (triton_kl_index_keye.gradient_tiles, (64, 2, SHARED)),
    "kl_unions": (triton_kl_target_keye.union_tiles, (8, 128, 2, SHARED)),
    "kl_lists": (triton_kl_sparse_keye.list_tiles, (8, 128, 2, 16, 64, 2, SHARED)),
}


@pytest.fixture
def timed(monkeypatch):
    """Times of blocks by a rule in place of a clock: eight warps and 32 places are fastest. Returns what was timed.

    The calls choose their blocks at an H100's real sizes and do nothing with them.
    """
    seen = []

    def call(kernel):
        choose, sizes = CHOICES[kernel]
        choose(*sizes)
        return (torch.ones(2),)

    def calls(config, device, dtype, training, load):
        return [(name, partial(partial, call, name)) for name in kernels_of(config.attention_type, training)]

    monkeypatch.setattr(autotune_keye, "_calls", calls)

    def milliseconds(step, device):
        (kernel, _), blocks = next(reversed(triton_tuning_keye._measured.items()))
        seen.append((kernel, blocks))
        if blocks.num_stages in (1, 4):
            raise triton.runtime.errors.OutOfResources(300, 227, "shared memory")
        return 10.0 - blocks.num_warps / 2 + (5.0 if getattr(blocks, "places", 32) != 32 else 0.0)

    monkeypatch.setattr(autotune_keye, "_milliseconds", milliseconds)
    return seen


def test_the_fastest_blocks_are_kept_and_used(timed, device, tmp_path):
    file = tmp_path / "folder" / "tuning.json"
    records = tune("mla", device, training=True, file=file)
    assert [record["kernel"] for record in records] == KERNELS["mla"]
    assert json.loads(file.read_text()) == records
    for record in records:
        assert record["blocks"]["num_stages"] in (2, 3), record
        assert record["blocks"]["num_warps"] == (4 if record["kernel"] == "selection_scores" else 8), record
        assert record["blocks"].get("places", 32) == 32, record
        assert record["ms"] <= record["own_ms"]
    (record,) = [record for record in records if record["kernel"] == "mla_forward"]
    sizes = autotune_keye._sizes(record)
    assert triton_mla_keye.forward_tiles(*sizes) == replace(own_choice("mla_forward", sizes), **record["blocks"])

    # Another process: nothing is timed again, and the same blocks are used.
    timed.clear()
    triton_tuning_keye._measured.clear()
    assert tune("mla", device, training=True, file=file) == records
    assert timed == []
    assert triton_mla_keye.forward_tiles(*sizes).num_warps == 8


def test_an_interrupted_search_goes_on(timed, device, tmp_path, monkeypatch):
    file = tmp_path / "tuning.json"
    search = autotune_keye._search

    def interrupted(kernel, *arguments):
        if kernel == "mla_forward":
            raise KeyboardInterrupt
        return search(kernel, *arguments)

    monkeypatch.setattr(autotune_keye, "_search", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune("mla", device, file=file)
    assert [record["kernel"] for record in json.loads(file.read_text())] == ["selection_scores"]
    monkeypatch.setattr(autotune_keye, "_search", search)
    timed.clear()
    tune("mla", device, file=file)
    assert {kernel for kernel, _ in timed} == {"mla_forward"}


def test_blocks_with_another_result_are_not_taken(timed, device, monkeypatch):
    monkeypatch.setattr(autotune_keye, "_same", lambda found, expected: False)
    for record in tune("gqa", device, training=True):
        assert record["blocks"] == record["own"], record


def test_same_is_strict_about_selections_and_not_about_rounding():
    chosen, out = torch.tensor([[1, 5, -1]]), torch.tensor([1.0, 2.0, 3.0])
    assert autotune_keye._same((chosen, out), (chosen, out * 1.001))
    assert not autotune_keye._same((chosen, out), (chosen, out * 1.1))
    assert not autotune_keye._same((chosen + 1, out), (chosen, out))
    assert not autotune_keye._same((out.log() * 0 / 0,), (out,))


def test_other_devices_stand_in_the_file_untouched(timed, device, tmp_path):
    file = tmp_path / "tuning.json"
    tune("mla", device, file=file)
    others = [{**record, "device": "NVIDIA A100"} for record in json.loads(file.read_text())]
    file.write_text(json.dumps(others))
    timed.clear()
    records = tune("mla", device, file=file)
    assert timed and json.loads(file.read_text()) == others + records


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": {"places": 1024}}, "mla_forward cannot take places = 1024"),
        ({"blocks": {"speed": 3}}, "mla_forward has blocks of heads, places, .*, ahead"),
        ({"blocks": {"ahead": None}}, "mla_forward has blocks of heads, places, .*, ahead"),
        ({"kernel": "mla_sideways"}, "no tuning file of this version"),
        ({"sizes": 5}, "no tuning file of this version"),
        ({"sizes": [1]}, "no tuning file of this version"),
        ({"blocks": {"num_warps": 8.0}}, "mla_forward cannot take num_warps = 8.0"),
    ],
)
def test_a_wrong_file_is_refused(timed, device, tmp_path, change, message):
    file = tmp_path / "tuning.json"
    records = tune("mla", device, file=file)
    blocks = records[1]["blocks"] | change.pop("blocks", {})
    blocks = {field: value for field, value in blocks.items() if value is not None}  # None: a field is missing
    file.write_text(json.dumps([records[0], records[1] | {"blocks": blocks} | change]))
    with pytest.raises(ValueError, match=message):
        tune("mla", device, file=file)
    for text in ("weights", "{}"):
        file.write_text(text)
        with pytest.raises(ValueError, match="no tuning file of this version"):
            tune("mla", device, file=file)


def test_a_rule_that_keeps_everything_has_no_scores_to_tune(device):
    config = KeyeTextConfig(**COMMON, **TINY["mla"], index_topk=60, local_window=None, anchor_stride=None)
    load = autotune_keye.Workload(keys=40, queries=2, run=2)
    with torch.inference_mode():
        records = autotune_keye.autotune(config, device, torch.float16, training=True, workload=load)
    assert [record["kernel"] for record in records] == KERNELS["mla"][1:4]


def test_nothing_to_tune_where_pytorch_is_the_backend():
    assert sparse_attention_keye.autotune(configuration("mla"), "cpu") == []
