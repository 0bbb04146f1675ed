"""Pushes a tiny model with the library's own means: `python push_with_the_library.py ROOT FOLDER CLIP OUTPUT`.

Run as a process of its own, because the client reads its endpoint when it is imported. The last line printed is a JSON
list: the tokens that the model, and then the trained one, answer.
"""

import json
import sys
from functools import partial
from pathlib import Path

root, folder, clip, output = sys.argv[1:]
sys.path.insert(0, root)

import torch  # noqa: E402 the repository's root comes first
from transformers import Trainer, TrainingArguments  # noqa: E402

from modeling_keye import KeyeForVideoQA, KeyeProcessor  # noqa: E402
from tests.model.checkpoints import encode  # noqa: E402
from tests.training.conftest import collate  # noqa: E402


def answer(model) -> list[int]:
    inputs = encode(processor, clip)
    with torch.no_grad():
        generated = model.eval().generate(**inputs, max_new_tokens=8, do_sample=False)
    return generated[0, inputs["input_ids"].shape[1] :].tolist()


model = KeyeForVideoQA.from_pretrained(folder)
processor = KeyeProcessor.from_pretrained(folder)
answers = [answer(model)]
model.push_to_hub("someone/keye-pushed")
processor.push_to_hub("someone/keye-pushed")

trainer = Trainer(
    model=model.train(),
    args=TrainingArguments(
        output_dir=str(Path(output) / "keye-trained"),
        hub_model_id="someone/keye-trained",
        push_to_hub=True,
        max_steps=1,
        save_steps=1,
        per_device_train_batch_size=1,
        learning_rate=1e-2,
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=True,
        report_to="none",
    ),
    train_dataset=[{"video": clip, "question": "what?", "answer": "a cat"}],
    data_collator=partial(collate, processor),
    processing_class=processor,
)
trainer.train()
trainer.push_to_hub()
answers.append(answer(model))
print(json.dumps(answers))
