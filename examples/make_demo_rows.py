"""Draw short clips with questions and answers, as a small data set for the recipes in recipes/.

    python -m examples.make_demo_rows .demo/rows
    python -m training.train recipes/finetune-lora.yaml

Writes `clips/*.mp4`, `train.jsonl` and `eval.jsonl` with rows {video, question, answer, kind}.
"""

import argparse
import json
from fractions import Fraction
from pathlib import Path

import numpy as np

from training.synthetic_videos import make_clip, make_questions, write_video


def write_rows(
    folder: Path, name: str, clips: int, questions: int, seed: int, frames: tuple[int, int] = (8, 12)
) -> Path:
    """Write `clips` clips of one frame per second and `folder/name.jsonl` with `questions` rows about each."""
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(clips):
        clip = make_clip(rng, frames, Fraction(1))
        video = Path("clips") / f"{name}-{number}.mp4"
        write_video(clip, folder / video)
        for question in make_questions(clip, rng, questions):
            row = {"video": str(video), "question": question.text, "answer": question.answer, "kind": question.kind}
            rows.append(row)
    metadata = folder / f"{name}.jsonl"
    metadata.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return metadata


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw short clips with questions and answers.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clips", type=int, default=8, help="clips to train on (default: 8); a quarter for evaluation")
    parser.add_argument("--questions", type=int, default=2, help="rows about each clip (default: 2)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in ("clips", "questions"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}, which leaves no rows; give 1 or more")
    evaluated = max(1, options.clips // 4)
    try:
        print(write_rows(options.folder, "train", options.clips, options.questions, options.seed))
        print(write_rows(options.folder, "eval", evaluated, options.questions, options.seed + 1))
    except OSError as error:
        parser.error(f"{options.folder} cannot be written to ({error}); give another folder")


if __name__ == "__main__":
    main()
