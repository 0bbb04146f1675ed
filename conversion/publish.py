"""Put a checkpoint folder on the Hub, and prove that what arrived is what was sent.

    python -m conversion.publish FOLDER NAMESPACE/NAME [--private] [--revision BRANCH] [--dry-run]

First all that can be checked without the network (`publish_checks.py`), then the upload (`publish_upload.py`): an
interrupted one goes on where it stopped when the same command runs again, and one commit holds everything, so that the
repository never looks complete when it is not. At last that commit is downloaded into an empty cache: every file must
have the same sha256, and the model must give the same logits and tokens as the local one, each in a clean process.

Exit codes: 0 published and verified (or, with --dry-run, ready), 1 a check or the verification failed, 2 it could not
be done (one sentence on stderr says why and what to do), 130 interrupted.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import HfApi, constants, get_token
from safetensors.torch import load_file

from modeling_keye import __version__

from .publish_checks import Check, ProbeError, check_folder, describe_probe, human, list_files, run_probe
from .publish_upload import LocalFile, PublishError, Uploaded, check_target, insist, upload

DONE, WRONG, IMPOSSIBLE, INTERRUPTED = 0, 1, 2, 130


@dataclass
class Report:
    """What was found and done. `checks` are in order; the rest is empty until there is something to say.

    files: size and sha256 by name. environment: versions and device of the process that loaded the folder. generated:
    it generated tokens. verified: the same logits came out of the downloaded files.
    """

    folder: str
    command: str
    checks: list[Check] = field(default_factory=list)
    files: dict[str, dict] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    generated: bool = False
    uploaded: Uploaded | None = None
    verified: bool = False

    @property
    def ok(self) -> bool:
        """No check failed; what was not checked does not count."""
        return all(check.ok is not False for check in self.checks)

    def to_json(self) -> dict:
        return {"kind": "publish", "passed": self.ok, **asdict(self)}


def publish(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str = constants.DEFAULT_REVISION,
    message: str | None = None,
    dry_run: bool = False,
    allow: Iterable[str] = (),
    trust_code: bool = False,
    cache: str | Path | None = None,
    token: str | None = None,
    command: str = "conversion.publish.publish(...)",
    say: Callable[[str], None] = print,
) -> Report:
    """Check, upload and verify.

    Args:
        folder: a checkpoint folder in our layout, with code, processor and card.
        repo: "NAMESPACE/NAME", or "NAME" in the namespace of the token; made if it does not exist.
        private: make the repository private; one that exists and is public is refused.
        revision: branch to commit to; made from the main branch if it does not exist.
        dry_run: only check; nothing is sent and the Hub is not asked anything.
        allow: patterns of further file names that may be published.
        trust_code: accept code that differs from this package's; it is run.
        cache: empty or absent folder for the download; default a temporary one, removed afterwards.
        token: default the one that huggingface_hub knows.

    Returns a report; `report.ok` is False when a check failed, and then nothing was sent, or when the verification did.
    Raises `PublishError` where the Hub refuses or cannot be reached, and when somebody else commits in between.
    """
    folder = Path(folder)
    check_target(repo, revision)
    report = Report(folder.name or str(folder), command)
    with tempfile.TemporaryDirectory(prefix="keye-publish-") as temporary:
        work = Path(temporary)
        logits = work / "local.safetensors"
        try:
            checks, found = check_folder(folder, allow, trust_code, logits)
        except NotADirectoryError as error:
            raise PublishError(str(error)) from error
        for check in checks:
            _note(report, check, say)
        if not report.ok:
            return report
        names = list_files(folder)
        report.generated = "tokens" in found
        report.environment = {name: found[name] for name in ("device", "torch", "transformers")}
        files = {name: LocalFile.read(folder, name) for name in names}
        report.files = {name: {"size": file.size, "sha256": file.sha256} for name, file in files.items()}
        total = sum(file.size for file in files.values())
        if dry_run:
            for file in sorted(files.values(), key=lambda file: -file.size):
                say(f"{human(file.size):>12}  {file.name}")
            say(f"{human(total):>12}  in {len(files)} files; nothing was sent")
            return report
        home = _prepare_cache(cache, work / "download", total)
        api = HfApi(endpoint=constants.ENDPOINT, token=token, library_name="keye-video-qa", library_version=__version__)
        options = {"message": message} if message else {}
        report.uploaded = upload(api, files, repo, private=private, revision=revision, say=say, **options)
        try:
            verify_download(api, files, report, found, logits, home, say)
        except PublishError as error:
            raise PublishError(f"{report.uploaded.url} is committed but not verified: {error}") from error
    return report


def verify_download(
    api: HfApi,
    files: Mapping[str, LocalFile],
    report: Report,
    local: dict,
    logits: Path,
    home: Path,
    say: Callable[[str], None],
) -> None:
    """Download the commit into `home`, compare hashes, then load it from the Hub in a clean process.

    `local` and `logits` are what the probe found in the local folder.
    """
    repo_id, commit = report.uploaded.repository, report.uploaded.commit
    # The client resumes a cut download itself; what is left are answers that it takes for final.
    download = partial(api.snapshot_download, repo_id, revision=commit, cache_dir=home / "hub")
    snapshot = Path(insist("downloading", repo_id, say, download, waits=(1, 4)))
    _note(report, compare_files(files, snapshot), say)
    if not report.ok:
        return
    here = home / "logits.safetensors"
    environment = {"HF_ENDPOINT": api.endpoint}
    if token := api.token or get_token():
        environment["HF_TOKEN"] = token
    weights = "tokens" in local
    try:
        found = run_probe(
            repo_id,
            commit,
            processor="video" in local.get("tokens", ()),
            weights=weights,
            output=here,
            offline=False,
            home=home,
            environment=environment,
        )
    except ProbeError as error:
        text = f"AutoModel or AutoProcessor fails on {repo_id} at {commit}: {error}"
        return _note(report, Check("loading from the Hub", False, text), say)
    _note(report, compare_probes(local, found), say)
    if weights and report.ok:
        _note(report, compare_logits(logits, here), say)
    report.verified = weights and report.ok
    return None


def compare_files(files: Mapping[str, LocalFile], snapshot: Path) -> Check:
    """sha256 of every published file against its local twin."""
    wrong = []
    for name, file in files.items():
        if not (snapshot / name).is_file():
            wrong.append(f"{name} is not in the repository")
        elif LocalFile.read(snapshot, name).sha256 != file.sha256:
            wrong.append(f"{name} differs")
    if wrong:
        return Check("download", False, f"{'; '.join(wrong)}; run the same command again")
    total = sum(file.size for file in files.values())
    return Check("download", True, f"{len(files)} files, {human(total)}, have the same sha256 as the local ones")


def compare_probes(local: dict, found: dict) -> Check:
    if found["module"] != "transformers_modules":
        return Check("loading from the Hub", False, f"the class comes from {found['module']}, not from the repository")
    if "tokens" not in local:
        same = found["shapes"] == local["shapes"]
        text = "names and shapes are the local ones; " if same else "names and shapes differ from the local ones; "
        return Check("loading from the Hub", same, text + "logits were not compared, the memory is too small")
    if found["tokens"] != local["tokens"]:
        text = f"generated {found['tokens']}, the local model {local['tokens']}"
        return Check("loading from the Hub", False, text)
    return Check("loading from the Hub", True, f"{describe_probe(found)}, the same as the local model")


def compare_logits(local: Path, downloaded: Path) -> Check:
    """The same bits of weights and code in the same environment must give the same bits of logits."""
    here, there = load_file(local), load_file(downloaded)
    parts = []
    for name, expected in here.items():
        got = there[name]
        if got.shape != expected.shape or not torch.equal(got, expected):
            far = (got.double() - expected.double()).abs().max() if got.shape == expected.shape else "shape"
            parts.append(f"{name} prompt: {far}")
    if parts:
        return Check("logits", False, f"differ from the local model's ({', '.join(parts)})")
    count = sum(expected.numel() for expected in here.values())
    return Check("logits", True, f"{count:,} logits ({' and '.join(sorted(here))} prompt) equal, bit for bit")


def _prepare_cache(cache: str | Path | None, default: Path, needed: int) -> Path:
    """An empty folder with room for the download. Checked before anything is sent."""
    home = default if cache is None else Path(cache)
    if home.exists() and (not home.is_dir() or any(home.iterdir())):
        raise PublishError(f"--cache {home} is not empty, so a download into it would prove nothing; give a new folder")
    home.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(home).free
    if free < needed:
        raise PublishError(
            f"the check at the end downloads {human(needed)} to {home}, where {human(free)} are free; "
            "give --cache a folder on a larger disk"
        )
    return home


def _note(report: Report, check: Check, say: Callable[[str], None]) -> None:
    report.checks.append(check)
    say(str(check))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m conversion.publish",
        description="Check a checkpoint folder, put it on the Hub, and verify what arrived.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="a checkpoint folder in our layout, with its card")
    parser.add_argument("repo", metavar="REPO", help="NAMESPACE/NAME; made if it does not exist")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--dry-run", action="store_true", help="check and list the files; nothing is sent")
    parser.add_argument("--revision", default=constants.DEFAULT_REVISION, help="branch (default: %(default)s)")
    parser.add_argument("--message", help="title of the commit")
    parser.add_argument("--allow", action="append", default=[], metavar="PATTERN", help="publish these files as well")
    parser.add_argument("--trust-code", action="store_true", help="run and publish code that is not this package's")
    parser.add_argument("--cache", metavar="FOLDER", help="empty folder for the download at the end")
    parser.add_argument("--json", metavar="FILE", help="write the report there, for conversion.card --evidence")
    args = parser.parse_args(argv)
    options = [f"--revision {args.revision}"] if args.revision != constants.DEFAULT_REVISION else []
    options += ["--dry-run"] if args.dry_run else []
    command = " ".join(["python -m conversion.publish", Path(args.folder).name, args.repo, *options])
    try:
        report = publish(
            args.folder,
            args.repo,
            private=args.private,
            revision=args.revision,
            message=args.message,
            dry_run=args.dry_run,
            allow=args.allow,
            trust_code=args.trust_code,
            cache=args.cache,
            command=command,
        )
        if args.json:
            Path(args.json).write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    except (PublishError, OSError) as error:
        print(f"publish: {' '.join(str(error).split()).rstrip('.')}.", file=sys.stderr)
        return IMPOSSIBLE
    except KeyboardInterrupt:
        print("publish: interrupted; run the same command again to go on.", file=sys.stderr)
        return INTERRUPTED
    if not report.ok:
        wrong = sum(check.ok is False for check in report.checks)
        sent = f"{report.uploaded.url} is not what it should be" if report.uploaded else "nothing was sent"
        print(f"publish: {wrong} of {len(report.checks)} checks failed; {sent}.", file=sys.stderr)
        return WRONG
    if report.uploaded is None:
        print(f"ready to be published to {args.repo}")
    elif report.verified:
        print(f"published and verified: {report.uploaded.url}")
    else:
        print(f"published, with the same bytes; logits were not compared: {report.uploaded.url}")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
