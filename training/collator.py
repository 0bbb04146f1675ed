"""Examples -> batch: padded on the right, or packed one behind the other into a single row."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from modeling_keye.positions_keye import rope_index

from .data_errors import DataError
from .video_dataset import IGNORE, MEDIA_TENSORS

SEQUENCES = ("input_ids", "labels", "mm_token_type_ids")


class VideoQACollator:
    """Puts examples of `VideoQADataset` into one batch; media stand one after the other, in the order of the examples.

    Args:
        processor: its tokenizer has the padding token.
        packed: no padding; the examples lie in one row, and each attends to itself alone.
        pad_to_multiple_of: make the row a multiple of so many tokens; packed, the padding is a sequence of its own.
        config: the model's configuration (`model.config`), needed for packing: models with `mrope_section` have
            positions on three axes, which the whole row no longer tells.

    Padded: input_ids, attention_mask, labels, mm_token_type_ids int64 [B, S].
    Packed: input_ids, labels, mm_token_type_ids int64 [1, S]; position_ids [1, S] or [3, 1, S], starting again with
    every example; cu_seq_lens_q int32 [examples + 1], where each begins and the last one ends. No attention_mask.
    """

    def __init__(
        self, processor: Any, *, packed: bool = False, pad_to_multiple_of: int | None = None, config: Any = None
    ):
        self.pad_token_id = processor.tokenizer.pad_token_id
        if self.pad_token_id is None:
            raise DataError("the tokenizer has no padding token; set processor.tokenizer.pad_token.")
        if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
            raise DataError(f"pad_to_multiple_of={pad_to_multiple_of} must be a positive number of tokens, or None.")
        if packed and config is None:
            raise DataError(
                "packing needs the model's configuration, which decides on positions; pass config=model.config."
            )
        self.packed = packed
        self.multiple = pad_to_multiple_of or 1
        self.config = config

    def __call__(self, examples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        known = {*SEQUENCES, *MEDIA_TENSORS}
        for example in examples:
            strange = sorted(example.keys() - known)
            if strange:
                raise DataError(
                    f"an example holds {', '.join(strange)}; the collator takes {', '.join(sorted(known))}."
                )
        batch = self._pack(examples) if self.packed else self._pad(examples)
        for name in MEDIA_TENSORS:
            tensors = [example[name] for example in examples if name in example]
            if tensors:
                batch[name] = torch.cat(tensors)
        return batch

    def _pad(self, examples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        columns = {name: [example[name] for example in examples] for name in SEQUENCES}
        columns["attention_mask"] = [torch.ones_like(ids) for ids in columns["input_ids"]]
        longest = max(len(ids) for ids in columns["input_ids"])
        extra = -longest % self.multiple
        fill = {"input_ids": self.pad_token_id, "labels": IGNORE}
        batch = {}
        for name, tensors in columns.items():
            value = fill.get(name, 0)
            padded = pad_sequence(tensors, batch_first=True, padding_value=value)
            batch[name] = torch.nn.functional.pad(padded, (0, extra), value=value)
        return batch

    def _pack(self, examples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        parts = [{name: example[name] for name in SEQUENCES} for example in examples]
        positions = [self._positions(example) for example in examples]
        extra = -sum(len(part["input_ids"]) for part in parts) % self.multiple
        if extra:
            ids = torch.full((extra,), self.pad_token_id)
            parts.append({"input_ids": ids, "labels": ids, "mm_token_type_ids": torch.zeros_like(ids)})
            positions.append(torch.arange(extra).expand(*positions[0].shape[:-1], -1))
            parts[-1]["labels"] = torch.full_like(ids, IGNORE)
        batch = {name: torch.cat([part[name] for part in parts]).unsqueeze(0) for name in SEQUENCES}
        lengths = torch.tensor([len(part["input_ids"]) for part in parts])
        ends = lengths.cumsum(0)
        # The last token of one example must not learn to foretell the first of the next.
        batch["labels"][0, ends - lengths] = IGNORE
        batch["position_ids"] = torch.cat(positions, dim=-1)
        batch["cu_seq_lens_q"] = torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)
        return batch

    def _positions(self, example: dict[str, torch.Tensor]) -> torch.Tensor:
        """Positions of one example alone, [1, S] or [3, 1, S]."""
        ids = example["input_ids"].unsqueeze(0)
        if self.config.text_config.mrope_section is None:
            return torch.arange(ids.shape[1]).unsqueeze(0)
        return rope_index(
            self.config,
            ids,
            image_grid_thw=example.get("image_grid_thw"),
            video_grid_thw=example.get("video_grid_thw"),
            second_per_grid_ts=example.get("second_per_grid_ts"),
        )[0]
