"""What counts as a row, where rows may come from, and the sentence each bad one ends in."""

import json
import pickle
import tracemalloc
from pathlib import Path

import pytest

from training.rows import DataError, MediaError, Row, load_rows

datasets = pytest.importorskip("datasets")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with files in the place of videos and images; nothing here looks inside them."""
    for name in ("a.mp4", "b.mp4", "clips/c.mp4", "p.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"not looked at")
    return tmp_path


def write_lines(path: Path, records: list) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def row_of(folder: Path, record: dict, **options) -> Row:
    return load_rows([record], media_root=folder, **options)[0]


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def video(folder: Path, name: str = "a.mp4") -> dict:
    return {"type": "video", "path": str(folder / name)}


PLAIN = [
    {"id": "first", "video": "a.mp4", "question": "what, exactly?", "answer": 'a "red"\nball'},
    {"id": "second", "video": "clips/c.mp4", "question": "où?", "answer": "3"},
]


def expected_plain(folder: Path, where: list[str]) -> list[Row]:
    return [
        Row(
            place,
            [
                {"role": "user", "content": [video(folder, record["video"]), text(record["question"])]},
                {"role": "assistant", "content": [text(record["answer"])]},
            ],
            record["id"],
        )
        for place, record in zip(where, PLAIN, strict=True)
    ]


def make_csv(folder: Path) -> Path:
    cells = [
        ["id", "video", "question", "answer"],
        ["first", "a.mp4", '"what, exactly?"', '"a ""red""\nball"'],
        ["second", "clips/c.mp4", "où?", "3"],
    ]
    path = folder / "table.csv"
    path.write_text("\r\n".join(",".join(row) for row in cells) + "\r\n", newline="", encoding="utf-8-sig")
    return path


def make_parquet(folder: Path) -> Path:
    datasets.Dataset.from_list(PLAIN).to_parquet(folder / "table.parquet")
    return folder / "table.parquet"


def make_json_list(folder: Path) -> Path:
    (folder / "table.json").write_text(json.dumps(PLAIN, indent=2, ensure_ascii=False))
    return folder / "table.json"


FILES = {
    "jsonl": lambda folder: write_lines(folder / "table.jsonl", PLAIN),
    "json lines": lambda folder: write_lines(folder / "table.json", PLAIN),
    "json list": make_json_list,
    "csv": make_csv,
    "parquet": make_parquet,
}


@pytest.mark.parametrize("make", FILES.values(), ids=FILES)
def test_every_kind_of_file_gives_the_same_rows(folder, make):
    path = make(folder)
    where = [f"{path.name}, row {number}" for number in (1, 2)]
    assert list(load_rows(path)) == expected_plain(folder, where)
    # A folder with one table is that table; a path may be a string.
    assert list(load_rows(str(folder))) == expected_plain(folder, where)


def test_datasets_in_memory_and_saved(folder):
    dataset = datasets.Dataset.from_list(PLAIN)
    where = [f"the data set, row {number}" for number in (1, 2)]
    assert list(load_rows(dataset, media_root=folder)) == expected_plain(folder, where)
    parts = datasets.DatasetDict({"train": dataset, "dev": dataset.select([1])})
    assert [row.id for row in load_rows(parts, media_root=folder, split="dev")] == ["second"]
    with pytest.raises(DataError, match="has no split 'test'; it has 'train', 'dev'"):
        load_rows(parts, media_root=folder, split="test")
    parts.save_to_disk(folder / "saved")
    assert [row.id for row in load_rows(folder / "saved", media_root=folder)] == ["first", "second"]
    with pytest.raises(DataError, match="IterableDataset has no rows to count"):
        load_rows(dataset.to_iterable_dataset())


def test_a_folder_as_on_the_hub_is_loaded_by_its_name(folder):
    (folder / "repository" / "data").mkdir(parents=True)
    datasets.Dataset.from_list(PLAIN).to_parquet(folder / "repository" / "data" / "train-00000-of-00001.parquet")
    rows = load_rows(folder / "repository", media_root=folder)
    assert [row.id for row in rows] == ["first", "second"]
    files = {"train": str(folder / "repository" / "data" / "*.parquet")}
    rows = load_rows({"path": "parquet", "data_files": files}, media_root=folder)
    assert [row.where for row in rows] == ["parquet, row 1", "parquet, row 2"]
    with pytest.raises(DataError, match="trust_remote_code is not supported"):
        load_rows({"path": "parquet", "data_files": files, "trust_remote_code": True})


def test_media_that_a_data_set_holds_as_bytes_become_files(folder):
    features = datasets.Features(
        {"video": datasets.Video(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    )
    embedded = {"video": {"bytes": b"0123", "path": "x.mp4"}, "question": "what?", "answer": "red"}
    dataset = datasets.Dataset.from_list([embedded, {**embedded, "video": str(folder / "a.mp4")}], features=features)
    rows = load_rows(dataset)
    (_, first), (_, second) = rows[0].media[0], rows[1].media[0]
    assert Path(first).read_bytes() == b"0123" and first.endswith(".mp4")
    assert second == str(folder / "a.mp4")
    assert load_rows(dataset, media_root=folder)[0] == rows[0]


def test_which_file_of_a_folder(folder):
    write_lines(folder / "train.jsonl", PLAIN[:1])
    write_lines(folder / "dev.jsonl", PLAIN[1:])
    assert [row.id for row in load_rows(folder)] == ["first"]
    assert [row.id for row in load_rows(folder, split="dev")] == ["second"]
    with pytest.raises(DataError, match=r"several tables \(dev.jsonl, train.jsonl\)"):
        load_rows(folder, split="test")
    write_lines(folder / "metadata.jsonl", PLAIN)
    assert len(load_rows(folder, split="test")) == 2


def test_conversations_keep_every_turn(folder):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "video"}, text("what?"), {"type": "image", "path": "p.png"}]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": [text("yes")]},
    ]
    row = row_of(folder, {"video": "a.mp4", "messages": messages, "kind": "colour"})
    assert [message["role"] for message in row.messages] == ["system", "user", "assistant", "user", "assistant"]
    image = {"type": "image", "path": str(folder / "p.png")}
    assert row.messages[1]["content"] == [video(folder), text("what?"), image]
    assert row.messages[3]["content"] == [text("sure?")]
    assert row.media == [("video", str(folder / "a.mp4")), ("image", str(folder / "p.png"))]
    assert row.kind == "colour"


def test_markers_place_videos_and_files_without_markers_come_first(folder):
    both = ["a.mp4", "b.mp4"]
    marked = row_of(folder, {"video": both, "question": "<video>\nand\n<video>\nagree?", "answer": "yes"})
    a, b = video(folder), video(folder, "b.mp4")
    assert marked.messages[0]["content"] == [a, text("and"), b, text("agree?")]
    plain = row_of(folder, {"video": both, "image": "p.png", "question": "agree?", "answer": "yes"})
    assert [part["type"] for part in plain.messages[0]["content"]] == ["image", "video", "video", "text"]
    turns = [
        {"role": "user", "content": "<video>what?"},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "and here? <video>"},
        {"role": "assistant", "content": "blue"},
    ]
    row = row_of(folder, {"video": both, "messages": turns})
    assert [message["content"] for message in row.messages[::2]] == [[a, text("what?")], [text("and here? "), b]]


def test_text_only_rows_leave_the_column_out(folder):
    assert row_of(folder, {"question": "2 + 2?", "answer": "4"}).media == []


def test_llava_video(folder):
    record = {
        "id": 7,
        "video": "a.mp4",
        "data_source": "somewhere",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "A ball."},
            {"from": "human", "value": "Where?"},
            {"from": "gpt", "value": "Left."},
        ],
    }
    for name in ("llava", "auto"):
        row = row_of(folder, record, format=name)
        assert row.id == "7"
        assert row.messages[0] == {"role": "user", "content": [video(folder), text("What is it?")]}
        assert [m["role"] for m in row.messages] == ["user", "assistant"] * 2
    assert record["conversations"][0]["value"] == "<image>\nWhat is it?"


@pytest.mark.parametrize("spelling", ["messages", "conversations"])
def test_sharegpt(folder, spelling):
    if spelling == "messages":
        turns = [{"role": "user", "content": "<video>What?"}, {"role": "assistant", "content": "A ball."}]
    else:
        turns = [{"from": "human", "value": "<video>What?"}, {"from": "gpt", "value": "A ball."}]
    record = {spelling: turns, "videos": ["a.mp4"], "system": "Be brief."}
    for name in ("sharegpt", "auto"):
        row = row_of(folder, record, format=name)
        assert [m["role"] for m in row.messages] == ["system", "user", "assistant"]
        assert row.messages[1]["content"] == [video(folder), text("What?")]


def test_a_mapping_of_ones_own(folder, monkeypatch):
    (folder / "my_rows.py").write_text(
        "def map_row(record):\n"
        "    return {'video': record['clip'], 'question': record['q'], 'answer': str(record['a'])}\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(folder)
    record = {"clip": "a.mp4", "q": "how many?", "a": 3}
    assert row_of(folder, record, format="my_rows:map_row").messages[1]["content"] == [text("3")]
    with pytest.raises(DataError, match=r"row 1: the mapping my_rows:map_row failed with KeyError: 'q'; .* clip, a"):
        row_of(folder, {"clip": "a.mp4", "a": 3}, format="my_rows:map_row")
    with pytest.raises(DataError, match="'my_rows:other' cannot be loaded"):
        load_rows([record], format="my_rows:other")
    with pytest.raises(DataError, match="'my_rows:number' is a int"):
        load_rows([record], format="my_rows:number")
    with pytest.raises(DataError, match="'lava' is not known; did you mean 'llava'"):
        load_rows([record], format="lava")


GOOD = {"video": "a.mp4", "question": "what?", "answer": "red"}


def turns(*pairs) -> dict:
    return {"video": "a.mp4", "messages": [{"role": role, "content": content} for role, content in pairs]}


ASK = ("user", "what?")
BAD = {
    "missing video": ({**GOOD, "video": "gone.mp4"}, "there is no video file at .*gone.mp4; check the path"),
    "missing image": ({**GOOD, "image": "gone.png"}, "there is no image file at .*gone.png; check the path"),
    "folder as video": ({**GOOD, "video": "clips"}, "clips is a folder; name one file"),
    "no video": ({**GOOD, "video": None}, "'video' is empty; give a file"),
    "empty video": ({**GOOD, "video": ""}, "'video' must be the path of a file or a list of paths, got ''"),
    "number as video": ({**GOOD, "video": 3}, r"must be the path of a file or a list of paths, got 3 \(int\)"),
    "address": ({**GOOD, "video": "https://x.org/a.mp4"}, "is an address; .* download it and give its path"),
    "outside": ({**GOOD, "video": "../a.mp4"}, "lies outside of .*; move it there, or give another media_root"),
    "absolute outside": ({**GOOD, "video": "/a.mp4"}, "lies outside of"),
    "empty answer": ({**GOOD, "answer": "  "}, "the answer in message 2 is empty; write one or drop the row"),
    "no answer": ({"video": "a.mp4", "question": "what?"}, "has no answer; fill the column 'answer'"),
    "null answer": ({**GOOD, "answer": None}, "has no answer; fill the column 'answer'"),
    "no question": ({"video": "a.mp4", "answer": "red"}, "has no question; fill the column 'question'"),
    "number as answer": ({**GOOD, "answer": 3}, r"'answer' must be text, got 3 \(int\); write it in quotes"),
    "placeholder": ({**GOOD, "question": "a <|video_pad|>?"}, r"message 1 \(user\) holds the placeholder <\|video_pad"),
    "frame token": ({**GOOD, "answer": "<|frame|>"}, r"message 2 \(assistant\) holds the placeholder <\|frame\|>"),
    "end token": ({**GOOD, "question": "a<|im_end|>"}, r"holds the placeholder <\|im_end\|>"),
    "marker in answer": ({**GOOD, "answer": "<video>"}, "holds the placeholder <video>"),
    "too many markers": (
        {**GOOD, "question": "<video><video>"},
        r"holds 2 <video> marker\(s\), but the row has 1 video\(s\); write one <video> per video",
    ),
    "too few markers": ({**GOOD, "video": ["a.mp4", "b.mp4"], "question": "<video>?"}, r"holds 1 .* has 2 video\(s\)"),
    "marker without image": ({**GOOD, "question": "<image>?"}, r"holds 1 <image> marker\(s\), but the row has 0"),
    "unknown column": ({**GOOD, "qestion": "x"}, "unknown column 'qestion'; .* id, kind, video, image, messages"),
    "misspelt column": ({"vidoe": "a.mp4", **GOOD, "video": None}, "unknown column 'vidoe'"),
    "both": ({**GOOD, "messages": []}, "has both 'messages' and 'question'"),
    "empty messages": ({"messages": []}, "'messages' is empty"),
    "messages as text": ({"messages": "what?"}, r"'messages' must be a list of messages, got 'what\?' \(str\)"),
    "message as text": ({"messages": ["what?"]}, "message 1 must be an object with role and content"),
    "no assistant": (turns(ASK), "has no answer; the conversation needs an assistant message"),
    "last without answer": (turns(ASK, ("assistant", "red"), ASK), "the last question has no answer"),
    "order": (
        turns(("system", "x"), ("assistant", "red"), ASK, ("assistant", "red")),
        "roles are out of order: system, assistant, user, assistant; .* message 2 must be by the user",
    ),
    "two questions": (turns(ASK, ASK, ("assistant", "red")), "out of order: .* message 2 must be by the assistant"),
    "unknown role": (
        turns(("usr", "x"), ("assistant", "red")),
        "has the role 'usr'; did you mean 'user'. the roles are",
    ),
    "empty question": (
        {"messages": turns(("user", []), ("assistant", "red"))["messages"]},
        r"message 1 \(user\) is empty",
    ),
    "empty text": (
        {**turns(ASK, ("assistant", "a"), ("user", ""), ("assistant", "b"))},
        r"message 3 \(user\) is empty",
    ),
    "content": (
        turns(("user", 3), ("assistant", "red")),
        r"must have text or a list of parts as content, got 3 \(int\)",
    ),
    "part": (turns(("user", ["a"]), ("assistant", "b")), r"message 1 \(user\) holds the part 'a' \(str\)"),
    "part type": (turns(("user", [{"type": "vdeo"}]), ("assistant", "b")), "type 'vdeo'; did you mean 'video'"),
    "part key": (
        turns(("user", [{"type": "video", "pth": "a"}]), ("assistant", "b")),
        "has the key 'pth'; did you mean 'path'",
    ),
    "part text": (turns(("user", [{"type": "text", "text": 3}]), ("assistant", "b")), "whose text is 3"),
    "media in answer": (turns(ASK, ("assistant", [{"type": "video"}])), "only user messages may show one"),
    "parts and column": (
        turns(("user", [{"type": "video", "path": "b.mp4"}]), ("assistant", "b")),
        r"0 video part\(s\) of the messages name no file, but the column 'video' has 1",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_end_in_a_sentence(folder, name):
    record, message = BAD[name]
    with pytest.raises(DataError, match=message) as raised:
        row_of(folder, record, format="rows")
    said = str(raised.value)
    assert said.startswith("the list of rows, row 1: ") and said.endswith(".") and "\n" not in said
    assert isinstance(raised.value, MediaError) == name.startswith("missing")


def test_a_misspelt_column_is_suggested(folder):
    with pytest.raises(DataError, match="unknown column 'vidoe'; did you mean 'video'"):
        load_rows([{"vidoe": "a.mp4", "question": "what?", "answer": "red"}])
    with pytest.raises(DataError, match="unknown column 'vidoe'; did you mean 'video'"):
        load_rows(datasets.Dataset.from_list([{"vidoe": "a.mp4", "conversations": []}]))


def test_malformed_files_name_the_row(folder):
    path = write_lines(folder / "x.jsonl", [PLAIN[0], "", '{"video": "a.mp4",'])
    with pytest.raises(DataError, match=r"^x.jsonl, row 3: malformed JSON \(Expecting .*\); mend it"):
        load_rows(path)
    write_lines(path, [PLAIN[0], "[1]"])
    with pytest.raises(DataError, match="^x.jsonl, row 2: must be an object with named columns, got a list"):
        load_rows(path)
    path.write_bytes(json.dumps(PLAIN[0]).encode() + b'\n{"video": "\xff"}\n')
    with pytest.raises(DataError, match="^x.jsonl, row 2: is not UTF-8 text"):
        load_rows(path)
    path = folder / "x.json"
    path.write_text(json.dumps(PLAIN)[:-5])
    with pytest.raises(DataError, match="^x.json, row 2: malformed JSON"):
        load_rows(path)
    path.write_text(json.dumps(PLAIN).replace("}, {", "} {"))
    with pytest.raises(DataError, match="^x.json, row 1: after this object the list needs"):
        load_rows(path)
    path = folder / "x.csv"
    path.write_text("video,question,answer\na.mp4,what?,red\nb.mp4,one, two,three\n")
    with pytest.raises(DataError, match="^x.csv, row 2: has 4 cells, but the header names 3"):
        load_rows(path)
    path.write_text('video,question,answer\na.mp4,what?,"red" x\n')
    with pytest.raises(DataError, match="^x.csv, line 2: malformed CSV"):
        load_rows(path)


@pytest.mark.parametrize("content", ["", "\n\n", "[]", "video,question,answer\n"])
def test_a_source_without_rows_is_refused(folder, content):
    path = folder / ("x.csv" if "," in content else "x.json")
    path.write_text(content)
    with pytest.raises(DataError, match="holds no rows"):
        load_rows(path)


def test_damaged_data_sets_end_in_a_sentence(folder):
    whole = make_parquet(folder).read_bytes()
    # Garbage, a file that was cut, and one whose rows cannot be read behind a good footer.
    for content in (b"garbage", whole[: len(whole) // 2], whole[:40] + b"\xff" * 60 + whole[100:]):
        (folder / "bad.parquet").write_bytes(content)
        with pytest.raises(DataError, match="bad.parquet' cannot be loaded: (?!An error occurred)."):
            load_rows(folder / "bad.parquet")
    datasets.Dataset.from_list(PLAIN).save_to_disk(folder / "saved")
    (folder / "saved" / "state.json").write_text("{")
    with pytest.raises(DataError, match="saved' cannot be loaded: Expecting property name"):
        load_rows(folder / "saved")


def test_sources_that_are_not_there(folder):
    with pytest.raises(DataError, match="a path or a name on the Hub, got an empty text"):
        load_rows("")
    with pytest.raises(DataError, match="there is no file or folder at .*gone.jsonl"):
        load_rows(folder / "gone.jsonl")
    with pytest.raises(DataError, match="there is no file or folder at .*gone.jsonl"):
        load_rows("gone.jsonl")
    (folder / "x.txt").write_text("x")
    with pytest.raises(DataError, match="x.txt is no table of rows; .* .jsonl, .json, .csv, .parquet"):
        load_rows(folder / "x.txt")
    with pytest.raises(DataError, match="must be a path, a name on the Hub, a data set or a list, got int"):
        load_rows(3)
    with pytest.raises(DataError, match="'nobody/nothing' cannot be loaded"):
        load_rows("nobody/nothing")
    with pytest.raises(DataError, match="media_root='.*gone' is no folder"):
        load_rows([GOOD], media_root=str(folder / "gone"))


def test_relative_paths_need_a_folder_and_absolute_ones_do_not(folder):
    assert load_rows([{**GOOD, "video": str(folder / "a.mp4")}])[0].media == [("video", str(folder / "a.mp4"))]
    with pytest.raises(DataError, match="'a.mp4' is a relative path, and this source has no folder; give media_root"):
        load_rows([GOOD])[0]
    elsewhere = folder / "lists"
    elsewhere.mkdir()
    path = write_lines(elsewhere / "x.jsonl", [GOOD, {**GOOD, "video": str(folder / "a.mp4")}])
    assert load_rows(path)[1].media == load_rows(path, media_root=folder)[0].media
    with pytest.raises(MediaError, match="there is no video file at .*lists.a.mp4"):
        load_rows(path)[0]


def test_rows_count_as_lines_do_and_have_ids(folder):
    rows = load_rows(write_lines(folder / "x.jsonl", [GOOD, "", GOOD]))
    assert [row.where for row in rows] == ["x.jsonl, row 1", "x.jsonl, row 3"]
    assert [row.id for row in rows] == [row.where for row in rows]


def test_cells_hold_lists_as_json(folder):
    (folder / "x.csv").write_text(
        'video,question,answer,image\n"[""a.mp4"", ""b.mp4""]",same?,no,\n,what?,a cat,p.png\n'
    )
    rows = load_rows(folder / "x.csv")
    assert [Path(path).name for row in rows for _, path in row.media] == ["a.mp4", "b.mp4", "p.png"]


def test_rows_are_read_when_asked_for(folder):
    """A list of rows in memory would take more than a kilobyte each; what is kept is where they are."""
    count = 5000
    path = write_lines(folder / "x.jsonl", [{**GOOD, "answer": f"{i} " + "x" * 400} for i in range(count)])
    tracemalloc.start()
    rows = load_rows(path)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 60 * count
    assert len(pickle.dumps(rows)) < 60 * count
    assert rows[count - 1].messages[1]["content"][0]["text"].startswith("4999 ")
    copy = pickle.loads(pickle.dumps(rows))
    assert copy[-1] == rows[count - 1] and len(copy) == count
    part = rows[10:20:5]
    assert [row.where for row in part] == ["x.jsonl, row 11", "x.jsonl, row 16"]
    with pytest.raises(IndexError):
        rows[count]


def test_check_reads_every_row(folder):
    rows = load_rows(write_lines(folder / "x.jsonl", [GOOD, {**GOOD, "video": "gone.mp4"}, {**GOOD, "answer": ""}]))
    with pytest.raises(MediaError, match="row 2"):
        rows.check()
    missing = []
    with pytest.raises(DataError, match="row 3: the answer in message 2 is empty"):
        rows.check(lambda index, error: missing.append((index, Path(error.path).name)))
    assert missing == [(1, "gone.mp4")]
