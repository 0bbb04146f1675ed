"""Curves of a run of `training.train_keye_tiny`: `python -m training.learning_curves RUN curves.svg`.

One panel per stage of the run that asks questions about long clips: right answers of each kind on clips never seen
before, and where the indexer learns, its loss and the share of attention that its selection catches. Needs matplotlib.
"""

import argparse
import json
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from .long_videos import LONG_KINDS
from .score_plot import plotting_library, save_figure

STAGES = ("long", "far", "warmup", "sparse", "alike", "hundreds", "ends", "settle", "beside", "crowd")
INDEXER = {"indexer_loss": "indexer: KL", "indexer_recall": "indexer: attention caught"}


def stage_log(folder: Path) -> list[dict]:
    """Log entries of a finished stage; raises `FileNotFoundError` when it has left no checkpoint."""
    checkpoint = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if checkpoint is None:
        raise FileNotFoundError(f"{folder} holds no checkpoint of a stage; name the --output of train_keye_tiny.")
    history = json.loads(Path(checkpoint, "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


def curves(log: list[dict]) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values by name."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    names = {f"words_long_{kind}": kind for kind in LONG_KINDS} | INDEXER
    for entry in log:
        for key, name in names.items():
            if key in entry:
                steps, values = found.setdefault(name, ([], []))
                steps.append(entry["step"])
                values.append(float(entry[key]))
    return found


def plot_curves(run: Path, path: Path) -> None:
    """Draw the curves of a run to `path`, whose ending decides the format.

    Raises `FileNotFoundError` when none of the stages has been run.
    """
    logs = {stage: stage_log(run / stage) for stage in STAGES if (run / stage).is_dir()}
    if not logs:
        raise FileNotFoundError(
            f"{run} holds none of the stages {', '.join(STAGES)}; name the --output of train_keye_tiny."
        )
    figure = plotting_library().Figure(figsize=(4.0 * len(logs), 3.8))
    for panel, (stage, log) in zip(figure.subplots(1, len(logs), squeeze=False)[0], logs.items()):
        found = curves(log)
        for name, (steps, values) in found.items():
            panel.plot(steps, values, label=name, linestyle="--" if name in INDEXER.values() else "-")
        highest = max((value for _, values in found.values() for value in values), default=1.0)
        panel.set(title=stage, xlabel="steps", ylim=(-0.03, 1.25 * max(1.0, highest)))
        panel.grid(alpha=0.3)
        panel.legend(fontsize="x-small", ncols=3, loc="upper left")
    figure.axes[0].set_ylabel("share of right answers; nats")
    figure.tight_layout()
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Plot the learning curves of a run of train_keye_tiny.")
    parser.add_argument("run", type=Path, help="its --output")
    parser.add_argument("picture", type=Path, help=".svg or .png file to write")
    arguments = parser.parse_args()
    try:
        plot_curves(arguments.run, arguments.picture)
    except (OSError, ValueError, ImportError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
