"""TRL's `SFTTrainer`, which puts its own forward pass around the decoder, trains the model through our collator."""

import functools

import pytest
import torch

from tests.model.checkpoints import small_model
from tests.training.conftest import collate

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")


@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_sft_trainer(kind, processor, records, tmp_path):
    model = small_model(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = collate(processor, records[:2])
    expected = model(**batch).loss.item()
    options = {"max_steps": 1, "per_device_train_batch_size": 2, "logging_steps": 1, "use_cpu": True, "bf16": False}
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        remove_unused_columns=False,
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(records[:2]),
        data_collator=functools.partial(collate, processor),
        processing_class=processor,
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-3)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
