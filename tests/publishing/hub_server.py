"""A Hub on a loopback address: what `huggingface_hub` asks of a server to create, fill and read a model repository.

    with HubServer() as hub:
        api = HfApi(endpoint=hub.endpoint, token=WRITER)
        hub.fail("POST", "/commit/", status=503, times=2)

Everything is kept in memory. Large files go through LFS (basic, or multipart with `hub.part_size`), their content is
checked against the promised sha256, and they are downloaded by redirect from another host name, as from a CDN. Every
request is recorded in `hub.requests`. `fail`, `cut`, `slow`, `lose_reply` and `before` disturb the requests that match;
a request for which there is no route is answered 404 and listed in `hub.unknown`.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.publishing.hub_store import Blob, Commit, Repo

WRITER, READER, STRANGER = "hf_writer", "hf_reader", "hf_stranger"
# Token -> user, and whether the token may write to what the user owns.
ACCOUNTS = {WRITER: ("someone", True), READER: ("someone", False), STRANGER: ("stranger", True)}
ORGANIZATIONS = {"someone": ("lab",)}

LFS_SUFFIXES = (".safetensors", ".bin", ".mp4")
LFS_SIZE = 10 * 2**20
NAME = re.compile(r"[\w][\w.-]{0,95}")


@dataclass
class Seen:
    """A request that arrived. `received` counts bytes of the body, `status` is None if no reply was sent."""

    method: str
    path: str
    token: str | None
    host: str
    range: str | None
    received: int = 0
    sent: int = 0
    status: int | None = None


@dataclass
class Disturbance:
    """What happens to the next `times` requests that match."""

    method: str
    path: str
    times: int
    status: int | None = None
    message: str = ""
    cut_after: int | None = None
    chunk: int = 2**16
    lose_reply: bool = False
    before: Callable[[], None] | None = None

    def matches(self, method: str, path: str) -> bool:
        return self.times > 0 and self.method == method and re.search(self.path, path) is not None


class Refusal(Exception):
    """An error reply."""

    def __init__(self, status: int, message: str, code: str | None = None, **extra):
        super().__init__(message)
        self.status, self.code, self.extra = status, code, extra


class HubServer:
    """Runs between `__enter__` and `__exit__`; `endpoint` is its address."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = defaultdict(dict)
        self.part_size: int | None = None
        self.requests: list[Seen] = []
        self.unknown: list[Seen] = []
        self.lock = threading.RLock()
        self._disturbances: list[Disturbance] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        port = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{port}"
        # Another name of the same address: to the client it is another host, which gets no token.
        self.storage = f"http://localhost:{port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fail(self, method: str, path: str, status: int, times: int = 1, message: str = "disturbed by the test") -> None:
        """Answer with an error status, the request itself has no effect."""
        self._disturbances.append(Disturbance(method, path, times, status=status, message=message))

    def cut(self, method: str, path: str, after: int, times: int = 1) -> None:
        """Close the connection after `after` bytes of the body that is sent (PUT, POST) or fetched (GET)."""
        self._disturbances.append(Disturbance(method, path, times, cut_after=after))

    def slow(self, method: str, path: str, chunk: int, times: int = 1) -> None:
        """Move the body in pieces of `chunk` bytes, one system call each."""
        self._disturbances.append(Disturbance(method, path, times, chunk=chunk))

    def lose_reply(self, method: str, path: str, times: int = 1) -> None:
        """Carry the request out, then close the connection instead of answering."""
        self._disturbances.append(Disturbance(method, path, times, lose_reply=True))

    def before(self, method: str, path: str, action: Callable[[], None], times: int = 1) -> None:
        """Call `action` before the request is carried out."""
        self._disturbances.append(Disturbance(method, path, times, before=action))

    def reset(self) -> None:
        """Forget what was planned and recorded."""
        self._disturbances.clear()
        self.requests.clear()
        self.unknown.clear()
        self.part_size = None

    def sent(self, method: str, path: str) -> list[Seen]:
        """Recorded requests whose path matches the regular expression."""
        return [seen for seen in self.requests if seen.method == method and re.search(path, seen.path)]

    def create(self, repo_id: str, private: bool = False, files: dict[str, bytes] | None = None) -> Repo:
        """A repository as the Hub makes it, with a first commit; `files` come in a second one."""
        repo = self.repos[repo_id] = Repo(repo_id, private)
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        repo.add("main", "initial commit", {".gitattributes": Blob(attributes.encode(), lfs=False)})
        if files:
            self.commit(repo_id, files)
        return repo

    def commit(self, repo_id: str, files: dict[str, bytes | None], branch: str = "main") -> Commit:
        """A commit that somebody else makes; None deletes a file."""
        blobs = {p: None if data is None else Blob(data, is_lfs(p, len(data))) for p, data in files.items()}
        with self.lock:
            self.objects.update({blob.sha256: blob.data for blob in blobs.values() if blob and blob.lfs})
            return self.repos[repo_id].add(branch, "somebody else's commit", blobs)

    def take(self, method: str, path: str) -> Disturbance:
        with self.lock:
            found = next((item for item in self._disturbances if item.matches(method, path)), None)
            if found is None:
                return Disturbance(method, path, times=0)
            found.times -= 1
            return found


def is_lfs(path: str, size: int) -> bool:
    return path.endswith(LFS_SUFFIXES) or size > LFS_SIZE


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    # A reply is several small writes; with Nagle's algorithm each request would wait for the peer's delayed ACK.
    disable_nagle_algorithm = True

    def log_message(self, *args) -> None:
        """Nothing on stderr; requests are recorded."""

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET

    def _handle(self) -> None:
        url = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        bearer = self.headers.get("Authorization", "")
        self.seen = Seen(
            self.command,
            unquote(url.path),
            bearer.removeprefix("Bearer ") or None,
            self.headers.get("Host", ""),
            self.headers.get("Range"),
        )
        self.disturbance = self.hub.take(self.command, self.seen.path)
        with self.hub.lock:
            self.hub.requests.append(self.seen)
        try:
            body = self._read_body()
            if body is None:
                return self._hang_up()
            if self.disturbance.before is not None:
                self.disturbance.before()
            if self.disturbance.status is not None:
                raise Refusal(self.disturbance.status, self.disturbance.message)
            self._route(url.path, body)
        except Refusal as refusal:
            headers = {"X-Error-Message": str(refusal)} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            headers |= {name: value for name, value in refusal.extra.pop("headers", {}).items() if value}
            self._reply_json({"error": str(refusal), **refusal.extra}, refusal.status, headers)
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def _read_body(self) -> bytes | None:
        """The whole body, or None where the connection is to be cut."""
        chunks = bytearray()
        limit = self.disturbance.cut_after if self.command in ("PUT", "POST") else None
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            self.seen.received = len(chunks)
            return None if limit is not None else bytes(chunks)
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            piece = self.rfile.read(min(left, self.disturbance.chunk, limit or left))
            if not piece:
                raise ConnectionError("the client hung up")
            chunks += piece
            left -= len(piece)
            self.seen.received = len(chunks)
            if limit is not None and len(chunks) >= limit:
                return None
        return bytes(chunks)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _reply(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        if self.disturbance.lose_reply:
            return self._hang_up()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.seen.status = status
        if self.command == "HEAD":
            return None
        limit = self.disturbance.cut_after if self.command == "GET" else None
        for start in range(0, len(body), self.disturbance.chunk):
            piece = body[start : start + self.disturbance.chunk]
            if limit is not None and start + len(piece) >= limit:
                self.wfile.write(piece[: limit - start])
                self.seen.sent += limit - start
                return self._hang_up()
            self.wfile.write(piece)
            self.wfile.flush()
            self.seen.sent += len(piece)
        return None

    def _reply_json(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._reply(json.dumps(content).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _route(self, path: str, body: bytes) -> None:
        for method, pattern, name in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method:
                arguments = {key: unquote(value or "") for key, value in found.groupdict().items()}
                return getattr(self, f"_{name}")(body=body, **arguments)
        self.hub.unknown.append(self.seen)
        raise Refusal(404, f"no route for {self.command} {path}")

    def _user(self) -> str | None:
        if self.seen.token is None:
            return None
        if self.seen.token not in ACCOUNTS:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return ACCOUNTS[self.seen.token][0]

    def _owns(self, namespace: str) -> bool:
        user = self._user()
        return namespace == user or namespace in ORGANIZATIONS.get(user, ())

    def _repo(self, repo_id: str, write: bool = False) -> Repo:
        user, repo = self._user(), self.hub.repos.get(repo_id)
        namespace = repo_id.split("/")[0]
        if repo is None or (repo.private and not self._owns(namespace)):
            raise Refusal(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write and user is None:
            raise Refusal(401, "Invalid username or password.")
        if write and not (self._owns(namespace) and ACCOUNTS[self.seen.token][1]):
            raise Refusal(403, f"Forbidden: pass a token with write permission for {repo_id}")
        return repo

    def _commit_of(self, repo: Repo, revision: str) -> Commit:
        commit = repo.at(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def _whoami(self, body: bytes) -> None:
        user = self._user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        role = "write" if ACCOUNTS[self.seen.token][1] else "read"
        orgs = [{"name": name} for name in ORGANIZATIONS.get(user, ())]
        self._reply_json(
            {"type": "user", "name": user, "orgs": orgs, "auth": {"accessToken": {"displayName": "t", "role": role}}}
        )

    def _create(self, body: bytes) -> None:
        asked, user = json.loads(body), self._user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        namespace = asked.get("organization") or user
        repo_id = f"{namespace}/{asked['name']}"
        if not self._owns(namespace) or not ACCOUNTS[self.seen.token][1]:
            raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        if not NAME.fullmatch(asked["name"]):
            raise Refusal(400, f"Invalid repository name {asked['name']!r}")
        place = {"url": f"{self.hub.endpoint}/{repo_id}", "id": repo_id}
        with self.hub.lock:
            if repo_id in self.hub.repos:
                raise Refusal(409, "You already created this model repo", **place)
            self.hub.create(repo_id, private=bool(asked.get("private")) or asked.get("visibility") == "private")
        self._reply_json(place)

    def _info(self, body: bytes, repo_id: str, revision: str = "") -> None:
        repo = self._repo(repo_id)
        commit = self._commit_of(repo, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        info = {"_id": "0", "id": repo_id, "modelId": repo_id, "sha": commit.oid, "siblings": siblings}
        self._reply_json({**info, "private": repo.private, "gated": False, "disabled": False, "tags": []})

    def _tree(self, body: bytes, repo_id: str, revision: str, folder: str = "") -> None:
        files = self._commit_of(self._repo(repo_id), revision).files
        inside = {path: blob for path, blob in files.items() if path.startswith(f"{folder}/") or not folder}
        if folder and not inside:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        entries = []
        for path, blob in sorted(inside.items()):
            first, *rest = path[len(folder) + 1 if folder else 0 :].split("/")
            if not rest or self.query.get("recursive", "").lower() in ("true", "1"):
                entries.append(blob.entry(path))
            else:
                place = f"{folder}/{first}" if folder else first
                entry = {"type": "directory", "path": place, "size": 0}
                entry["oid"] = hashlib.sha1(place.encode()).hexdigest()
                entries += [entry] if entry not in entries else []
        self._reply_json(entries)

    def _paths(self, body: bytes, repo_id: str, revision: str) -> None:
        files = self._commit_of(self._repo(repo_id), revision).files
        form = "json" not in self.headers.get("Content-Type", "")
        wanted = parse_qs(body.decode())["paths"] if form else json.loads(body)["paths"]
        wanted = [wanted] if isinstance(wanted, str) else wanted
        self._reply_json([files[path].entry(path) for path in wanted if path in files])

    def _refs(self, body: bytes, repo_id: str) -> None:
        repo = self._repo(repo_id)
        kinds = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
        for name, oid in repo.branches.items():
            pull = name.startswith("refs/pr/")
            ref = {"name": name, "ref": name if pull else f"refs/heads/{name}", "targetCommit": oid}
            kinds["pullRequests" if pull else "branches"].append(ref)
        self._reply_json(kinds)

    def _branch(self, body: bytes, repo_id: str, branch: str) -> None:
        repo = self._repo(repo_id, write=True)
        start = self._commit_of(repo, (json.loads(body) if body else {}).get("startingPoint") or "main")
        if branch in repo.branches:
            raise Refusal(409, f"Reference refs/heads/{branch} already exists")
        repo.branches[branch] = start.oid
        self._reply_json({})

    def _preupload(self, body: bytes, repo_id: str, revision: str) -> None:
        commit = self._commit_of(self._repo(repo_id, write="create_pr" not in self.query), revision)
        answers = []
        for file in json.loads(body)["files"]:
            base64.b64decode(file["sample"], validate=True)
            mode = "lfs" if is_lfs(file["path"], file["size"]) else "regular"
            answer = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            if file["path"] in commit.files:
                answer["oid"] = commit.files[file["path"]].etag
            answers.append(answer)
        self._reply_json({"files": answers})

    def _lfs_batch(self, body: bytes, repo_id: str) -> None:
        self._repo(repo_id, write=True)
        asked, answers = json.loads(body), []
        for item in asked["objects"]:
            oid, size = item["oid"], item["size"]
            answer = {"oid": oid, "size": size}
            if oid not in self.hub.objects:
                place = f"{self.hub.storage}/_lfs/{oid}"
                upload = {"href": place}
                if self.hub.part_size and size > self.hub.part_size:
                    parts = range(1, -(-size // self.hub.part_size) + 1)
                    header = {"chunk_size": str(self.hub.part_size)} | {str(n): f"{place}/{n}" for n in parts}
                    upload = {"href": f"{self.hub.endpoint}/_complete/{oid}", "header": header}
                verify = {"href": f"{self.hub.endpoint}/{repo_id}.git/info/lfs/objects/verify"}
                answer |= {"authenticated": True, "actions": {"upload": upload, "verify": verify}}
            answers.append(answer)
        self._reply_json({"transfer": "multipart" if self.hub.part_size else "basic", "objects": answers})

    def _store(self, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refusal(400, "the content does not have the promised sha256")
        self.hub.objects[oid] = data

    def _lfs_put(self, body: bytes, oid: str) -> None:
        self._store(oid, body)
        self._reply(b"")

    def _lfs_put_part(self, body: bytes, oid: str, number: str) -> None:
        self.hub.parts[oid][int(number)] = body
        self._reply(b"", headers={"ETag": f'"{hashlib.md5(body).hexdigest()}"'})

    def _lfs_complete(self, body: bytes, oid: str) -> None:
        parts = self.hub.parts.pop(oid, {})
        for part in json.loads(body)["parts"]:
            if part["etag"] != f'"{hashlib.md5(parts[part["partNumber"]]).hexdigest()}"':
                raise Refusal(400, f"part {part['partNumber']} has another ETag")
        self._store(oid, b"".join(parts[number] for number in sorted(parts)))
        self._reply_json({"success": True})

    def _lfs_verify(self, body: bytes, repo_id: str) -> None:
        self._repo(repo_id, write=True)
        asked = json.loads(body)
        if len(self.hub.objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(404, "the object is not there")
        self._reply_json({})

    def _validate_yaml(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        found = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
        try:
            data = yaml.safe_load(found.group(1)) if found else {}
        except yaml.YAMLError as error:
            raise Refusal(400, "Invalid YAML", errors=[{"message": str(error)}], warnings=[]) from error
        if not isinstance(data.get("license", ""), str):
            raise Refusal(400, "Invalid metadata", errors=[{"message": '"license" must be a string'}], warnings=[])
        self._reply_json({"errors": [], "warnings": [] if data else [{"message": "empty or missing yaml metadata"}]})

    def _commit(self, body: bytes, repo_id: str, revision: str) -> None:
        create_pr = self.query.get("create_pr") == "1"
        repo = self._repo(repo_id, write=not create_pr)
        lines = [json.loads(line) for line in body.splitlines() if line]
        header, changes = lines[0]["value"], {}
        with self.hub.lock:
            base = self._commit_of(repo, revision)
            for line in lines[1:]:
                value = line["value"]
                if line["key"] == "file":
                    changes[value["path"]] = Blob(base64.b64decode(value["content"], validate=True), lfs=False)
                elif line["key"] == "lfsFile":
                    if value["oid"] not in self.hub.objects:
                        raise Refusal(400, f"the LFS object of {value['path']} was not uploaded")
                    changes[value["path"]] = Blob(self.hub.objects[value["oid"]], lfs=True)
                elif line["key"] == "deletedFile":
                    if value["path"] not in base.files:
                        raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
                    changes[value["path"]] = None
                else:
                    raise Refusal(400, f"unknown line {line['key']!r}")
            parent = header.get("parentCommit")
            if parent and not create_pr and not base.oid.startswith(parent):
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            branch = revision
            if create_pr:
                number = 1 + sum(name.startswith("refs/pr/") for name in repo.branches)
                branch = f"refs/pr/{number}"
            commit = repo.add(branch, header["summary"], changes, base=base.oid)
        reply = {"success": True, "commitOid": commit.oid, "hookOutput": ""}
        reply["commitUrl"] = f"{self.hub.endpoint}/{repo_id}/commit/{commit.oid}"
        if create_pr:
            reply["pullRequestUrl"] = f"{self.hub.endpoint}/{repo_id}/discussions/{number}"
        self._reply_json(reply)

    def _resolve(self, body: bytes, repo_id: str, revision: str, path: str) -> None:
        commit = self._commit_of(self._repo(repo_id), revision)
        known = {"X-Repo-Commit": commit.oid}
        blob = commit.files.get(path)
        if blob is None:
            raise Refusal(404, f"{path} does not exist", "EntryNotFound", headers=known)
        if blob.lfs:
            known |= {"X-Linked-ETag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
            return self._reply(b"", 302, {**known, "Location": f"{self.hub.storage}/_storage/{blob.sha256}"})
        return self._send(blob.data, {**known, "ETag": f'"{blob.git_oid}"'})

    def _storage(self, body: bytes, oid: str) -> None:
        self._send(self.hub.objects[oid], {"ETag": f'"{oid}"'})

    def _send(self, data: bytes, headers: dict[str, str]) -> None:
        headers = {**headers, "Accept-Ranges": "bytes"}
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not found:
            return self._reply(data, 200, headers)
        start, end = int(found.group(1)), min(int(found.group(2) or len(data) - 1), len(data) - 1)
        if start >= len(data):
            raise Refusal(416, "the range begins behind the end", headers={"Content-Range": f"bytes */{len(data)}"})
        return self._reply(data[start : end + 1], 206, {**headers, "Content-Range": f"bytes {start}-{end}/{len(data)}"})


_ID = r"(?P<repo_id>[^/]+/[^/]+?)"
_REVISION = r"(?P<revision>[^/]+)"
_MODEL = rf"/api/models/{_ID}"
ROUTES = (
    (("GET",), r"/api/whoami-v2", "whoami"),
    (("POST",), r"/api/repos/create", "create"),
    (("POST",), r"/api/validate-yaml", "validate_yaml"),
    (("GET",), _MODEL, "info"),
    (("GET",), rf"{_MODEL}/revision/{_REVISION}", "info"),
    (("GET",), rf"{_MODEL}/tree/{_REVISION}(?:/(?P<folder>.+))?", "tree"),
    (("POST",), rf"{_MODEL}/paths-info/{_REVISION}", "paths"),
    (("GET",), rf"{_MODEL}/refs", "refs"),
    (("POST",), rf"{_MODEL}/branch/(?P<branch>[^/]+)", "branch"),
    (("POST",), rf"{_MODEL}/preupload/{_REVISION}", "preupload"),
    (("POST",), rf"{_MODEL}/commit/{_REVISION}", "commit"),
    (("POST",), rf"/{_ID}\.git/info/lfs/objects/batch", "lfs_batch"),
    (("POST",), rf"/{_ID}\.git/info/lfs/objects/verify", "lfs_verify"),
    (("PUT",), r"/_lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    (("PUT",), r"/_lfs/(?P<oid>[0-9a-f]{64})/(?P<number>\d+)", "lfs_put_part"),
    (("POST",), r"/_complete/(?P<oid>[0-9a-f]{64})", "lfs_complete"),
    (("GET", "HEAD"), r"/_storage/(?P<oid>[0-9a-f]{64})", "storage"),
    (("GET", "HEAD"), rf"/{_ID}/resolve/{_REVISION}/(?P<path>.+)", "resolve"),
)
