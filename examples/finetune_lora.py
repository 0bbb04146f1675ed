"""LoRA on one's own videos, rows {video, question, answer}: `python -m examples.finetune_lora ROWS.jsonl OUTPUT`."""

import argparse
from pathlib import Path

from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from modeling_keye import KeyeForVideoQA, KeyeProcessor
from training.collator import VideoQACollator
from training.rows import DataError, load_rows
from training.stages import lora_config
from training.video_dataset import VideoQADataset


def finetune(rows: str, output: str, folder: str = "checkpoints/keye-tiny", **options) -> Path:
    """Train adapters of the model in `folder`; writes `output/adapter` and `output/merged`, and returns the latter."""
    processor = KeyeProcessor.from_pretrained(folder)
    base = KeyeForVideoQA.from_pretrained(folder)
    model = get_peft_model(base, lora_config(base, rank=8, alpha=16))
    settings = {"num_train_epochs": 3, "per_device_train_batch_size": 1, "learning_rate": 1e-3, **options}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output, remove_unused_columns=False, label_names=["labels"], **settings),
        train_dataset=VideoQADataset(load_rows(rows), processor, max_length=2048),
        data_collator=VideoQACollator(processor),
        processing_class=processor,
    )
    trainer.train()
    trainer.save_model(f"{output}/adapter")
    merged = Path(output, "merged")
    model.merge_and_unload().save_pretrained(merged)
    processor.save_pretrained(merged)
    return merged


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows")
    parser.add_argument("output")
    parser.add_argument("folder", nargs="?", default="checkpoints/keye-tiny")
    options = parser.parse_args()
    if not Path(options.folder).is_dir():
        parser.error(f"there is no folder {options.folder}; give the folder of a checkpoint")
    try:
        print(finetune(**vars(options)))
    except DataError as error:
        parser.error(str(error))
