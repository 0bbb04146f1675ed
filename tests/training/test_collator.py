"""Batches: padded on the right or packed, with the media of all examples in their order."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from tests.model.checkpoints import small_model, small_processor
from tests.model.factories import tiny_config
from training.collator import VideoQACollator
from training.rows import DataError, load_rows
from training.video_dataset import VideoQADataset

pytestmark = pytest.mark.compat


@pytest.fixture(scope="module")
def dataset(records, processor) -> VideoQADataset:
    """Examples of different length: one video, two videos, text alone."""
    first, second = records[0]["video"], records[1]["video"]
    rows = [records[0], {**records[1], "video": [first, second]}, {"question": "2 + 2?", "answer": "4"}]
    return VideoQADataset(load_rows(rows), processor, max_length=None, video_options={"num_frames": 2})


@pytest.fixture
def examples(dataset) -> list[dict]:
    return [dataset[number] for number in range(3)]


def test_padding_stands_on_the_right_without_labels(examples, processor):
    batch = VideoQACollator(processor, pad_to_multiple_of=16)(examples)
    lengths = [len(example["input_ids"]) for example in examples]
    assert batch["input_ids"].shape[1] == -(-max(lengths) // 16) * 16
    assert batch["attention_mask"].sum(dim=1).tolist() == lengths
    for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        for name in ("input_ids", "labels", "mm_token_type_ids"):
            assert torch.equal(batch[name][row, :length], example[name])
        assert (batch["input_ids"][row, length:] == processor.tokenizer.pad_token_id).all()
        assert (batch["labels"][row, length:] == -100).all()
        assert not batch["mm_token_type_ids"][row, length:].any()
    assert batch["attention_mask"].dtype == torch.int64


@pytest.mark.parametrize("packed", [False, True])
def test_media_stand_in_the_order_of_the_examples(examples, processor, packed):
    batch = VideoQACollator(processor, packed=packed, config=tiny_config())(examples[::-1])
    pixels = torch.cat([examples[1]["pixel_values_videos"], examples[0]["pixel_values_videos"]])
    assert torch.equal(batch["pixel_values_videos"], pixels)
    grids = torch.cat([examples[1]["video_grid_thw"], examples[0]["video_grid_thw"]])
    assert torch.equal(batch["video_grid_thw"], grids)
    assert "pixel_values" not in batch


def test_packed_sequences_lie_in_one_row(examples, processor):
    batch = VideoQACollator(processor, packed=True, config=tiny_config("mla"))(examples)
    lengths = [len(example["input_ids"]) for example in examples]
    assert "attention_mask" not in batch
    for name in ("input_ids", "labels", "mm_token_type_ids"):
        assert torch.equal(batch[name], torch.cat([example[name] for example in examples])[None])
    assert batch["position_ids"].tolist() == [[place for length in lengths for place in range(length)]]
    bounds = batch["cu_seq_lens_q"]
    assert bounds.dtype == torch.int32
    assert bounds.tolist() == [0, lengths[0], lengths[0] + lengths[1], sum(lengths)]


def test_packed_padding_is_a_sequence_of_its_own(examples, processor):
    collate = VideoQACollator(processor, packed=True, pad_to_multiple_of=64, config=tiny_config("mla"))
    batch, total = collate(examples), sum(len(example["input_ids"]) for example in examples)
    size = batch["input_ids"].shape[1]
    assert size % 64 == 0 and size > total
    assert batch["cu_seq_lens_q"].tolist()[-2:] == [total, size]
    assert batch["position_ids"][0, total:].tolist() == list(range(size - total))
    assert (batch["input_ids"][0, total:] == processor.tokenizer.pad_token_id).all()
    assert (batch["labels"][0, total:] == -100).all()
    assert all(value.shape[-1] == size for name, value in batch.items() if name in ("labels", "mm_token_type_ids"))


def test_no_example_learns_the_first_token_of_the_next(examples, processor):
    for example in examples:
        example["labels"] = example["input_ids"].clone()
    batch = VideoQACollator(processor, packed=True, config=tiny_config("mla"))(examples)
    starts = batch["cu_seq_lens_q"][:-1].long()
    assert (batch["labels"][0, starts] == -100).all()
    assert (batch["labels"] == -100).sum() == len(starts)


def test_three_axes_restart_with_every_example(examples, processor):
    model = small_model("gqa")
    assert model.config.text_config.mrope_section is not None
    collate = VideoQACollator(processor, packed=True, pad_to_multiple_of=64, config=model.config)
    batch = collate(examples)
    start = 0
    for example in examples:
        length = len(example["input_ids"])
        expected, _ = model.model.get_rope_index(example["input_ids"][None], None, example.get("video_grid_thw"))
        assert torch.equal(batch["position_ids"][..., start : start + length], expected)
        start += length
    assert torch.equal(
        batch["position_ids"][:, 0, start:], torch.arange(batch["input_ids"].shape[1] - start).expand(3, -1)
    )


@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_padded_packed_and_single_losses_agree(kind, examples, processor):
    model = small_model(kind).eval()
    with torch.no_grad():
        losses = [
            model(**VideoQACollator(processor, packed=packed, config=model.config)(examples)).loss
            for packed in (False, True)
        ]
        singles = [model(**VideoQACollator(processor)([example])).loss for example in examples]
    weights = [(example["labels"] != -100).sum() for example in examples]
    expected = sum(loss * weight for loss, weight in zip(singles, weights, strict=True)) / sum(weights)
    for loss in losses:
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_what_the_collator_does_not_know_is_refused(examples, processor):
    with pytest.raises(DataError, match="an example holds position_ids; the collator takes image_grid_thw"):
        VideoQACollator(processor)([{**examples[0], "position_ids": examples[0]["input_ids"]}])
    with pytest.raises(DataError, match="packing needs the model's configuration"):
        VideoQACollator(processor, packed=True)
    with pytest.raises(DataError, match="pad_to_multiple_of=0 must be a positive number of tokens"):
        VideoQACollator(processor, pad_to_multiple_of=0)
    without = small_processor()
    without.tokenizer.pad_token = None
    with pytest.raises(DataError, match="the tokenizer has no padding token"):
        VideoQACollator(without)


@pytest.mark.parametrize("packed", [False, True])
def test_trainer_takes_rows_through_workers(dataset, processor, tmp_path, packed):
    model = small_model("mla")
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        dataloader_num_workers=1,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    collate = VideoQACollator(processor, packed=packed, config=model.config)
    trainer = Trainer(model, arguments, train_dataset=dataset, eval_dataset=dataset, data_collator=collate)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)
    assert 0 < trainer.evaluate()["eval_loss"] < 20
