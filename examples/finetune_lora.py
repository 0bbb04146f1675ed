"""LoRA on one's own videos, rows {video, question, answer}: `python -m examples.finetune_lora ROWS OUTPUT [MODEL]`."""

import sys
from pathlib import Path

from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from modeling_keye import KeyeForVideoQA, KeyeProcessor
from training.collator import VideoQACollator
from training.rows import load_rows
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
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    print(finetune(*sys.argv[1:]))
