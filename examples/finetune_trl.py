"""TRL's `SFTTrainer` with the indexer learning along: `python -m examples.finetune_trl ROWS.jsonl OUTPUT`.

Needs `pip install trl`. The whole model trains; the mixin scales the indexer's KL loss as TRL scales its own, and logs
it.
"""

import argparse
import sys
from pathlib import Path

import datasets

try:
    import trl
except ImportError as error:
    sys.exit(f"This example needs TRL ({error}); install it with `pip install trl`.")

from modeling_keye import KeyeForVideoQA, KeyeProcessor
from training.collator import VideoQACollator
from training.indexer_training import IndexerTrainerMixin
from training.rows import DataError, load_rows
from training.video_dataset import VideoQADataset


class IndexerSFTTrainer(IndexerTrainerMixin, trl.SFTTrainer):
    pass


def finetune(rows: str, output: str, folder: str = "checkpoints/keye-tiny", **options) -> IndexerSFTTrainer:
    """Train the model in `folder`; writes `output/final`, which loads as remote code, and returns the trainer."""
    processor = KeyeProcessor.from_pretrained(folder)
    model = KeyeForVideoQA.from_pretrained(folder)
    model.config.text_config.indexer_loss_coef = 0.1
    examples = VideoQADataset(load_rows(rows), processor, max_length=2048)
    collate = VideoQACollator(processor)
    settings = {"num_train_epochs": 1, "per_device_train_batch_size": 1, "learning_rate": 1e-5}
    settings["bf16"] = False  # TRL's default, bf16, is refused on a machine without a GPU
    trainer = IndexerSFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output,
            remove_unused_columns=False,
            max_length=None,  # TRL would cut behind the labels; the data set looks after lengths
            dataset_kwargs={"skip_prepare_dataset": True},
            **(settings | options),
        ),
        # TRL asks for a data set of its kind: it holds the numbers of the rows, the collator fetches them.
        train_dataset=datasets.Dataset.from_dict({"row": range(len(examples))}),
        data_collator=lambda items: collate([examples[item["row"]] for item in items]),
        processing_class=processor,
    )
    trainer.train()
    # The loss belongs to this run; whoever trains the model next says whether it is wanted.
    model.config.text_config.indexer_loss_coef = 0.0
    trainer.save_model(Path(output, "final"))
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a model with TRL's SFTTrainer and the indexer's loss.")
    parser.add_argument("rows", help="JSON lines {video, question, answer}")
    parser.add_argument("output", help="folder to write to")
    parser.add_argument("folder", nargs="?", default="checkpoints/keye-tiny", help="of a checkpoint (%(default)s)")
    options = parser.parse_args()
    if not Path(options.folder).is_dir():
        parser.error(f"there is no folder {options.folder}; give the folder of a checkpoint")
    try:
        finetune(**vars(options))
    except DataError as error:
        parser.error(str(error))
