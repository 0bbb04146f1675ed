"""Train keye-tiny: `python -m training.train_keye_tiny --output DIR --seed N`.

Stages, each one run of `Trainer` that can be resumed from `DIR/<stage>`:
  frames   the vision tower learns words: the four tokens of a frame are pulled to the embeddings of the words for what
           it shows ("red circle red circle")
  drills   the decoder learns to retrieve from transcripts in those words, with terse questions in a row
  words    ... and to answer whole questions about longer transcripts
  videos   ... and about pixels, which the finished tower puts into the same words; half the clips stay transcripts
  long     ... and about clips of up to 20,000 frames, condensed: most empty frames are left out, places and times stay
  far      ... of which more are very long
  warmup   the indexer learns where that attention goes, which is still dense; everything else is frozen
  sparse   the decoder learns on under the indexer's selection, and the indexer with it
  alike    ... about shapes whose times differ in their hundreds of seconds alone
  footage  the vision tower learns that real footage without a shape is empty, wherever it is cropped
  hundreds the decoder learns from more clips like those of `alike`, and is asked for shapes alone more often
  ends     ... and from questions about two shapes of many that stand at both ends of a clip, two questions about each
  settle   ... and from more of these, ten to twenty shapes in each, at a lower learning rate
  beside   ... with the empty frames right before and behind each shape, as in whole clips
  crowd    the indexer learns to find among all tokens of whole clips what the decoder looks at in condensed ones
Embeddings of the words in transcripts stay as initialised, so that `frames` and the two stages after it do not depend
on each other: with `--only` they can run side by side, with the same result.
Accuracy per kind of question is printed on clips never seen before, because no clip is drawn twice. `--start` begins
with the weights of an earlier keye-tiny, whose vocabulary may end sooner. Two CPU cores need about four hours by the
sum of the stages.
"""

import argparse
import json
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from modeling_keye import KeyeConfig, KeyeForVideoQA

from .crowd_indexer import CrowdMixture, Crowds, CrowdTrainer
from .data import (
    GRID,
    ConversationEncoder,
    Example,
    FrameBatches,
    LongMixture,
    Mixture,
    Turns,
    patches,
    transcript,
)
from .indexer_training import DENSE, IndexerTrainerMixin, decoder_of, set_topk
from .synthetic_videos import COLOURS, NOTHING, SHAPES, Clip, render
from .tokenizer import build_tokenizer

VISION = ("model.visual.", "model.projector.")
DECODER = ("model.language_model.", "lm_head.")
# The words of transcripts.
WORDS = (*COLOURS, *SHAPES, NOTHING)


@dataclass(frozen=True)
class Stage:
    """One run of `Trainer` over the weights whose names begin with `part`.

    `mixtures` take turns; there is none for the stage that trains the vision tower on single frames, and none with
    `crowd`, the whole clips among whose tokens the indexer learns to find what the decoder looks at. `decay` is the
    last share of the steps, in which the learning rate falls. `indexer` is the stage of the indexer's loss, None where
    the indexer does not learn and attention is dense; in "warmup" and with `crowd` nothing but the indexer does. With
    `dense_every` n, one batch in n attends to all tokens, so that the decoder does not unlearn that. `empty` is the
    share of empty frames that the vision tower sees.
    """

    name: str
    steps: int
    learning_rate: float
    part: tuple[str, ...]
    mixtures: tuple[Mixture | LongMixture, ...] = ()
    decay: float = 0.25
    indexer: str | None = None
    dense_every: int | None = None
    crowd: CrowdMixture | None = None
    empty: float | None = None

    def trains(self, name: str) -> bool:
        """Whether the parameter of this name learns."""
        if self.indexer == "warmup" or self.crowd is not None:
            return ".indexer." in name
        return name.startswith(self.part) and (self.indexer is not None or ".indexer." not in name)


# Shares of the kinds of questions. Matching two words ("red circle") is learned later than matching one time stamp, and
# counting last of all: both are asked for more often.
DRILLED = ("description", "colour", "when", "count", "sequence")
TOLD = ("description", "colour", "when", "when", "count", "sequence", "sequence")
SEEN = ("what", "description", "colour", "when", "count", "count", "count", "order", "order", "sequence")

# Comparing two far shapes is learned from clips with few of them, and by way of comparing one with a description.
COMPARED = ("identity", "identity", "identity", "change", "change", "check", "check", "colour")
FAR = ("identity", "identity", "change", "check", "first", "last", "earlier", "count", "what", "colour")
SHORT_CLIPS = Mixture(16, (3, 12), SEEN, words=0.9, drills=0.1)
FEW = LongMixture(20, (16, 20_000), (3, 6), (1, 3), COMPARED, words=0.9)
MANY = LongMixture(16, (16, 20_000), (4, 20), (2, 16), FAR, words=0.9)
# Times of many thousand seconds are rare among octaves, and half of what is left to learn is told from them. Fewer
# questions per clip: what an earlier answer says need not be looked up again.
FAR_FEW = replace(FEW, clips=32, questions=4, even=0.7)
FAR_MANY = replace(MANY, shown=(4, 24), kinds=(*COMPARED, "first", "last", "count", "what"), even=0.7)
# Among many empty frames; most of these prompts are longer than the budget, so that there is something to leave out.
FAR_CROWD = LongMixture(32, (64, 20_000), (4, 20), (10, 120), (*COMPARED, "what"), questions=4, words=0.85, even=0.7)
LARGE_CROWD = replace(FAR_CROWD, empty=(20, 300))
# Whole clips; a few are as long as the longest that are asked about.
CROWD = CrowdMixture(24, (200, 10_000), (8, 20), (*COMPARED, "what"), crowd=28_000, alike=0.3, ends=0.5, beside=9)
ALIKE_FEW, ALIKE_CROWD = (replace(mixture, alike=0.5) for mixture in (FAR_FEW, FAR_CROWD))
MORE_FEW, MORE_CROWD = (
    replace(mixture, alike=0.8, kinds=(*COMPARED, "what", "what")) for mixture in (FAR_FEW, FAR_CROWD)
)
# Only two questions about a clip: a later one can copy what an earlier answer says.
ENDS = LongMixture(
    32, (1_000, 20_000), (6, 20), (4, 40), (*COMPARED, "identity", "what"), questions=2, words=0.9, even=0.7, ends=0.8
)
MANY_ENDS = replace(ENDS, shown=(10, 20))
# A shape with the frames beside it is ten times as long as one alone. More questions about a clip, and nothing to copy.
APART = replace(ENDS, shown=(10, 20), questions=5, kinds=(*COMPARED, "identity", "identity", "what"), apart=True)
BESIDE = replace(APART, clips=96, shown=(8, 18), beside=9)

# The stages in which decoder and indexer learn together, most of them with these settings.
adapting = partial(Stage, part=DECODER, decay=0.7, indexer="adaptation", dense_every=3)
STAGES = (
    Stage("frames", 2400, 1.5e-3, VISION),
    Stage("drills", 700, 3e-3, DECODER, (Mixture(32, (2, 8), DRILLED, words=1.0, drills=1.0),)),
    Stage("words", 1100, 3e-3, DECODER, (Mixture(24, (2, 12), TOLD, words=1.0, drills=0.5),), decay=0.2),
    Stage("videos", 1500, 1.5e-3, DECODER, (Mixture(24, (3, 12), SEEN, words=0.5, drills=0.1),), decay=0.6),
    Stage("long", 1700, 2e-3, DECODER, (FEW, MANY, FEW, MANY, SHORT_CLIPS), decay=0.4),
    Stage("far", 1200, 2e-3, DECODER, (FAR_FEW, FAR_CROWD, FAR_FEW, FAR_MANY, SHORT_CLIPS), decay=0.5),
    Stage("warmup", 200, 2e-3, DECODER, (FAR_CROWD,), decay=0.5, indexer="warmup"),
    adapting("sparse", 1000, 1.5e-3, mixtures=(LARGE_CROWD, FAR_FEW, SHORT_CLIPS), dense_every=4),
    adapting("alike", 500, 1.2e-3, mixtures=(ALIKE_FEW, ALIKE_CROWD, ALIKE_FEW, SHORT_CLIPS)),
    Stage("footage", 1000, 6e-4, VISION, decay=0.7, empty=0.6),
    adapting("hundreds", 500, 1.5e-3, mixtures=(MORE_FEW, MORE_CROWD, FAR_FEW, MORE_FEW, SHORT_CLIPS)),
    adapting("ends", 500, 1.5e-3, mixtures=(ENDS, ENDS, MORE_FEW, ENDS, SHORT_CLIPS)),
    adapting("settle", 400, 1e-3, mixtures=(MANY_ENDS, MANY_ENDS, MORE_FEW, MANY_ENDS, SHORT_CLIPS), decay=0.8),
    adapting("beside", 420, 1e-3, mixtures=(BESIDE, APART, BESIDE, MORE_FEW, BESIDE, APART, SHORT_CLIPS), decay=0.8),
    Stage("crowd", 300, 1e-3, DECODER, decay=0.5, crowd=CROWD),
)
# While the decoder learns, its selection is wider than the one that is shipped and that `crowd` is for.
ADAPTATION_TOPK = 128
FRAME_CLIPS = 24
WARMUP_STEPS = 100
INDEXER_LOSS_COEF = 1.0


class AnswerTrainer(Trainer):
    """Loss on answers only, with the share of fully right answers per kind and per number of frames in the log."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tally: dict[str, list[int]] = defaultdict(lambda: [0, 0])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels, owner, groups = inputs.pop("labels"), inputs.pop("owner"), inputs.pop("groups")
        # Few tokens carry labels: the head runs on those alone.
        hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
        answered = labels[:, 1:] >= 0
        logits = model.lm_head(hidden[answered]).float()
        targets = labels[:, 1:][answered]
        right = torch.ones(len(groups), dtype=torch.bool, device=labels.device)
        owner = owner[:, 1:][answered]
        right[owner[(logits.argmax(-1) != targets) & (owner >= 0)]] = False
        for names, correct in zip(groups, right.tolist()):
            for name in names:
                self.tally[name][0] += correct
                self.tally[name][1] += 1
        return F.cross_entropy(logits, targets)

    def log(self, logs, start_time=None):
        logs = {**logs, **{name: round(a / b, 3) for name, (a, b) in sorted(self.tally.items())}}
        self.tally.clear()
        super().log(logs, start_time)


class IndexerAnswerTrainer(IndexerTrainerMixin, AnswerTrainer):
    """... and with the indexer's loss and the share of attention that its selection catches.

    One batch in `dense_every` attends to all tokens, none without it; the others select as many as the model did.
    """

    def __init__(self, *args, dense_every: int | None, **kwargs):
        super().__init__(*args, **kwargs)
        self.dense_every, self.budget = dense_every, decoder_of(self.model).config.index_topk

    def compute_loss(self, model, inputs, *args, **kwargs):
        dense = self.dense_every is not None and self.state.global_step % self.dense_every == 0
        set_topk(self.model, DENSE if dense else self.budget)
        return super().compute_loss(model, inputs, *args, **kwargs)


class FrameReader(nn.Module):
    """Vision tower and projector, taught to speak the decoder's words."""

    def __init__(self, model: KeyeForVideoQA, words: torch.Tensor):
        super().__init__()
        self.visual, self.projector = model.model.visual, model.model.projector
        self.features = model.get_video_features
        self.register_buffer("words", words, persistent=False)
        self.register_buffer("targets", model.get_input_embeddings().weight[words].detach(), persistent=False)

    def forward(self, pixel_values_videos, video_grid_thw, labels, **kwargs) -> dict[str, torch.Tensor]:
        """`labels` holds, per token, an index into the words; the loss pulls tokens to the embeddings of their words
        and away from those of all others."""
        tokens = torch.cat(list(self.features(pixel_values_videos, video_grid_thw, return_dict=True).pooler_output))
        spread = torch.cdist(self.targets, self.targets).square().mean()
        distances = torch.cdist(tokens, self.targets).square() / spread
        near = distances.gather(1, labels[:, None]).mean()
        return {"loss": near + F.cross_entropy(-4.0 * distances, labels), "logits": -distances}


class FrameTrainer(Trainer):
    """Logs the share of tokens whose nearest word is right."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.right: dict[str, list[float]] = defaultdict(list)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        output = model(**inputs)
        right = (output["logits"].argmax(-1) == inputs["labels"]).float().view(-1, 2).mean(0)
        self.right["colour"].append(right[0].item())
        self.right["shape"].append(right[1].item())
        return output["loss"]

    def log(self, logs, start_time=None):
        logs = {**logs, **{name: round(sum(values) / len(values), 4) for name, values in self.right.items()}}
        self.right.clear()
        super().log(logs, start_time)


def load_grown(model: KeyeForVideoQA, weights: dict[str, torch.Tensor], with_indexer: bool) -> None:
    """Load weights whose vocabulary is the beginning of the model's; further rows stay as they are, and without
    `with_indexer` the indexer does."""
    own = model.state_dict()
    new = {name for name in own if ".indexer." in name and not with_indexer}
    weights = {name: own[name] if name in new else value for name, value in weights.items()}
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], own[name][weights[name].shape[0] :]])
    model.load_state_dict(weights)


def word_ids(encoder: ConversationEncoder) -> torch.Tensor:
    """Token ids of the words of transcripts."""
    return torch.tensor([encoder.ids(word)[0] for word in WORDS])


def answer_collator(encoder: ConversationEncoder):
    """Groups of examples to batches, with the question that owns each label and the groups it is counted in."""

    def collate(groups: list[list[Example]]) -> dict:
        examples = [example for group in groups for example in group]
        batch = encoder.batch(examples)
        owner, names = torch.full_like(batch["labels"], -1), []
        for row, example in enumerate(examples):
            sizes = [len(encoder.answer(question, example.drill)) for question in example.questions]
            # Labels before those of the answers belong to the transcript.
            places = (batch["labels"][row] >= 0).nonzero()[:, 0].tolist()[-sum(sizes) :]
            shown = f"{'words' if example.words else 'video'}{'_drill' if example.drill else ''}"
            shown += "" if example.kept is None else "_long"
            length = f"{shown}_{(len(example.seen.things) + 3) // 4 * 4:02d}_frames"
            for question, size in zip(example.questions, sizes):
                owner[row, places[:size]] = len(names)
                places = places[size:]
                names.append((f"{shown}_{question.kind}", length))
        return {**batch, "owner": owner, "groups": names}

    return collate


def frame_collator():
    """Clips to pixels and, per token, the index of the word it stands for."""
    index = {word: place for place, word in enumerate(WORDS)}

    def collate(groups: list[list[Clip]]) -> dict[str, torch.Tensor]:
        clips = [clip for group in groups for clip in group]
        labels = [index[word] for clip in clips for thing in clip.things for word in transcript(thing)]
        return {
            "pixel_values_videos": torch.cat([patches(render(clip)) for clip in clips]),
            "video_grid_thw": torch.tensor([[len(clip.things), GRID, GRID] for clip in clips]),
            "labels": torch.tensor(labels),
        }

    return collate


def train_stage(model: KeyeForVideoQA, encoder: ConversationEncoder, stage: Stage, output: Path, seed: int) -> dict:
    """Run one stage, or pick up where an interrupted run left it, and return its record.

    The weights end in `output/<stage>/weights.safetensors`. `seconds` counts from the last interruption.
    """
    folder = output / stage.name
    weights, record = folder / "weights.safetensors", folder / "stage.json"
    if record.exists():
        model.load_state_dict(load_file(weights), strict=False)
        return json.loads(record.read_text())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(stage.trains(name))
    # The warm-up is dense by itself; its budget is for the share of attention that it logs.
    topk = DENSE if stage.indexer is None else ADAPTATION_TOPK
    set_topk(model, topk if stage.crowd is None else KeyeConfig.from_preset("keye-tiny").text_config.index_topk)
    text = model.config.text_config
    text.indexer_loss_coef = 0.0 if stage.indexer is None else INDEXER_LOSS_COEF
    text.indexer_stage = stage.indexer or text.indexer_stage
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=stage.steps,
        learning_rate=stage.learning_rate,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": round(stage.steps * stage.decay), "min_lr_ratio": 0.02},
        warmup_steps=min(WARMUP_STEPS, stage.steps // 4),
        adam_beta2=0.98,
        weight_decay=0.0,
        max_grad_norm=1.0,
        per_device_train_batch_size=1,
        remove_unused_columns=False,
        # A batch is built whole by the collator and cannot be cut.
        accelerator_config={"dispatch_batches": False},
        logging_steps=min(50, stage.steps),
        save_steps=200,
        save_total_limit=1,
        seed=seed,
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    options = {"args": arguments}
    if stage.crowd is not None:
        trainer = CrowdTrainer(model=model, train_dataset=Crowds(model, encoder, stage.crowd, seed), **options)
    elif not stage.mixtures:
        reader = FrameReader(model, word_ids(encoder))
        dataset = FrameBatches(FRAME_CLIPS, seed, stage.empty)
        trainer = FrameTrainer(model=reader, train_dataset=dataset, data_collator=frame_collator(), **options)
    else:
        dataset = Turns(stage.mixtures, seed)
        options |= {"train_dataset": dataset, "data_collator": answer_collator(encoder)}
        if stage.indexer is None:
            trainer = AnswerTrainer(model=model, **options)
        else:
            trainer = IndexerAnswerTrainer(model=model, dense_every=stage.dense_every, **options)
    print(json.dumps({"stage": stage.name, "steps": stage.steps}), flush=True)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.exists() else None)
    save_file({name: value for name, value in model.state_dict().items() if name.startswith(stage.part)}, weights)
    done = {
        "name": stage.name,
        "steps": stage.steps,
        "seconds": round(time.perf_counter() - started),
        "threads": torch.get_num_threads(),
    }
    record.write_text(json.dumps(done))
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description="Train keye-tiny from scratch.")
    parser.add_argument("--output", type=Path, required=True, help="working folder: stages, then the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the steps of every stage")
    parser.add_argument("--start", type=Path, metavar="FILE", help="safetensors with the weights to begin with")
    parser.add_argument("--only", nargs="+", choices=[stage.name for stage in STAGES], help="run these stages alone")
    arguments = parser.parse_args()
    set_seed(arguments.seed)
    tokenizer = build_tokenizer()
    model = KeyeForVideoQA(KeyeConfig.from_preset("keye-tiny"))
    if arguments.start is not None:
        try:
            weights = load_file(arguments.start)
        except (OSError, SafetensorError) as error:
            parser.error(f"--start {arguments.start} cannot be read ({error}); give the safetensors of a keye-tiny")
        # The warm-up begins with a new indexer.
        load_grown(model, weights, with_indexer="warmup" not in (arguments.only or ["warmup"]))
    encoder = ConversationEncoder(tokenizer)
    fixed = word_ids(encoder)
    model.get_input_embeddings().weight.register_hook(lambda gradient: gradient.index_fill(0, fixed, 0.0))
    done = []
    for number, stage in enumerate(STAGES):
        if arguments.only and stage.name not in arguments.only:
            continue
        stage = replace(stage, steps=max(1, round(stage.steps * arguments.scale)))
        done.append(train_stage(model, encoder, stage, arguments.output, arguments.seed * len(STAGES) + number))
    if len(done) < len(STAGES) and arguments.start is None:
        return
    save_file(model.state_dict(), arguments.output / "weights.safetensors")
    run = {
        "seed": arguments.seed,
        "start": arguments.start and arguments.start.name,
        "scale": arguments.scale,
        "stages": done,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (arguments.output / "run.json").write_text(json.dumps(run, indent=2))


if __name__ == "__main__":
    main()
