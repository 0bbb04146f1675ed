"""Text, images and videos to model inputs: placeholder expansion, chat template, checks. No torchvision."""

import inspect
import os
from collections.abc import Callable
from typing import Any

from transformers import __version__ as transformers_version
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

try:
    # Matches the control tokens that `sanitize_control_tokens` marked in the words of a user.
    from transformers.processing_utils import _MARKED_RE
except ImportError:
    # A release that does not know the option, which `apply_chat_template` then refuses.
    _MARKED_RE = None

from .frame_budget_keye import FAST
from .image_processing_keye import KeyeImageProcessor, KeyeImagesKwargs, flatten_images
from .layouts_keye import Layout
from .messages_keye import IMAGE_PAD, VIDEO_PAD, checked_messages
from .published_config_keye import our_config
from .published_processor_keye import (
    HUB_OPTIONS,
    lacks_processor,
    load_tokenizer,
    published_source,
    read_chat_templates,
    read_image_settings,
)
from .video_processing_keye import KeyeVideoMetadata, KeyeVideoProcessor, KeyeVideosKwargs, flatten_videos

VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
FRAME, FAST_START, FAST_END = "<|frame|>", "<|fast_start|>", "<|fast_end|>"

# What the assistant says, with the token that ends it, stands in generation marks: that is what training learns from.
KEYE_CHAT_TEMPLATE = """\
{%- set count = namespace(image=0, video=0) -%}
{%- macro render(content) -%}
{%- if content is string -%}
{{- content -}}
{%- else -%}
{%- for part in content or [] -%}
{%- if part['type'] == 'image' -%}
{%- set count.image = count.image + 1 -%}
{{- 'Picture ' ~ count.image ~ ': ' if add_vision_id -}}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'video' -%}
{%- set count.video = count.video + 1 -%}
{{- 'Video ' ~ count.video ~ ': ' if add_vision_id -}}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- if messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' ~ message['role'] ~ '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}
{{- render(message['content']) ~ '<|im_end|>' -}}
{%- endgeneration -%}
{%- else -%}
{{- render(message['content']) ~ '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


class KeyeProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: KeyeImagesKwargs
    videos_kwargs: KeyeVideosKwargs
    _defaults = {
        "text_kwargs": {"padding": False, "return_mm_token_type_ids": True},
        "videos_kwargs": {"return_metadata": True},
    }


class KeyeProcessor(ProcessorMixin):
    """A tokenizer, an image processor and a video processor behind one call.

    The result holds `input_ids`, `attention_mask`, `mm_token_type_ids` (0 text, 1 image, 2 video) and, where there are
    images or videos, `pixel_values` with `image_grid_thw`, `pixel_values_videos` with `video_grid_thw`; with
    `return_metadata=True` also `video_metadata`: one `KeyeVideoMetadata` per video (`frames_indices`, `timestamps`).

    Every image or video stands in the text as one `<|image_pad|>` or `<|video_pad|>`. A frame becomes `<|frame|>`, its
    time ("12.5"), and one `<|video_pad|>` per token; fast frames stand between `<|fast_start|>` and `<|fast_end|>`. The
    family "keye_vl_preview" writes the placeholders of a video in one piece, without times.
    """

    valid_processor_kwargs = KeyeProcessorKwargs
    return_mm_token_type_ids = True
    image_token = IMAGE_PAD
    video_token = VIDEO_PAD

    def __init__(self, tokenizer=None, image_processor=None, video_processor=None, chat_template=None):
        if tokenizer is None:
            raise ValueError("KeyeProcessor needs a tokenizer; load it with AutoTokenizer.from_pretrained.")
        video_processor = KeyeVideoProcessor() if video_processor is None else video_processor
        self.check_argument_for_proper_class("video_processor", video_processor)
        if image_processor is None:
            image_processor = KeyeImageProcessor(family=video_processor.family)
        vocabulary = tokenizer.get_vocab()
        needed = [VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD]
        budget = video_processor.budget()
        needed += [FRAME] * budget.timestamps + [FAST_START, FAST_END] * budget.slow_fast
        missing = [token for token in needed if token not in vocabulary]
        if missing:
            raise ValueError(
                f"the tokenizer lacks {', '.join(missing)}, which family={video_processor.family!r} writes into the "
                'prompt; add them with tokenizer.add_special_tokens({"additional_special_tokens": [...]}).'
            )
        self.image_token_id = vocabulary[IMAGE_PAD]
        self.video_token_id = vocabulary[VIDEO_PAD]
        super().__init__(tokenizer, image_processor, video_processor, chat_template=chat_template or KEYE_CHAT_TEMPLATE)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "KeyeProcessor":
        """As `ProcessorMixin.from_pretrained`; the files of a published Keye checkpoint are understood too.

        Settings of the image and video processor go to these, `chat_template` to the processor, others to the
        tokenizer. `trust_remote_code` has no effect on published checkpoints: their code is never run.

        Raises `ValueError` when tokenizer and `config.json` disagree or lack the tokens that stand for media.
        """
        hub = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}
        source = published_source(pretrained_model_name_or_path, hub)
        if source is None:
            if lacks_processor(pretrained_model_name_or_path, hub):
                raise ValueError(
                    f"{pretrained_model_name_or_path} holds a model but no processor_config.json. Save the processor "
                    "beside the model, or, for the decoder of a text checkpoint, put the published one under a vision "
                    "tower with `python -m conversion.compose`."
                )
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        layout, raw, hub = source
        settings = {name: value for name, value in kwargs.items() if name not in HUB_OPTIONS and name[0] != "_"}
        for name in ("trust_remote_code", "code_revision", "use_fast"):
            settings.pop(name, None)
        template = settings.pop("chat_template", None)
        for_images = read_image_settings(pretrained_model_name_or_path, raw, hub)
        for_videos = {name: value for name, value in for_images.items() if name not in _FOR_STILLS}
        for_images.update({name: settings[name] for name in KeyeImagesKwargs.__annotations__ if name in settings})
        if layout.family == "keye_vl_preview" and "min_pixels" in for_images and "max_pixels" in for_images:
            # The published processor puts the frames, sized by then, through its rule for images.
            for_videos["resize_again"] = [for_images["min_pixels"], for_images["max_pixels"]]
        for_videos.update({name: settings[name] for name in KeyeVideosKwargs.__annotations__ if name in settings})
        for_tokenizer = {k: v for k, v in settings.items() if k not in for_images and k not in for_videos}
        # Prompts of one batch end together, or `generate` would go on behind the padding of the shorter ones.
        for_tokenizer.setdefault("padding_side", "left")
        tokenizer = load_tokenizer(pretrained_model_name_or_path, layout, hub, for_tokenizer)
        _check_tokens(tokenizer, layout, our_config(raw), pretrained_model_name_or_path)
        if template is None:
            template = _media_template(read_chat_templates(pretrained_model_name_or_path, hub), tokenizer)
        return cls(
            tokenizer,
            KeyeImageProcessor(**{"family": layout.family, **for_images}),
            KeyeVideoProcessor(**{"family": layout.family, **for_videos}),
            chat_template=template,
        )

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs) -> BatchFeature:
        images, images_by_prompt = _by_prompt(images, flatten_images)
        videos, videos_by_prompt = flatten_videos(videos)
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            if kwargs.get("sanitize_control_tokens") and _MARKED_RE is not None:
                texts = [_MARKED_RE.sub("", sample) if isinstance(sample, str) else sample for sample in texts]
            self._check_counts("image", texts, images, images_by_prompt)
            per_prompt = self._check_counts("video", texts, videos, videos_by_prompt)
            sharing = [count for count in per_prompt for _ in range(count)]
        else:
            sharing = [count for count in videos_by_prompt or [len(videos)] for _ in range(count)]
        if videos:
            nested = dict(kwargs.get("videos_kwargs") or {})
            nested["videos_per_prompt"] = sharing
            for place in (kwargs, nested):
                if callable(place.get("progress")):
                    place["progress"] = _Uncopied(place["progress"])
            kwargs = {**kwargs, "videos_kwargs": nested}
        return super().__call__(images=images or None, text=text, videos=videos or None, **kwargs)

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs) -> Any:
        """As `ProcessorMixin.apply_chat_template`, for parts of type text, image and video.

        `image_url` and `video_url`, as in OpenAI's messages, are taken as image and video; parts of other types are
        refused, and text that holds `<|image_pad|>` or `<|video_pad|>`, in capitals too.

        Other control tokens in the text of a message work: `<|im_end|>` ends the turn, so a stranger's words could go
        on as the assistant. `sanitize_control_tokens=True` (not in every release of transformers that this runs with)
        makes plain text of all of them, of the placeholders too; a tokenizer that knows no other spelling of one, as
        keye-tiny's, refuses it. `keye ask` and the training rows refuse them.
        """
        known = inspect.signature(ProcessorMixin.apply_chat_template).parameters
        sanitize = bool(kwargs.get("sanitize_control_tokens"))
        if sanitize and "sanitize_control_tokens" not in known:
            # It would go to the template, where nobody looks at it.
            raise ValueError(
                f"transformers {transformers_version} does not know sanitize_control_tokens; install 5.23, or take the "
                "control tokens out of the messages yourself."
            )
        # Images may come beside the messages, in `processor_kwargs`.
        apart = "images" in (kwargs.get("processor_kwargs") or {})
        loads = bool(kwargs.get("tokenize")) and not apart
        conversation = checked_messages(conversation, self.tokenizer, sanitize, loads)
        masks = kwargs.get("return_assistant_tokens_mask") and kwargs.get("tokenize") and kwargs.get("return_dict")
        if sanitize or not masks:
            return super().apply_chat_template(conversation, chat_template, **kwargs)
        # Older versions of the library do not know that a placeholder grew, and mark the wrong tokens.
        del kwargs["return_assistant_tokens_mask"]
        options = dict(kwargs.pop("processor_kwargs", None) or {})
        options.update(return_offsets_mapping=True, return_text_replacement_offsets=True)
        features = super().apply_chat_template(conversation, chat_template, processor_kwargs=options, **kwargs)
        batched = isinstance(conversation[0], (list, tuple))
        _, spans = render_jinja_template(
            conversations=conversation if batched else [conversation],
            chat_template=chat_template or self.chat_template,
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **{k: v for k, v in kwargs.items() if k not in known}},
        )
        features["assistant_masks"] = _assistant_masks(
            features.pop("offset_mapping"), features.pop("text_replacement_offsets"), spans
        )
        if kwargs.get("return_tensors") not in (None, "auto"):
            features.convert_to_tensors(tensor_type=kwargs["return_tensors"])
        return features

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        # The library looks its base class for videos up in a place that is empty without torchvision.
        if argument_name != "video_processor":
            return super().check_argument_for_proper_class(argument_name, argument)
        # Loading from a folder makes a second copy of every class, so the class itself cannot be compared.
        if not callable(getattr(argument, "budget", None)):
            raise TypeError(f"video_processor must be a KeyeVideoProcessor, got {type(argument).__name__}.")
        return type(argument)

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        if text is not None:
            text = [text] if isinstance(text, str) else list(text)
        return self.image_processor.fetch_images(images) if images is not None else None, text, videos, audio

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs) -> None:
        if images is None and text is None and videos is None:
            raise ValueError("give at least one of text, images and videos.")
        if audio is not None:
            raise ValueError("Keye models do not hear; remove the audio.")

    def _process_images(self, images: list, **kwargs) -> tuple[BatchFeature, list[str]]:
        features = self.image_processor(images, **kwargs)
        return features, [self.replace_image_token(features, index) for index in range(len(images))]

    def _process_videos(self, videos: list, **kwargs) -> tuple[BatchFeature, list[str]]:
        kwargs["return_metadata"] = True
        features = self.video_processor(videos, **kwargs)
        timestamps = self.video_processor.budget(family=kwargs.get("family")).timestamps
        return features, [
            self.replace_video_token(features, index, timestamps=timestamps) for index in range(len(videos))
        ]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return IMAGE_PAD * (int(image_inputs["image_grid_thw"][image_idx].prod()) // self.image_processor.merge_size**2)

    def replace_video_token(self, video_inputs: dict, video_idx: int, timestamps: bool | None = None, **kwargs) -> str:
        if timestamps is None:
            timestamps = self.video_processor.budget().timestamps
        metadata: KeyeVideoMetadata = video_inputs["video_metadata"][video_idx]
        merge = self.video_processor.merge_size**2
        counts = [height * width // merge for height, width in metadata.frame_grids]
        if not timestamps:
            return VIDEO_PAD * sum(counts)
        pieces = []
        for number, count in enumerate(counts):
            seconds = "" if metadata.timestamps is None else f"{metadata.timestamps[number]:.1f}"
            pads = VIDEO_PAD * count
            if metadata.frame_types[number] == FAST:
                pads = FAST_START + pads + FAST_END
            pieces.append(FRAME + seconds + pads)
        return "".join(pieces)

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "mm_token_type_ids"]

    def _get_num_multimodal_tokens(self, image_sizes=None, video_sizes=None, **kwargs) -> MultiModalData:
        """Placeholder tokens per image of size (height, width) and per video of size (chosen frames, height, width)."""
        counts = {}
        if image_sizes is not None:
            options = {**kwargs, **kwargs.get("images_kwargs", {})}
            patches = [self.image_processor.get_number_of_image_patches(*size, options) for size in image_sizes]
            counts["num_image_patches"] = patches
            counts["num_image_tokens"] = [count // self.image_processor.merge_size**2 for count in patches]
        if video_sizes is not None:
            options = {**kwargs, **kwargs.get("videos_kwargs", {})}
            patches = [self.video_processor.get_num_of_video_patches(*size, options) for size in video_sizes]
            counts["num_video_tokens"] = [count // self.video_processor.merge_size**2 for count in patches]
        return MultiModalData(**counts)

    def _check_counts(self, kind: str, texts: list[str], media: list, by_prompt: list[int] | None) -> list[int]:
        """Placeholders of this kind per prompt; they must match the media given."""
        if not all(isinstance(sample, str) for sample in texts):
            raise ValueError("text must be a string or a list of strings.")
        token = IMAGE_PAD if kind == "image" else VIDEO_PAD
        found = [sample.count(token) for sample in texts]
        if by_prompt is None or len(by_prompt) != len(texts):
            wrong = None if sum(found) == len(media) else (sum(found), len(media), "")
        else:
            pairs = zip(found, by_prompt, strict=True)
            wrong = next(((a, b, f" of prompt {i}") for i, (a, b) in enumerate(pairs) if a != b), None)
        if wrong is not None:
            raise ValueError(
                f"the text{wrong[2]} holds {wrong[0]} {token} placeholder(s), but {wrong[1]} {kind}(s) were given; "
                f"write {VISION_START}{token}{VISION_END} once per {kind} and keep {token} out of all other text."
            )
        return found


# Settings of a published image processor that do not hold for videos, whose frames are sized by other rules.
_FOR_STILLS = ("min_pixels", "max_pixels", "resample", "do_resize")

# Rewrites messages so that a template which only knows strings writes the placeholders of images and videos.
_FLATTEN_CONTENT = """\
{%- set flat = namespace(messages=[], text='') -%}
{%- for message in messages -%}
{%- if message['content'] is string or message['content'] is none -%}
{%- set flat.messages = flat.messages + [message] -%}
{%- else -%}
{%- set flat.text = '' -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{%- set flat.text = flat.text ~ '<|vision_start|><|image_pad|><|vision_end|>' -%}
{%- elif part['type'] == 'video' -%}
{%- set flat.text = flat.text ~ '<|vision_start|><|video_pad|><|vision_end|>' -%}
{%- elif 'text' in part -%}
{%- set flat.text = flat.text ~ part['text'] -%}
{%- endif -%}
{%- endfor -%}
{%- set flat.messages = flat.messages + [dict(message, content=flat.text)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""


def _media_template(templates: list[str], tokenizer: Any) -> str:
    """A chat template that writes placeholders: the checkpoint's own, else the one for the tokenizer at hand."""
    for template in templates:
        if VIDEO_PAD in template:
            return template
    # What the tokenizer brings along is made for text; a tokenizer without <|im_start|> has no other markup though.
    if "<|im_start|>" in tokenizer.get_vocab():
        return KEYE_CHAT_TEMPLATE
    text_only = templates[0] if templates else tokenizer.chat_template
    if not isinstance(text_only, str):
        raise ValueError(
            "this checkpoint has no chat template, and its tokenizer lacks <|im_start|>, which the template of the "
            "other Keye models needs; pass chat_template=..."
        )
    return _FLATTEN_CONTENT + text_only


def _check_tokens(tokenizer: Any, layout: Layout, config: dict, source: str | os.PathLike) -> None:
    vocabulary = tokenizer.get_vocab()
    tokens = {
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
        "image_token_id": IMAGE_PAD,
        "video_token_id": VIDEO_PAD,
    }
    missing = [token for token in tokens.values() if token not in vocabulary]
    if missing and not layout.has_vision:
        raise ValueError(
            f"{source} is a text checkpoint ({layout.name}): its tokenizer lacks {', '.join(missing)}. "
            "`python -m conversion.compose` puts its decoder under a vision tower and adds them."
        )
    if missing:
        raise ValueError(
            f"the tokenizer of {source} lacks {', '.join(missing)}; take it from the published checkpoint."
        )
    for name, token in tokens.items():
        if vocabulary[token] != config[name]:
            raise ValueError(
                f"config.json of {source} says `{name}` {config[name]}, but its tokenizer gives {token} the id "
                f"{vocabulary[token]}; take both from the same checkpoint."
            )


class _Uncopied:
    """A callable that stays itself when the library copies the keyword arguments it travels in."""

    def __init__(self, call: Callable[[int, int], None]):
        self._call = call

    def __call__(self, done: int, total: int) -> None:
        self._call(done, total)

    def __deepcopy__(self, memo: dict) -> "_Uncopied":
        return self


def _by_prompt(media: Any, flatten: Callable[[Any], list]) -> tuple[list, list[int] | None]:
    nested = isinstance(media, (list, tuple)) and len(media) > 0 and all(isinstance(m, (list, tuple)) for m in media)
    return flatten(media), [len(flatten(item)) for item in media] if nested else None


def _assistant_masks(
    offsets: Any, replacements: list[list[dict]], spans: list[list[tuple[int, int]]]
) -> list[list[int]]:
    """1 for each token of the expanded text that overlaps a span of the text before expansion."""
    masks = []
    for tokens, grown, wanted in zip(offsets, replacements, spans, strict=True):
        moved = []
        for start, end in wanted:
            before = [item for item in grown if item["span"][1] <= start]
            inside = [item for item in grown if item["span"][1] <= end]
            shift = before[-1]["new_span"][1] - before[-1]["span"][1] if before else 0
            end_shift = inside[-1]["new_span"][1] - inside[-1]["span"][1] if inside else 0
            moved.append((start + shift, end + end_shift))
        masks.append([int(any(a < end and b > start for start, end in moved)) for a, b in _pairs(tokens)])
    return masks


def _pairs(tokens: Any) -> list:
    return tokens.tolist() if hasattr(tokens, "tolist") else tokens


__all__ = ["KEYE_CHAT_TEMPLATE", "KeyeProcessor"]
