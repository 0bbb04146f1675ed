"""Draw a short clip whose content is known, to have something to ask keye-tiny about.

    python -m examples.make_demo_clip clip.mp4
    keye ask clip.mp4 "What is shown at 3.0 seconds?"

The clip is an H.264 file of one frame per second; the story it tells is printed.
"""

import argparse
from fractions import Fraction
from pathlib import Path

from training.synthetic_videos import Clip, Thing, write_video

STORY = ("red circle", "blue square", None, "green star", "yellow triangle", "red circle", "white cross")


def demo_clip() -> Clip:
    """The plan of the clip: one shape a second, wandering from left to right."""
    things = []
    for second, name in enumerate(STORY):
        colour, shape = name.split() if name else (None, None)
        place = 0.35 + 0.3 * second / (len(STORY) - 1)
        things.append(Thing(colour, shape, place, 0.5, 0.7, 1.0) if name else None)
    return Clip(tuple(things), Fraction(1), "plain", seed=0)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a short clip whose content is known.")
    parser.add_argument("path", type=Path, help="where to write the clip, for example clip.mp4")
    path = parser.parse_args().path
    if path.is_dir():
        parser.error(f"{path} is a folder; give the file to write, for example {path / 'clip.mp4'}")
    try:
        write_video(demo_clip(), path)
    except (OSError, ValueError) as error:
        parser.error(f"{path} cannot be written ({error}); give a file ending in .mp4 in a folder that can be written")
    print(f"{path}: " + ", ".join(f"{second} s {name or 'nothing'}" for second, name in enumerate(STORY)))


if __name__ == "__main__":
    main()
