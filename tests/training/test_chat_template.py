"""Which template training learns from: the processor's own, Keye's where it writes the same, or a file."""

import re

import pytest

from modeling_keye import KeyeProcessor
from modeling_keye.processing_keye import KEYE_CHAT_TEMPLATE
from tests.conversion.published import VISION_LAYOUTS, preprocessor_config, published_config, write_tokenizer
from tests.conversion.published_tokenizer import VISUAL_TEMPLATE, write_json
from tests.model.checkpoints import small_processor
from training.chat_template import mark_answers
from training.rows import DataError

UNMARKED = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", KEYE_CHAT_TEMPLATE)
# As templates of models that think: earlier thoughts are not repeated.
FORGETS = UNMARKED.replace("{{- part['text'] -}}", "{{- part['text'].split('</think>')[-1] -}}")
STRINGS = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}{% endfor %}"


@pytest.mark.compat
@pytest.mark.parametrize("layout", VISION_LAYOUTS)
def test_the_template_of_a_published_folder_gets_its_marks(layout, tmp_path):
    write_json(tmp_path / "config.json", published_config(layout))
    write_json(tmp_path / "preprocessor_config.json", preprocessor_config(layout))
    write_json(tmp_path / "chat_template.json", {"chat_template": VISUAL_TEMPLATE})
    write_tokenizer(tmp_path, layout)
    processor = KeyeProcessor.from_pretrained(tmp_path)
    assert processor.chat_template == VISUAL_TEMPLATE
    mark_answers(processor)
    assert processor.chat_template == KEYE_CHAT_TEMPLATE


def test_marks_that_are_there_stay():
    processor = small_processor()
    processor.chat_template = own = STRINGS.replace("{% endfor %}", "{% generation %}.{% endgeneration %}{% endfor %}")
    mark_answers(processor)
    assert processor.chat_template == own


@pytest.mark.parametrize("template", [FORGETS, STRINGS, UNMARKED.replace("a helpful", "an")])
def test_other_prompts_need_a_file(template, tmp_path):
    processor = small_processor()
    processor.chat_template = template
    with pytest.raises(DataError, match=r"writes other prompts than Keye's; .*`data.chat_template`"):
        mark_answers(processor)
    assert processor.chat_template == template
    file = tmp_path / "marked.jinja"
    file.write_text("{% generation %}" + template + "{% endgeneration %}")
    mark_answers(processor, file)
    assert processor.chat_template == file.read_text()


def test_a_file_that_does_not_help(tmp_path):
    file = tmp_path / "a.jinja"
    with pytest.raises(DataError, match="a.jinja' cannot be read: .*No such file"):
        mark_answers(small_processor(), file)
    file.write_text(UNMARKED)
    with pytest.raises(DataError, match="a.jinja' has no {% generation %}"):
        mark_answers(small_processor(), file)
