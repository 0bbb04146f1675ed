"""Short clips with questions, and the collator that turns them into batches with labels."""

import pytest
import torch

from modeling_keye.processing_keye import KeyeProcessor
from tests.model.checkpoints import small_processor
from tests.processing.conftest import write_clip


@pytest.fixture(scope="session")
def processor() -> KeyeProcessor:
    return small_processor()


@pytest.fixture(scope="session")
def records(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("clips")
    clips = [write_clip(folder / f"{i}.mp4", count=6 + 4 * i, size=(56, 56)) for i in range(2)]
    questions = [("which colour?", "red"), ("how many are there?", "three"), ("when?", "at 2.0"), ("what?", "a cat")]
    return [
        {"video": str(clips[i % 2]), "question": question, "answer": answer}
        for i, (question, answer) in enumerate(questions)
    ]


def collate(processor, records: list[dict]) -> dict[str, torch.Tensor]:
    conversations = [
        [
            {
                "role": "user",
                "content": [{"type": "video", "path": record["video"]}, {"type": "text", "text": record["question"]}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": record["answer"]}]},
        ]
        for record in records
    ]
    batch = processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"num_frames": 2, "padding": True},
    )
    mask = torch.as_tensor(batch.pop("assistant_masks")).bool()
    return {**batch, "labels": batch["input_ids"].masked_fill(~mask, -100)}
