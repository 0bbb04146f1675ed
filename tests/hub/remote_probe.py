"""Runs in a process of its own, where our package cannot be imported: loads checkpoint folders as remote code.

`python remote_probe.py REQUEST` with a JSON object {"steps": [[name, {arguments}], ...], "absent": [packages]}; the
last line printed is a JSON list, one result per step.
"""

import json
import sys

request = json.loads(sys.argv[1])
# What Python does for a name that maps to None: an import fails as if it were not installed, `find_spec` says None.
sys.modules.update(dict.fromkeys(request["absent"]))

import torch  # noqa: E402 the absent packages come first
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)

AUTO_MODELS = {
    "AutoModel": AutoModel,
    "AutoModelForImageTextToText": AutoModelForImageTextToText,
    "AutoModelForMultimodalLM": AutoModelForMultimodalLM,
}


def question(clip: str) -> list[dict]:
    content = [{"type": "video", "path": clip}, {"type": "text", "text": "what is it?"}]
    return [{"role": "user", "content": content}]


def answer(model, processor, clip: str) -> list[int]:
    inputs = processor.apply_chat_template(
        question(clip),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"num_frames": 4},
    )
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def load(folder: str, clip: str, auto_class: str = "AutoModel") -> dict:
    model = AUTO_MODELS[auto_class].from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    return {
        "classes": {
            part.__name__: part.__module__.split(".")[0] for part in (type(model), type(processor), type(config))
        },
        "tokens": answer(model, processor, clip),
        "ids": AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("a red ball").input_ids,
        "runs": [
            model.model.language_model.config._attn_implementation,
            model.model.visual.config._attn_implementation,
            model.model.language_model.config._experts_implementation,
        ],
    }


def load_eager(folder: str, clip: str) -> list[list[int]]:
    """Answers under eager attention and experts, asked for at load and switched later."""
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(
        folder, trust_remote_code=True, attn_implementation="eager", experts_implementation="eager"
    )
    tokens = [answer(model, processor, clip)]
    model.set_attn_implementation({"text_config": "keye_sparse", "vision_config": "sdpa"})
    return [*tokens, answer(model, processor, clip)]


def resave(folder: str, to: str) -> None:
    AutoModel.from_pretrained(folder, trust_remote_code=True).save_pretrained(to)
    AutoProcessor.from_pretrained(folder, trust_remote_code=True).save_pretrained(to)


def resave_model_only(folder: str, to: str) -> None:
    AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).save_pretrained(to)


def load_model_only(folder: str) -> str:
    return type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__


def run_pipeline(folder: str, clip: str) -> str:
    ask = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
    output = ask(
        text=question(clip),
        max_new_tokens=8,
        generate_kwargs={"do_sample": False},
        return_full_text=False,
        processor_kwargs={"num_frames": 4},
    )
    return output[0]["generated_text"]


def decode(folder: str, tokens: list[int]) -> str:
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    return processor.decode(tokens, skip_special_tokens=True)


def two_copies(first: str, second: str, clip: str) -> dict:
    """Two repositories with the same code in one process; each keeps its own weights."""
    models = [AutoModel.from_pretrained(folder, trust_remote_code=True) for folder in (first, second)]
    processors = [AutoProcessor.from_pretrained(folder, trust_remote_code=True) for folder in (first, second)]
    pairs = list(zip(models, processors, strict=True))
    tokens = [answer(model, processor, clip) for model, processor in pairs]
    return {"modules": [type(model).__module__ for model in models], "tokens": tokens}


def beside_package(package_root: str, folder: str, clip: str) -> dict:
    """The package in the same process, before and after the remote code; both must give the same answer."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    remote_class = get_class_from_dynamic_module("modeling_keye.KeyeForVideoQA", folder)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    remote = remote_class.from_pretrained(folder)
    before = answer(remote, processor, clip)
    sys.path.insert(0, package_root)
    import modeling_keye

    local = modeling_keye.KeyeForVideoQA.from_pretrained(folder)
    auto = AutoModel.from_pretrained(folder, trust_remote_code=True)
    own_processor = modeling_keye.KeyeProcessor.from_pretrained(folder)
    return {
        "remote": remote_class.__module__.split(".")[0],
        "auto": type(auto).__module__,
        "tokens": [
            before,
            answer(local, own_processor, clip),
            answer(auto, own_processor, clip),
            answer(remote, processor, clip),
        ],
    }


def imported(names: list[str]) -> list[str]:
    return [name for name in names if sys.modules.get(name) is not None]


torch.set_num_threads(1)
steps = {name: step for name, step in globals().items() if callable(step)}
print(json.dumps([steps[name](**arguments) for name, arguments in request["steps"]]))
