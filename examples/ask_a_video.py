"""Ask a question about a video with the Auto classes: `python examples/ask_a_video.py CLIP.mp4 "QUESTION" [FOLDER]`."""

import argparse
from pathlib import Path

from transformers import AutoModel, AutoProcessor

EMBEDDED = Path(__file__).resolve().parent.parent / "checkpoints" / "keye-tiny"


def ask(video: str, question: str, folder: str = str(EMBEDDED)) -> str:
    """The answer of the model in `folder` to `question` about the file `video`."""
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    content = [{"type": "video", "path": video}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    answer = model.generate(**inputs)
    return processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a question about a video with the Auto classes.")
    parser.add_argument("video", help="a video file")
    parser.add_argument("question", help="the question, in quotation marks")
    parser.add_argument("folder", nargs="?", default=str(EMBEDDED), help="of a checkpoint (default: keye-tiny)")
    options = parser.parse_args()
    if not Path(options.folder).is_dir():
        parser.error(f"there is no folder {options.folder}; give the folder of a checkpoint")
    try:
        print(ask(options.video, options.question, options.folder))
    except (OSError, ValueError) as error:  # a video or a checkpoint that cannot be read
        reason = " ".join(str(error).split())
        parser.error(f"no answer about {options.video} from the model in {options.folder}: {reason}")


if __name__ == "__main__":
    main()
