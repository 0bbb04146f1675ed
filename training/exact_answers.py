"""Evaluation during training by exact answer: greedy answers to the questions of the evaluation set.

    class KeyeTrainer(ExactAnswersMixin, IndexerTrainer): ...

logs `eval_exact_match` beside `eval_loss`, in percent, and `eval_exact_match_<kind>` where rows have a kind; either may
be named in `metric_for_best_model`.
"""

from collections import defaultdict

import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from .rows import SkippableError

# What of an example has one entry per token.
PER_TOKEN = ("input_ids", "labels", "attention_mask", "mm_token_type_ids", "position_ids")


def is_right(answer: str, expected: str) -> bool:
    """Exact match, letter case and outer spaces aside."""
    return answer.strip().lower() == expected.strip().lower()


def last_question(example: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(the prompt up to the last answer of `example` as a batch of one, the ids of that answer).

    `example` is what `VideoQADataset` gives: `input_ids` and `labels` [S], labels -100 but on answers. Earlier answers
    of a conversation stay in the prompt. Raises `ValueError` for an example without an answer.
    """
    labels = example["labels"]
    answered = (labels != -100).nonzero()[:, 0]
    if not len(answered):
        raise ValueError("An example without a labelled answer cannot be evaluated.")
    gaps = (answered.diff() > 1).nonzero()[:, 0]
    begin = int(answered[gaps[-1] + 1 if len(gaps) else 0])
    prompt = {}
    for name, value in example.items():
        if name in PER_TOKEN:
            value = value[..., :begin].unsqueeze(-2)
        prompt[name] = value
    del prompt["labels"]
    return prompt, labels[begin : int(answered[-1]) + 1]


@torch.no_grad()
def answer(
    model,
    processor,
    example: dict[str, torch.Tensor],
    device: torch.device | str = "cpu",
    synced: bool = False,
) -> tuple[str, str]:
    """(the model's greedy answer to the last question of `example`, the expected answer).

    `synced` keeps processes that share weights in step: who is done runs along until all are.
    """
    prompt, expected = last_question(example)
    prompt = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in prompt.items()}
    length = prompt["input_ids"].shape[1]
    # A longer answer than the expected one is wrong, and one token more shows it.
    settings = {"do_sample": False, "num_beams": 1, "use_cache": True, "max_new_tokens": len(expected) + 1}
    settings["synced_gpus"] = synced
    made = model.generate(**prompt, **settings)[0, length:]
    return tuple(processor.decode(ids, skip_special_tokens=True).strip() for ids in (made, expected))


class ExactAnswersMixin:
    """Stands before the trainer class. The evaluation set is a `VideoQADataset`, `processing_class` its processor."""

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        scores = self.exact_match(self.eval_dataset if eval_dataset is None else eval_dataset)
        scores = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log(scores)
        return {**metrics, **scores}

    def exact_match(self, dataset) -> dict[str, float]:
        """Percentage of right answers, `exact_match` and `exact_match_<kind>`, over all processes."""
        accelerator, model = self.accelerator, self.model
        training = model.training
        model.eval()
        # Sharded weights are gathered by all processes together, so each answers equally often; a surplus repeats.
        steps = -(-len(dataset) // accelerator.num_processes)
        mine = range(accelerator.process_index, steps * accelerator.num_processes, accelerator.num_processes)
        hidden = self.args.disable_tqdm or not accelerator.is_main_process
        answered: list[tuple[str | None, bool]] = []
        for index in tqdm(mine, desc="exact answers", disable=hidden, leave=False):
            kind, example, counts = self._example(dataset, index % len(dataset))
            made = answer(model, self.processing_class, example, accelerator.device, self.is_fsdp_enabled)
            right = is_right(*made)
            if counts and index < len(dataset):
                answered.append((kind, right))
        model.train(training)
        groups = defaultdict(list)
        for kind, right in gather_object(answered):
            groups["exact_match"].append(right)
            if kind is not None:
                groups[f"exact_match_{kind}"].append(right)
        return {name: 100 * sum(rights) / len(rights) for name, rights in sorted(groups.items())}

    @staticmethod
    def _example(dataset, index: int) -> tuple[str | None, dict, bool]:
        """(kind, example, whether it counts): what stands in for a row that is skipped is answered in vain."""
        try:
            row = dataset.rows[index]
            return row.kind, dataset.encode(row), True
        except SkippableError:
            if dataset.on_bad_video == "raise":
                raise
            return None, dataset[index], False
