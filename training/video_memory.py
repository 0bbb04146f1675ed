"""A video that is read once and asked many times: every question is answered from the same cache.

`read_video` puts a file through the checkpoint's own processor with every frame taken, `VideoMemory` runs the prompt up
to the end of the video through the decoder, and `attention_mode` chooses what a query attends to meanwhile.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from modeling_keye import Selection

from .synthetic_videos import RUN_FRAMES

# sparse: as shipped; dense: every token; untrained: sparse by an indexer that has learned nothing.
MODES = ("sparse", "dense", "untrained")
UNTRAINED_SEED = 0
FRAME, VISION_END = "<|frame|>", "<|vision_end|>"


@dataclass(frozen=True)
class ReadVideo:
    """A prompt up to the end of its video: ids [1, S], and the arguments of `forward` that fill its placeholders."""

    input_ids: torch.Tensor
    media: dict[str, object]


@dataclass(frozen=True)
class Reply:
    """Token ids of an answer, and per query of its question and itself the share of visible tokens that it attended:
    mean and maximum over layers and queries."""

    ids: list[int]
    attended: float
    attended_most: float


def decoder_layers(model) -> list:
    """The attention modules of the decoder."""
    return [layer.self_attn for layer in model.model.language_model.layers]


def _conversation(path: Path | str, question: str) -> list[dict]:
    content = [{"type": "video", "path": str(path)}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


@torch.no_grad()
def read_video(model, processor, path: Path | str, times: list[str]) -> ReadVideo:
    """Read every frame of a file and encode it; `times` are the stamps that the prompt has to show, one per frame.

    Raises `ValueError` when the prompt shows other frames or other times.
    """
    budget = processor.video_processor.budget()
    options = {
        # Asked for by number, frames are not limited by `max_frames`; the tokens have to make room for them.
        "num_frames": len(times),
        "max_video_tokens": max(int(budget.total_tokens), len(times) * budget.frame_min_tokens),
    }
    with tqdm(total=len(times), desc="decoding", unit="frame", leave=False, disable=len(times) <= RUN_FRAMES) as bar:
        options["progress"] = lambda done, total: bar.update(done - bar.n)
        inputs = processor.apply_chat_template(
            _conversation(path, "?"), tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=options
        ).to(model.device)
    ids = inputs["input_ids"]
    end = processor.tokenizer.convert_tokens_to_ids(VISION_END)
    ids = ids[:, : int((ids[0] == end).nonzero()[-1]) + 1]
    check_times(processor, ids[0].tolist(), times)
    grid = inputs["video_grid_thw"]
    features = model.get_video_features(inputs["pixel_values_videos"], grid, return_dict=True)
    media = {"mm_encoder_outputs": {"video": features}, "video_grid_thw": grid}
    if "second_per_grid_ts" in inputs:
        media["second_per_grid_ts"] = inputs["second_per_grid_ts"]
    return ReadVideo(ids, media)


def check_times(processor, ids: list[int], times: list[str]) -> None:
    """Raise `ValueError` unless the frames in `ids` are as many as `times` and carry these time stamps."""
    tokenizer = processor.tokenizer
    frame, end = tokenizer.convert_tokens_to_ids([FRAME, VISION_END])
    starts = [place for place, token in enumerate(ids) if token == frame]
    if len(starts) != len(times):
        raise ValueError(
            f"The prompt shows {len(starts)} frames, but the clip has {len(times)}. Questions about single frames need "
            "a processor that writes each of them with its time."
        )
    special = set(tokenizer.all_special_ids) | {processor.video_token_id, end}
    expected = tokenizer(times, add_special_tokens=False).input_ids
    for number, (start, stamp) in enumerate(zip(starts, expected)):
        after = start + 1 + len(stamp)
        if ids[start + 1 : after] != stamp or ids[after] not in special:
            shown = tokenizer.decode(ids[start + 1 : after])
            raise ValueError(
                f"Frame {number} stands at {times[number]} seconds, but the prompt shows {shown!r}; the processor must "
                "take every frame and write its time in seconds with one decimal."
            )


def question_ids(processor, question: str) -> list[int]:
    """Token ids of a prompt behind its video, up to where the answer begins."""
    text = processor.apply_chat_template(_conversation("", question), add_generation_prompt=True, tokenize=False)
    return processor.tokenizer(text.rpartition(VISION_END)[2], add_special_tokens=False).input_ids


class VideoMemory:
    """The cache of a video, prefilled once under the model's current attention."""

    def __init__(self, model, video: ReadVideo, progress: bool = False):
        self.model = model
        self.length = video.input_ids.shape[1]
        with torch.no_grad(), _prefill_bar(model, self.length, progress):
            output = model(input_ids=video.input_ids, **video.media, use_cache=True, logits_to_keep=1)
        self.cache = output.past_key_values

    @torch.no_grad()
    def ask(self, ids: list[int]) -> Reply:
        """The greedy answer to a question; the cache is as before afterwards."""
        settings = self.model.generation_config
        ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
        selects = any(not layer.selection.is_dense for layer in decoder_layers(self.model))
        answer: list[int] = []
        shares: list[torch.Tensor] = []
        try:
            for _ in range(settings.max_new_tokens):
                output = self.model(
                    input_ids=torch.tensor([ids], device=self.model.device),
                    past_key_values=self.cache,
                    use_cache=True,
                    logits_to_keep=1,
                    output_indexer_selections=selects,
                )
                shares.append(self._attended(output.indexer_selections, len(ids)))
                logits = output.logits[0, -1].float()
                logits[settings.suppress_tokens or []] = -torch.inf
                token = int(logits.argmax())
                if token in ends:
                    break
                answer.append(token)
                ids = [token]
        finally:
            excess = self.cache.get_seq_length() - self.length
            if excess:
                self.cache.crop(-excess)
        share = torch.cat(shares, dim=1)
        return Reply(answer, float(share.mean()), float(share.max()))

    def _attended(self, selections: tuple[torch.Tensor, ...] | None, queries: int) -> torch.Tensor:
        """Shares [layers, queries] of the visible tokens that the latest queries kept."""
        visible = torch.arange(1, queries + 1, dtype=torch.float64) + self.cache.get_seq_length() - queries
        kept = [(selected[0] >= 0).sum(dim=-1).cpu() for selected in selections or ()]
        layers = len(decoder_layers(self.model))
        kept += [visible] * (layers - len(kept))  # those without a selection attend to everything
        return torch.stack([count / visible for count in kept])


def prefill_share(model, tokens: int) -> float:
    """Pairs of query and key that a prompt of `tokens` tokens attends to, as a share of all causal pairs; mean over
    layers. Exact: how many tokens a query keeps does not depend on which."""
    counts: dict[Selection, float] = {}
    for layer in decoder_layers(model):
        rule = layer.selection
        if rule not in counts:
            kept = (visible if rule.is_dense else rule.width(visible) for visible in range(1, tokens + 1))
            counts[rule] = sum(kept) / (tokens * (tokens + 1) / 2)
    return sum(counts[layer.selection] for layer in decoder_layers(model)) / len(decoder_layers(model))


@contextmanager
def attention_mode(model, mode: str, topk: int | None = None) -> Iterator[None]:
    """What queries attend to inside this block, see `MODES`; `topk` replaces the configured one where it selects.

    Raises `ValueError` for a mode that the model does not have.
    """
    layers = decoder_layers(model)
    indexers = [layer.indexer for layer in layers if layer.indexer is not None]
    if mode not in MODES:
        raise ValueError(f"There is no mode {mode!r}; choose among {', '.join(MODES)}.")
    if not indexers and (mode == "untrained" or topk is not None):
        asked = "the mode 'untrained'" if mode == "untrained" else f"topk={topk}"
        raise ValueError(f"This model has no indexer, which {asked} needs; ask it in the mode 'sparse' or 'dense'.")
    others = [layer.other_selection for layer in layers]
    weights = [{name: value.clone() for name, value in indexer.state_dict().items()} for indexer in indexers]
    try:
        for layer in layers:
            if mode == "dense":
                layer.other_selection = Selection()
            elif topk is not None and layer.indexer is not None:
                layer.other_selection = replace(layer.selection, topk=topk)
        if mode == "untrained":
            _forget(model, indexers)
        yield
    finally:
        for layer, other in zip(layers, others):
            layer.other_selection = other
        for indexer, values in zip(indexers, weights):
            indexer.load_state_dict(values)


def _forget(model, indexers: list) -> None:
    """Initialise the indexers as a new model does, from a fixed seed."""
    text = model.model.language_model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(UNTRAINED_SEED)
        for indexer in indexers:
            # A new module: the library leaves weights that came from a file as they are.
            fresh = type(indexer)(text.config)
            fresh.apply(text._init_weights)
            indexer.load_state_dict(fresh.state_dict())


@contextmanager
def _prefill_bar(model, tokens: int, shown: bool) -> Iterator[None]:
    """A progress bar that follows the chunks through the last layer."""
    with tqdm(total=tokens, desc="reading", unit="token", leave=False, disable=not shown) as bar:

        def count(module, inputs, output) -> None:
            bar.update(output[0].shape[1])

        hook = decoder_layers(model)[-1].register_forward_hook(count)
        try:
            yield
        finally:
            hook.remove()
