"""One of two processes that train on half a batch each: `torchrun --nproc-per-node 2 -m tests.training.indexer_ranks
FILE`.

The gradients of both ranks together are compared to those of one process; what came out goes to `FILE`.
"""

import itertools
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.model.factories import text_ids, tiny_model


def gradients(model, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model(ids, labels=ids, use_cache=False).loss.backward()
    grads = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}


def compare(wrapper: str, kind: str, stage: str) -> dict:
    """Largest relative error of a gradient, and how many parameters of indexers have one."""
    settings = {"indexer_loss_coef": 0.5, "indexer_stage": stage, "mlp_layer_types": ["dense"] * 3}
    ids = text_ids(2, 40)
    expected = gradients(tiny_model(kind, **settings).train(), ids)
    model = tiny_model(kind, **settings).train()
    # Pixels are not there, and DDP waits for every parameter that asks for a gradient.
    model.model.visual.requires_grad_(False)
    model.model.projector.requires_grad_(False)
    if wrapper == "ddp":
        model = DistributedDataParallel(model)
    else:
        for layer in model.model.language_model.layers:
            fully_shard(layer)
        fully_shard(model)
    rank = dist.get_rank()
    actual = gradients(model, ids[rank : rank + 1])
    if actual.keys() != expected.keys():
        raise RuntimeError(f"{kind} {stage}: {sorted(actual.keys() ^ expected.keys())} differ")
    return {
        "case": f"{wrapper} {kind} {stage}",
        "error": max(((actual[name] - grad).norm() / grad.norm()).item() for name, grad in expected.items()),
        "indexer": sum(".indexer." in name for name in actual),
    }


def main(file: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    cases = itertools.product(("ddp", "fsdp2"), ("mla", "gqa"), ("warmup", "adaptation"))
    results = [compare(*case) for case in cases]
    if dist.get_rank() == 0:
        file.write_text(json.dumps(results))
    # Wrapped models are gone by now: one that outlives its group can hang at the end of the process.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
