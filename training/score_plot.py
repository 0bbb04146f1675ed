"""Accuracy by distance as a picture: `python -m training.score_plot scores.json scores.svg`.

The first file is what `python -m training.evaluate --long --json` wrote. Needs matplotlib, which the extra `train`
installs.
"""

import argparse
import importlib
import importlib.util
import json
from pathlib import Path

COLOURS = {"sparse": "tab:blue", "dense": "tab:gray", "untrained": "tab:red"}
STYLES = ("-", "--", ":", "-.")


def plotting_library():
    """matplotlib's figures without a window; raises `ImportError` with what to install when it is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError('The plot needs matplotlib: `pip install matplotlib` or `pip install -e ".[train]"`.')
    return importlib.import_module("matplotlib.figure")


def check_picture(path: Path) -> None:
    """Raises `ValueError` for a file of a kind that cannot be drawn, `ImportError` without matplotlib."""
    kinds = plotting_library().Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise ValueError(f"{path} cannot be drawn; name a file that ends in .{', .'.join(sorted(kinds))}.")


def plot_scores(found: dict, path: Path) -> None:
    """Draw `scores` of `evaluate_long`: one panel per kind of question, one line per mode and length of clip.

    Bars are 95 % intervals. The ending of `path` decides the format.
    """
    rows = [row for row in found["accuracy"] if row["distance"] != "all"]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    lengths = list(dict.fromkeys(row["frames"] for row in rows))
    figure = plotting_library().Figure(figsize=(1 + 4 * min(len(kinds), 4), 3.6 * -(-len(kinds) // 4)))
    panels = figure.subplots(-(-len(kinds) // 4), min(len(kinds), 4), sharey=True, squeeze=False).flat
    for panel, kind in zip(panels, kinds):
        for mode, colour in COLOURS.items():
            for length, style in zip(lengths, STYLES * len(lengths)):
                points = [
                    (start(row["distance"]), row["modes"][mode])
                    for row in rows
                    if row["kind"] == kind and row["frames"] == length and mode in row["modes"]
                ]
                if not points:
                    continue
                distances, values = zip(*points)
                panel.errorbar(
                    distances,
                    [value["percent"] for value in values],
                    yerr=[
                        [max(0, value["percent"] - value["low"]) for value in values],
                        [max(0, value["high"] - value["percent"]) for value in values],
                    ],
                    color=colour,
                    linestyle=style,
                    marker="o",
                    markersize=4,
                    capsize=2,
                    label=mode if len(lengths) == 1 else f"{mode}, {length:,} frames",
                )
        panel.set(title=kind, xscale="log", xlabel="distance in frames", ylim=(-3, 103))
        panel.grid(alpha=0.3)
    for panel in list(panels):
        panel.set_visible(False)
    first = figure.axes[0]
    first.set_ylabel("right answers in percent")
    first.legend(fontsize="small", loc="lower left")
    figure.tight_layout()
    save_figure(figure, path)


def save_figure(figure, path: Path) -> None:
    """Write a figure whole or not at all; the ending of `path` decides the format."""
    part = path.with_name(f"{path.stem}.part{path.suffix}")
    figure.savefig(part, dpi=150)
    part.replace(path)


def start(distance: str) -> int:
    """Where a distance or a range of distances, as tables show it, stands on the axis."""
    return max(1, int(distance.split("–")[0].replace(",", "")))


def main() -> None:
    parser = argparse.ArgumentParser(description="Plot accuracy by distance.")
    parser.add_argument("scores", type=Path, help="the --json file of `python -m training.evaluate --long`")
    parser.add_argument("picture", type=Path, help=".svg or .png file to write")
    arguments = parser.parse_args()
    try:
        found = json.loads(arguments.scores.read_text())
    except (OSError, ValueError) as error:
        parser.error(f"{arguments.scores} holds no scores ({error}); give what training.evaluate --long --json wrote")
    try:
        plot_scores(found, arguments.picture)
    except (OSError, ValueError, ImportError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
