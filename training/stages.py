"""What a stage trains: which weights, with dense or sparse attention, under which of the two losses.

| stage               | trains                      | attention | loss                             |
| pretrain            | all but the indexer         | dense     | language model                   |
| indexer-warmup      | the indexer                 | dense     | KL to the dense attention        |
| sparse-adaptation   | all                         | sparse    | language model, KL on the chosen |
| finetune            | all but the indexer, or all | sparse    | language model, KL if asked for  |
| finetune with LoRA  | adapters                    | sparse    | language model                   |
"""

import re
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from modeling_keye import KeyeConfig, KeyeForVideoQA
from modeling_keye.sparse_attention_keye import Selection

from .indexer_training import decoder_of, freeze_all_but_indexer, set_topk
from .recipe import LoraRecipe, Recipe, RecipeError

# Every projection of the decoder but those of the indexer, which the language-model loss does not reach, and of the
# router, whose choice adapters would only follow. A name ends in one of these directly below its block, so
# `self_attn.indexer.*` is out.
LORA_TARGETS = {
    "self_attn": (
        *("q_proj", "k_proj", "v_proj", "o_proj"),  # grouped-query attention
        *(
            "q_a_proj",
            "q_b_proj",
            "kv_a_proj_with_mqa",
            "kv_b_proj",
        ),  # latent attention, and `q_proj` without q_lora_rank
    ),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "mlp.shared_experts": ("gate_proj", "up_proj", "down_proj"),
}
# Routed experts are 3-D parameters, not modules.
LORA_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def lora_target_modules() -> str:
    """`LORA_TARGETS` as the pattern that PEFT matches whole module names with."""
    blocks = "|".join(rf"{re.escape(block)}\.({'|'.join(names)})" for block, names in LORA_TARGETS.items())
    return rf".*language_model\.layers\.\d+\.({blocks})"


def lora_config(model: nn.Module, rank: int = 16, alpha: float = 32.0, dropout: float = 0.0, experts: bool = True):
    """`peft.LoraConfig` for the decoder of `model`: all its projections, and its routed experts if it has any."""
    routed = experts and "sparse" in model.config.get_text_config().mlp_layer_types
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=lora_target_modules(),
        target_parameters=list(LORA_EXPERTS) if routed else None,
    )


def load_config(recipe: Recipe) -> KeyeConfig:
    """The configuration to start from, with a new indexer if the recipe adds one."""
    config = KeyeConfig.from_pretrained(recipe.model)
    indexer = recipe.indexer
    if config.text_config.indexer_type is None:
        if recipe.stage == "indexer-warmup":
            config = config.with_indexer(indexer.heads, indexer.head_dim)
        elif recipe.trains_indexer or indexer.topk:
            raise RecipeError(f"`indexer` asks for one, but {recipe.model} has none; `indexer-warmup` comes first.")
    elif indexer.heads or indexer.head_dim:
        raise RecipeError(f"{recipe.model} has an indexer already; leave out `indexer.heads` and `indexer.head_dim`.")
    return config


def load_model(recipe: Recipe) -> KeyeForVideoQA:
    """The model to start from, its indexer narrowed to `indexer.topk`."""
    dtype = recipe.dtype if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    model = KeyeForVideoQA.from_pretrained(recipe.model, config=load_config(recipe), dtype=dtype)
    if recipe.indexer.topk:
        # Only now: a published folder is not loaded with an indexer that chooses before it is trained.
        set_topk(model, recipe.indexer.topk)
    return model


def prepare(model: KeyeForVideoQA, recipe: Recipe) -> KeyeForVideoQA | PeftModel:
    """Freeze what the stage leaves alone, switch attention and losses; with LoRA, the model with its adapters."""
    text = decoder_of(model).config
    if recipe.router_balance and not any(hasattr(m, "e_score_correction_bias") for m in model.modules()):
        raise RecipeError(
            f"`router_balance` is {recipe.router_balance}, but no router of {recipe.model} has a bias to move; set "
            "`router_balance` to 0."
        )
    text.indexer_loss_coef = recipe.loss_coef
    text.indexer_stage = "warmup" if recipe.stage == "indexer-warmup" else "adaptation"
    if recipe.stage == "indexer-warmup":
        freeze_all_but_indexer(model)
        return model
    if recipe.stage == "pretrain":
        attend_densely(model)
    if recipe.lora is not None:
        model = add_lora(model, recipe.lora)
        if Path(recipe.model).is_dir():
            # The adapter is loaded from anywhere, and looks for its base there.
            model.peft_config["default"].base_model_name_or_path = str(Path(recipe.model).resolve())
        return model
    for name, parameter in model.named_parameters():
        # Without its loss the indexer gets no gradient, and what asks for one in vain stops data parallelism.
        parameter.requires_grad_(recipe.trains_indexer or ".indexer." not in name)
    return model


def add_lora(model: KeyeForVideoQA, lora: LoraRecipe) -> PeftModel:
    return get_peft_model(model, lora_config(model, lora.rank, lora.alpha, lora.dropout, lora.experts))


def attend_densely(model: nn.Module) -> None:
    """Every query reads all it sees, in this process only: the configuration, and so what is saved, stays as it is."""
    for layer in decoder_of(model).layers:
        layer.self_attn.other_selection = Selection()
