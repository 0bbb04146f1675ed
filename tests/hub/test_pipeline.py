"""`pipeline("image-text-to-text")` through the package; as remote code it is in `test_remote_code.py`."""

import pytest
from PIL import Image
from transformers import pipeline

from tests.model.checkpoints import encode, question, small_model, small_processor

pytestmark = pytest.mark.compat


@pytest.fixture(scope="module")
def ask(saved_folder):
    run = pipeline("image-text-to-text", model=str(saved_folder))

    def ask(text: list, **kwargs):
        generation = {"do_sample": False, "max_new_tokens": 5}  # a new one each time: the pipeline writes into it
        return run(text=text, generate_kwargs=generation, return_full_text=False, **kwargs)

    return ask


def expected_answer(inputs) -> str:
    output = small_model().generate(**inputs, max_new_tokens=5, do_sample=False)
    return small_processor().decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def picture_question(colour: str) -> list[dict]:
    image = Image.new("RGB", (64, 48), colour)
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what is it?"}]}]


def test_pipeline_video_message(ask, clip):
    answer = ask(question(clip), processor_kwargs={"num_frames": 4})
    assert answer[0]["generated_text"] == expected_answer(encode(small_processor(), clip))


def test_pipeline_image_message(ask):
    message = picture_question("red")
    inputs = small_processor().apply_chat_template(
        message, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert ask(message)[0]["generated_text"] == expected_answer(inputs)


def test_pipeline_several_messages(ask):
    messages = [picture_question(colour) for colour in ("red", "blue")]
    together = ask(messages)
    alone = [ask(message) for message in messages]
    assert [answer[0]["generated_text"] for answer in together] == [answer[0]["generated_text"] for answer in alone]
