"""One run of a tool that makes a checkpoint folder: plan, checks, weights, other files, proof, and the final rename."""

import errno
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from tqdm import tqdm

from modeling_keye.checkpoint_keye import INDEX_NAME, Checkpoint
from modeling_keye.weights_keye import SCALE_SUFFIX

from .shard_writer import Shard, check_written, index_json, write_shards
from .staging import Staging, check_space, has_begun, refuse_occupied, refuse_other_run, refuse_unmovable

# What weights can be written in.
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Room for what is not in the plan: tokenizer, code, index.
_SPARE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Job:
    """What a tool is going to write. Making one reads headers and small files only, and refuses what it can.

    title: one line that says what is made of what. shards: the files of the model's weights. side_shards: safetensors
    files that no index names. fingerprint: sources and options that the result depends on. check: reads values which
    may be a reason to refuse; called before the first byte is written, and not again when a run resumes. write_files:
    writes every other file into the given folder, config.json last: a folder without it cannot be taken for complete.
    facts: more lines of the printed plan.
    """

    title: str
    shards: list[Shard]
    fingerprint: dict[str, str]
    write_files: Callable[[Path], None]
    side_shards: list[Shard] = field(default_factory=list)
    check: Callable[[], None] = lambda: None
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def files(self) -> list[Shard]:
        return [*self.shards, *self.side_shards]

    def summary(self) -> dict:
        """Numbers of the plan: weights with their parameters, bytes of all tensors."""
        streams = [stream for shard in self.shards for stream in shard.streams]
        streams = [stream for stream in streams if not stream.name.endswith(SCALE_SUFFIX)]
        return {
            "tensors": sum(len(shard.streams) for shard in self.files),
            "parameters": sum(stream.numel for stream in streams),
            "bytes": sum(shard.data_bytes for shard in self.files),
            "shards": len(self.shards),
        }

    def describe(self) -> list[str]:
        """The plan in lines."""
        numbers = self.summary()
        lines = [self.title, *(f"  {name}: {text}" for name, text in self.facts.items())]
        lines.append(f"  weights: {numbers['parameters']:,} parameters in {numbers['shards']} shard(s)")
        lines += [f"    {shard.file}: {len(shard.streams)} tensors, {shard.nbytes:,} bytes" for shard in self.files]
        return lines


def run_job(job: Job, dst: str | Path, *, dry_run: bool = False, progress: bool = True) -> dict:
    """Make the folder `dst`, or go on with it where an earlier run was stopped; its numbers.

    Works in DST.partial and renames it when everything is written, checked and on the disk. `dry_run` checks as much
    as can be without writing. Raises `ValueError` (also `CheckpointError`) or `OSError` with a sentence; before the
    first byte is written wherever that is possible.
    """
    started = time.perf_counter()
    dst = Path(os.path.abspath(dst))
    fingerprint = {**job.fingerprint, "plan": _plan_hash(job)}
    refuse_unmovable(dst)
    begun = has_begun(dst)
    if dry_run:
        refuse_other_run(dst, fingerprint)
    if not begun:
        refuse_occupied(dst)
        job.check()
    summary = job.summary()
    check_space(dst, sum(shard.nbytes for shard in job.files) + _SPARE_BYTES)
    if dry_run:
        return {**summary, "resumed_tensors": 0, "dry_run": True}

    with Staging.open(dst, fingerprint) as staging:
        if staging.finished:
            resumed = summary["tensors"]
        else:
            with tqdm(
                total=summary["bytes"], unit="B", unit_scale=True, desc=dst.name, disable=None if progress else True
            ) as bar:
                resumed = write_shards(staging, job.files, bar.update).resumed
            _write_rest(job, staging)
        staging.finish()
    return {**summary, "resumed_tensors": resumed, "seconds": round(time.perf_counter() - started, 1), "dry_run": False}


def _write_rest(job: Job, staging: Staging) -> None:
    names = {shard.file for shard in job.files}
    for path in staging.output.iterdir():
        # Left by a run that was stopped right here; the same files are written anew.
        if path.name not in names:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if len(job.shards) > 1:
        (staging.output / INDEX_NAME).write_text(index_json(job.shards), encoding="utf-8")
    job.write_files(staging.output)
    check_written(job.shards, Checkpoint.open(staging.output), staging.output)
    for shard in job.side_shards:
        check_written([shard], Checkpoint.open(staging.output / shard.file), staging.output)


def _plan_hash(job: Job) -> str:
    """Changes with names, order, shapes, dtypes and places of the tensors, so with the code that plans them."""
    digest = hashlib.sha256()
    for shard in job.files:
        digest.update(shard.file.encode() + shard.header)
    return digest.hexdigest()[:16]


def run_command(call: Callable[[], dict]) -> int:
    """The exit code of a tool: prints what `call` returns as one JSON line, or an error as a sentence.

    0 done, 1 refused or failed, 130 interrupted.
    """
    try:
        print(json.dumps(call()))
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on where this one stopped.", file=sys.stderr)
        return 130
    except StrictDataclassError as error:
        print(f"error: config.json has a value that cannot be: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = " Free some space; the same command then goes on where this one stopped."
        print(f"error: {error}{'.' + hint if full else ''}", file=sys.stderr)
        return 1
    return 0
