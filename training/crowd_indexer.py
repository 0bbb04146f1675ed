"""Teaches the lightning indexer to find in the crowd of a whole clip what the decoder looks at without that crowd.

A condensed clip (`data`) holds the shapes of a clip and few of its empty frames. The decoder, attending to all of that,
is the teacher: what a token of a question or of the video attends to there is what the indexer has to find among all
tokens of the whole clip. With the teacher's attention p[t,s], mean over the heads, of query t to those tokens s that
the indexer decides about (neither in the window nor anchors), p[t] = sum over s of p[t,s], and the scores I of the
indexer over all such tokens of the clip,

    loss = sum over t and s of p[t,s] (log (p[t,s] / p[t]) - log softmax(I)[t,s]) / sum over t of p[t]

The objective inside the model (`indexer_objective_keye`) cannot do this: in its warm-up the teacher attends to the
crowd itself, which costs N x N and drowns what it looks for, and afterwards it sees selected tokens only.

Nothing but the indexers learns, so the inputs of the layers are constants: a clip is read once and serves many steps.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import Trainer

from modeling_keye.indexer_objective_keye import mean_attention

from .data import ConversationEncoder, Example, kept_frames
from .indexer_training import DENSE, decoder_of, set_topk
from .long_videos import draw_clip, log_uniform, make_long_questions


@dataclass(frozen=True)
class CrowdMixture:
    """Whole clips of `frames` frames with `shown` shapes, both by octaves, and `questions` questions about each.

    The teacher sees the shapes, up to `beside` frames on either side of each, and `empty` empty frames; the indexer has
    to tell their tokens from `crowd` others. `words`, `alike` and `ends` are shares of the clips as in `LongMixture`.
    `video_queries` tokens of each video learn with its questions.
    """

    clips: int
    frames: tuple[int, int]
    shown: tuple[int, int]
    kinds: tuple[str, ...]
    questions: int = 24
    empty: int = 20
    crowd: int = 14_000
    words: float = 0.5
    alike: float = 0.0
    ends: float = 0.0
    beside: int = 0
    video_queries: int = 96


class Crowds(Dataset):
    """What the layers of a decoder make of whole clips; an item is a clip, a function of the weights and the seed.

    Reading takes seconds per thousand frames, all of it at the start. An item holds, for n keys, Q queries and V tokens
    of the condensed clip: `key_slots` [n] and `query_slots` [Q] in the prompt of the whole clip, where every question
    stands right behind the video; `target_keys` [V], which of the keys the condensed tokens are; `key_rotary` and
    `query_rotary`, cos and sin; and per layer the inputs `keys` [n, hidden] and `queries` [Q, hidden], the query
    `latents` (MLA) and the teacher's attention `target` [Q, V]; all on the CPU.
    """

    def __init__(self, model: nn.Module, encoder: ConversationEncoder, mixture: CrowdMixture, seed: int):
        rng = np.random.default_rng([seed, 4])
        budget, training = decoder_of(model).config.index_topk, model.training
        model.eval()
        try:
            numbers = tqdm(range(mixture.clips), desc="reading whole clips", unit="clip")
            self.items = [_read_clip(model, encoder, mixture, rng, budget) for _ in numbers]
        finally:
            set_topk(model, budget)
            model.train(training)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> dict:
        return self.items[number]


class CrowdTrainer(Trainer):
    """Trains the indexers of a model on `Crowds`, one clip per step, and logs `indexer_loss` and `indexer_recall`: of
    the attention of questions the share that as many tokens as the selection chooses would catch."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, data_collator=_only, **kwargs)
        self._seen: list[torch.Tensor] = []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        objectives = [
            crowd_objective(layer.self_attn, inputs, part)
            for layer, part in zip(decoder_of(model).layers, inputs["layers"])
            if layer.self_attn.indexer is not None
        ]
        loss, recall = torch.stack([torch.stack(objective) for objective in objectives]).mean(0)
        self._seen.append(torch.stack([loss, recall]).detach())
        return loss

    def floating_point_ops(self, inputs) -> int:
        """Not counted: there is no prompt to count them by."""
        return 0

    def log(self, logs, start_time=None):
        if self._seen and "loss" in logs:
            loss, recall = torch.stack(self._seen).mean(0).tolist()
            logs = {**logs, "indexer_loss": loss, "indexer_recall": recall}
            self._seen.clear()
        super().log(logs, start_time)


def crowd_objective(attention: nn.Module, item: dict, part: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of one layer, with gradient to its indexer alone, and its recall; both []."""
    scores, left_out = crowd_scores(attention, item, part)
    kept = item["target_keys"]
    target = part["target"].masked_fill(left_out[:, kept], 0.0)
    share = target.sum(-1, keepdim=True)
    surprise = (target / share.clamp_min(1e-9)).clamp_min(1e-9).log() - scores.log_softmax(-1)[:, kept]
    loss = (target * surprise).sum() / share.sum().clamp_min(1e-9)
    with torch.no_grad():
        asked = item["query_slots"] > item["key_slots"][-1]  # the last key is the end of the video
        chosen = scores[asked].topk(min(attention.selection.topk, scores.shape[1]), dim=-1).indices
        caught = torch.zeros_like(scores[asked]).scatter_(1, chosen, 1.0)[:, kept]
        recall = (target[asked] * caught).sum() / share[asked].sum().clamp_min(1e-9)
    return loss, recall


def crowd_scores(attention: nn.Module, item: dict, part: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of the indexer [Q, n], the lowest number where it has no say, and where that is [Q, n]: at keys behind the
    query, in its window, and at anchors."""
    rule, indexer = attention.selection, attention.indexer
    latents = None if part["latents"] is None else part["latents"][None]
    q, gates = indexer.queries(part["queries"][None], latents, *(x[None] for x in item["query_rotary"]))
    k = indexer.keys(part["keys"][None], *(x[None] for x in item["key_rotary"]))
    products = torch.mm(q[0].flatten(0, 1), k[0].T).relu().view(*q.shape[1:3], -1)
    scores = torch.bmm(gates[0].unsqueeze(1), products).squeeze(1)
    distance = item["query_slots"][:, None] - item["key_slots"]
    left_out = distance <= (-1 if rule.local_window is None else rule.local_window)
    if rule.anchor_stride is not None:
        left_out |= item["key_slots"] % rule.anchor_stride == 0
    return scores.masked_fill(left_out, torch.finfo(scores.dtype).min), left_out


def _only(items: list[dict]) -> dict:
    (item,) = items
    return item


@torch.no_grad()
def _read_clip(
    model: nn.Module, encoder: ConversationEncoder, mixture: CrowdMixture, rng: np.random.Generator, budget: int
) -> dict:
    frames, shown = log_uniform(rng, *mixture.frames), log_uniform(rng, *mixture.shown)
    clip = draw_clip(rng, frames, shown, mixture.alike, mixture.ends)
    words = bool(rng.random() < mixture.words)
    whole = Example(clip, [], words)
    condensed = replace(whole, kept=kept_frames(rng, clip, mixture.empty, mixture.beside))
    questions = make_long_questions(clip, rng, mixture.questions, mixture.kinds)
    slots = torch.tensor(encoder.conversation(condensed)[2])
    tokens, seen = len(encoder.conversation(whole)[0]), len(slots)

    student = _read(model, encoder, [whole], budget)
    teacher = _read(model, encoder, [replace(condensed, questions=[question]) for question in questions], DENSE)

    # Every token of the questions and answers, and some of the video.
    rows = [row for row, length in enumerate(teacher.lengths) for _ in range(seen, length)]
    places = [place for length in teacher.lengths for place in range(seen, length)]
    videos = rng.permutation(seen)[: mixture.video_queries].tolist()
    rows, places = torch.tensor(rows + [0] * len(videos)), torch.tensor(places + videos)
    query_slots = torch.where(places < seen, slots[places.clamp(max=seen - 1)], tokens - seen + places)
    keys = torch.from_numpy(np.union1d(slots, rng.permutation(tokens)[: mixture.crowd]))
    item = {
        "key_slots": keys,
        "query_slots": query_slots,
        "target_keys": torch.searchsorted(keys, slots),
        "key_rotary": [part[0, keys].cpu() for part in student.index_rotary],
        "query_rotary": [part[rows, places].cpu() for part in teacher.index_rotary],
        "layers": [],
    }
    for layer, read, inputs in zip(decoder_of(model).layers, student.hidden_states, teacher.hidden_states):
        attention = layer.self_attn
        queries, states, latents = attention.project(inputs, *teacher.rotary)
        queries, states = attention.score_operands(queries, states)
        target = torch.zeros(len(rows), seen, device=queries.device)
        for row in range(len(questions)):
            mine = (rows == row).nonzero()[:, 0]
            at = places[mine]
            visible = (torch.arange(states.shape[2]) <= at[:, None]).to(queries.device)
            weights = mean_attention(queries[row, at], states[row], visible, attention.scaling, target.dtype)
            target[mine] = weights[:, :seen]
        part = {"keys": read[0, keys].cpu(), "queries": inputs[rows, places].cpu(), "target": target.cpu()}
        item["layers"].append({**part, "latents": None if latents is None else latents[rows, places].cpu()})
    return item


@dataclass(frozen=True)
class _Read:
    """What reached the attention of the layers: `hidden_states` [B, S, hidden] of each, cos and sin [B, S, D] of the
    attention in `rotary` and of the indexer in `index_rotary`; `lengths` are the tokens of each sequence."""

    hidden_states: list[torch.Tensor]
    rotary: list[torch.Tensor]
    index_rotary: list[torch.Tensor]
    lengths: list[int]


def _read(model: nn.Module, encoder: ConversationEncoder, examples: list[Example], topk: int) -> _Read:
    """Run examples through the decoder with a budget of `topk`."""
    batch = {name: value.to(model.device) for name, value in encoder.batch(examples).items()}
    del batch["labels"]
    set_topk(model, topk)
    layers = decoder_of(model).layers
    chunks: list[list[tuple]] = [[] for _ in layers]

    def collect(number: int):
        def hook(module, arguments, keywords):
            rotary = keywords["position_embeddings"]
            chunks[number].append((arguments[0], rotary, keywords["index_position_embeddings"] or rotary))

        return hook

    hooks = [
        layer.self_attn.register_forward_pre_hook(collect(number), with_kwargs=True)
        for number, layer in enumerate(layers)
    ]
    try:
        # With a cache a long prompt is read in chunks.
        model.model(**batch, use_cache=len(examples) == 1)
    finally:
        for hook in hooks:
            hook.remove()
    hidden = [torch.cat([states for states, _, _ in of], 1) for of in chunks]
    rotary, index_rotary = (
        [torch.cat(part, 1).expand(len(examples), -1, -1) for part in zip(*(chunk[place] for chunk in chunks[0]))]
        for place in (1, 2)
    )
    return _Read(hidden, rotary, index_rotary, batch["attention_mask"].sum(1).tolist())
