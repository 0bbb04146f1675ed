"""Loads a checkpoint as a stranger would: `python publish_probe.py REQUEST.json`, in a process of its own.

Our packages cannot be imported here, whether they are installed or not, so everything comes from the checkpoint's own
files. The request is a JSON object:

    source, revision: a folder, or a repository with a commit
    absent: packages to hide
    weights: false builds the model without memory and reports names and shapes only
    output: where the logits go (safetensors)

The last line printed is a JSON object with what was found.
"""

import json
import sys
from pathlib import Path

request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
# What Python does for a name that maps to None: an import fails as if it were not installed, `find_spec` says None.
sys.modules.update(dict.fromkeys(request["absent"]))

import numpy as np  # noqa: E402 the absent packages come first
import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoConfig, AutoModel, AutoProcessor  # noqa: E402

SEED = 0
PROMPT_TOKENS = 24
NEW_TOKENS = 4
FRAMES = 4
SIDE = 56
QUESTION = "<|vision_start|><|video_pad|><|vision_end|>What is shown?"

WHERE = {"pretrained_model_name_or_path": request["source"], "revision": request["revision"], "trust_remote_code": True}


def random_prompt(config) -> torch.Tensor:
    """Token ids [1, PROMPT_TOKENS] that no special meaning is known of."""
    text = config.get_text_config()
    special = {getattr(config, f"{name}_token_id", None) for name in ("image", "video", "vision_start", "vision_end")}
    special |= {getattr(text, f"{name}_token_id", None) for name in ("bos", "pad")}
    ends = text.eos_token_id if isinstance(text.eos_token_id, list) else [text.eos_token_id]
    allowed = np.array([number for number in range(text.vocab_size) if number not in {*special, *ends}])
    chosen = np.random.default_rng(SEED).choice(allowed, size=(1, PROMPT_TOKENS))
    return torch.from_numpy(chosen)


def random_video() -> list[np.ndarray]:
    frames = np.random.default_rng(SEED).integers(0, 256, (FRAMES, SIDE, SIDE, 3), dtype=np.uint8)
    return list(frames)


@torch.no_grad()
def answer(model, inputs: dict) -> tuple[torch.Tensor, list[int]]:
    """Logits of a prompt, and the tokens that greedy generation adds to it."""
    logits = model(**inputs).logits
    tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    return logits.contiguous(), tokens[0, inputs["input_ids"].shape[1] :].tolist()


def run() -> dict:
    model, report = AutoModel.from_pretrained(**WHERE, dtype="auto", output_loading_info=True)
    model.eval()
    prompt = random_prompt(model.config)
    inputs = {"text": {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}}
    if request["processor"]:
        processor = AutoProcessor.from_pretrained(**WHERE)
        times = [float(number) for number in range(FRAMES)]
        inputs["video"] = processor(
            text=[QUESTION], videos=[random_video()], videos_kwargs={"timestamps": times}, return_tensors="pt"
        )
        inputs["video"].pop("video_metadata", None)
    logits, tokens = {}, {}
    for name, prompt in inputs.items():
        logits[name], tokens[name] = answer(model, dict(prompt))
    save_file(logits, request["output"])
    return {
        "class": type(model).__name__,
        "module": type(model).__module__.split(".")[0],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "tokens": tokens,
        **{kind: sorted(str(name) for name in report.get(f"{kind}_keys") or ()) for kind in ("missing", "unexpected")},
        "mismatched": sorted(str(entry) for entry in report.get("mismatched_keys") or ()),
    }


def build() -> dict:
    config = AutoConfig.from_pretrained(**WHERE)
    with torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=True)
    tied = getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or {}
    return {
        "class": type(model).__name__,
        "module": type(model).__module__.split(".")[0],
        "shapes": {name: list(tensor.shape) for name, tensor in model.state_dict().items()},
        "tied": sorted(tied) if getattr(config, "tie_word_embeddings", False) else [],
    }


if __name__ == "__main__":
    found = run() if request["weights"] else build()
    found |= {"torch": torch.__version__, "transformers": transformers.__version__, "device": "cpu"}
    print(json.dumps(found))
