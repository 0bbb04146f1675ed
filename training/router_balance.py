"""Balance of the experts without an auxiliary loss (DeepSeek-V3 report, section 2.1.2).

After each optimizer step, the correction bias of an expert with less than the mean load rises by `speed`, that of one
with more falls by it. The bias decides which experts are chosen and never how they are weighed.
"""

import torch
from transformers import TrainerCallback


class RouterBalance(TrainerCallback):
    """Updates `e_score_correction_bias` of every sigmoid router; `speed` 0 changes nothing (DeepSeek-V3: 0.001).

    Load is counted over real tokens of all micro-batches of a step and all processes. The bias is a buffer of the
    model, so checkpoints hold it.
    """

    def __init__(self, speed: float = 0.0):
        if not 0 <= speed < float("inf"):
            raise ValueError(f"`speed` is {speed}; it must be a number from 0 up.")
        self.speed = speed
        self.loads: dict[torch.nn.Module, torch.Tensor] = {}
        self.handles: list = []
        self.real: torch.Tensor | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not self.speed:
            return
        routers = [module for module in model.modules() if hasattr(module, "e_score_correction_bias")]
        if not routers:
            raise ValueError(
                f"`speed` is {self.speed}, but no router of the model has a correction bias "
                "(`scoring_func='sigmoid'`, with expert layers)."
            )
        self.loads = {router: torch.zeros_like(router.e_score_correction_bias) for router in routers}
        self.handles = [router.register_forward_hook(self._count) for router in routers]
        decoder = next(module for module in model.modules() if hasattr(module, "indexer_loss_scale"))
        self.handles.append(decoder.register_forward_pre_hook(self._note_padding, with_kwargs=True))

    def _note_padding(self, decoder, arguments, keywords) -> None:
        mask = keywords.get("attention_mask")
        self.real = mask.flatten().bool() if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None

    @torch.no_grad()
    def _count(self, router, arguments, outputs) -> None:
        if not router.training:
            return
        chosen = outputs[2]  # [tokens, experts per token]
        if self.real is not None and self.real.shape[0] == chosen.shape[0]:
            chosen = chosen[self.real.to(chosen.device)]
        # Checkpointing counts a token twice, when it is recomputed; all experts alike, so no sign changes.
        load = self.loads[router]
        load += torch.bincount(chosen.flatten(), minlength=load.shape[0]).to(load)

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        for router, load in self.loads.items():
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(load)
            router.e_score_correction_bias += self.speed * torch.sign(load.mean() - load)
            load.zero_()

    def on_train_end(self, args, state, control, **kwargs):
        for handle in self.handles:
            handle.remove()
        self.handles, self.loads = [], {}
