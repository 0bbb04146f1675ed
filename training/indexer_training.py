"""Training the lightning indexer with `Trainer` and its subclasses.

The model carries the indexer's loss itself: with `indexer_loss_coef` above 0 in its text configuration, whatever is
backpropagated from its output trains the indexer too. What stands here is around it:

    freeze_all_but_indexer    the dense warm-up trains nothing else
    set_topk                  another budget for the selection of a loaded model
    IndexerTrainerMixin       logs the loss, and follows losses that a trainer computes by itself

    class IndexerSFTTrainer(IndexerTrainerMixin, trl.SFTTrainer): ...
"""

import functools

import torch
from torch import nn
from transformers import Trainer

from modeling_keye.indexer_objective_keye import follow_loss, labelled_share

# No prompt is longer: with this budget the selection keeps every token, and attention is dense.
DENSE = 2**20


def decoder_of(model: nn.Module) -> nn.Module:
    """The Keye decoder inside `model`, which may be wrapped (adapters, data parallelism). Raises `ValueError`."""
    for module in model.modules():
        if hasattr(module, "indexer_loss_scale"):
            return module
    raise ValueError(f"{type(model).__name__} holds no Keye decoder, and nothing else has an indexer to train.")


def freeze_all_but_indexer(model: nn.Module) -> list[str]:
    """Let gradients reach the indexers alone, for the dense warm-up; returns the names of their parameters.

    Nothing of the trunk is kept for the backward pass then. Raises `ValueError` for a model without an indexer.
    """
    names = [name for name, _ in model.named_parameters() if ".indexer." in name]
    if not names:
        raise ValueError("The model has no indexer to train. Give it one with `KeyeConfig.with_indexer`.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".indexer." in name)
    return names


def set_topk(model: nn.Module, topk: int) -> None:
    """Let the indexers of a loaded model select `topk` tokens. Raises `ValueError` for fewer than one."""
    if topk < 1:
        raise ValueError(f"`topk` is {topk}; an indexer selects at least one token.")
    decoder_of(model).config.index_topk = topk


class IndexerTrainerMixin:
    """Adds `indexer_loss` and `indexer_recall` to the log, means since the last entry, over all processes.

    It also makes the indexer's loss follow the loss of the trainer where that is not the model's own `outputs.loss`
    (TRL, `compute_loss_func`, label smoothing): without it, the weight of the indexer's loss would be
    `indexer_loss_coef` per micro-batch, whatever accumulation and loss scaling do. With label smoothing the loss is of
    the next token, as without. Stands before the trainer class.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.label_smoother is not None:
            # The library shifts labels for its own language models only, and others would learn to repeat their input.
            self.label_smoother = functools.partial(self.label_smoother, shift_labels=True)
        self._decoder = decoder_of(self.model)
        self._decoder.register_forward_hook(self._collect)
        self._collected: torch.Tensor | None = None

    def _collect(self, module, arguments, outputs) -> None:
        if outputs.indexer_loss is not None:
            loss, recall = outputs.indexer_loss, outputs.indexer_recall
            entry = torch.stack([loss, recall, torch.ones_like(loss)]).double()
            self._collected = entry if self._collected is None else self._collected + entry

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.get("labels")
        result = super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        if not torch.is_grad_enabled():
            return result
        loss, *rest = result if return_outputs else (result,)
        share = 1.0
        if labels is not None and num_items_in_batch is not None:
            # The sum over accumulated batches and the mean over processes of the shares is 1.
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            share = labelled_share(labels, num_items_in_batch) * processes
        loss = follow_loss(loss, self._decoder.indexer_loss_scale, share)
        return (loss, *rest) if return_outputs else loss

    def log(self, logs: dict, *args, **kwargs) -> None:
        if self._collected is not None and "loss" in logs:
            loss, recall, count = self.accelerator.reduce(self._collected, reduction="sum").tolist()
            logs = {**logs, "indexer_loss": loss / count, "indexer_recall": recall / count}
            self._collected = None
        super().log(logs, *args, **kwargs)


class IndexerTrainer(IndexerTrainerMixin, Trainer):
    """`Trainer` with the indexer's loss in its log."""
