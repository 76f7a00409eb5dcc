"""A hub on loopback: a real HTTP server for pushing and pulling models that records every request."""

import base64
import hashlib
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

NO_REVISION = "0" * 40
USER = {"type": "user", "name": "me", "orgs": [], "auth": {"accessToken": {"role": "write", "displayName": "t"}}}


class Hub:
    """Repositories in memory.

    Args:
        tokens: Tokens that are accepted; None for any, and for none at all. Then a repository that is private, or that
            does not exist, is refused without a token, and so is every change.
        lfs: Whether safetensors are uploaded as large files, as the Hub does, rather than within the commit.

    Attributes:
        repos: File contents by path, by repository id; those of another branch under "id@branch".
        revisions: Latest commit, by the same keys.
        private: Whether a repository is private, by repository id.
        moved: New id by the old one.
        breaks: How many of the next commits break off while they are sent.
        large: Large files that arrived, by SHA-256.
        commits: How many were made.
        log: (method, path, bytes of the body) of every request.
    """

    def __init__(self, tokens=None, lfs=False):
        self.repos, self.revisions, self.log = {}, {}, []
        self.private, self.moved, self.large = {}, {}, {}
        self.tokens, self.lfs = tokens, lfs
        self.breaks = self.commits = 0

    def start(self):
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        # It looks whether it should stop once in this many seconds.
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def stop(self):
        self.server.shutdown()
        self.server.server_close()

    def hold(self, repo, files, private=False):
        """Put a repository there, as if it had been pushed before."""
        self.repos[repo], self.private[repo] = dict(files), private
        self.revisions[repo] = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()

    def sent(self):
        """Bytes of all bodies so far."""
        return sum(size for _, _, size in self.log)

    def key(self, repo, revision):
        branch = f"{repo}@{revision}"
        return branch if branch in self.repos else repo


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def answer(self, code, body=None, headers=None, raw=None):
        content = raw if raw is not None else json.dumps(body).encode()
        self.send_response(code)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if raw is None:
            self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def body(self):
        if self.headers.get("Content-Length"):
            return self.rfile.read(int(self.headers["Content-Length"]))
        content = b""
        while self.headers.get("Transfer-Encoding") == "chunked":
            size = int(self.rfile.readline().strip(), 16)
            content += self.rfile.read(size)
            self.rfile.readline()
            if size == 0:
                break
        return content

    def respond(self):
        path = unquote(urlparse(self.path).path)
        if self.hub.breaks and "/commit/" in path:
            self.hub.breaks -= 1
            self.rfile.read(1)
            self.hub.log.append((self.command, self.path, 1))
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        body = self.body()
        self.hub.log.append((self.command, self.path, len(body)))
        for pattern, handle in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and not self.turned_away(path, found):
                return handle(self, *found.groups(), body=body)
            if found:
                return None
        return self.answer(404, {"error": f"not here: {path}"})

    do_GET = do_POST = do_HEAD = do_PUT = do_DELETE = respond

    def turned_away(self, path, found):
        """Answer for the Hub where it says where a repository went, or that it is none of the asker's business."""
        repo = found.group(1).removesuffix(".git") if found.groups() else ""
        if repo in self.hub.moved:
            there = self.path.replace(repo, self.hub.moved[repo], 1)
            self.answer(307, {"url": there}, {"Location": there})
            return True
        if self.hub.tokens is None or path.startswith("/large/"):  # storage has addresses of its own
            return False
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given and given not in self.hub.tokens:
            message = "Invalid credentials in Authorization header"
            self.answer(401, {"error": message}, {"X-Error-Message": message})
            return True
        reads = self.command in ("GET", "HEAD")
        public = repo in self.hub.repos and not self.hub.private.get(repo)
        if given or (reads and public):
            return False
        code = {"X-Error-Code": "RepoNotFound"} if repo else {}
        self.answer(401, {"error": "Invalid username or password."}, code)
        return True

    def whoami(self, body):
        self.answer(200, USER)

    def validate(self, body):
        self.answer(200, {"errors": [], "warnings": []})

    def create(self, body):
        wanted = json.loads(body)
        repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if repo not in self.hub.repos:
            # huggingface_hub 2 says it in words.
            self.hub.private[repo] = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.hub.repos.setdefault(repo, {})
        self.hub.revisions.setdefault(repo, NO_REVISION)
        self.answer(200, {"url": f"{self.hub.url}/{repo}", "id": repo, "name": repo})

    def branch(self, repo, name, body):
        if f"{repo}@{name}" in self.hub.repos:
            return self.answer(409, {"error": "Reference already exists"})
        self.hub.repos[f"{repo}@{name}"] = dict(self.hub.repos[repo])
        self.hub.revisions[f"{repo}@{name}"] = self.hub.revisions[repo]
        return self.answer(200, {})

    def preupload(self, repo, revision, body):
        if repo not in self.hub.repos:
            return self.missing()
        held, modes = self.hub.repos[self.hub.key(repo, revision)], []
        for file in json.loads(body)["files"]:
            path, large = file["path"], self.hub.lfs and file["path"].endswith(".safetensors")
            oid = None if path not in held else _sha256(held[path]) if large else _blob(held[path])
            modes.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid})
        return self.answer(200, {"files": modes})

    def large_files(self, repo, body):
        objects = []
        for file in json.loads(body)["objects"]:
            here = f"{self.hub.url}/large/{file['oid']}"
            asked = {} if file["oid"] in self.hub.large else {"actions": {"upload": {"href": here}}}
            objects.append({**file, **asked})
        self.answer(200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})

    def large_file(self, oid, body):
        assert _sha256(body) == oid
        self.hub.large[oid] = body
        self.answer(200, {})

    def commit(self, repo, revision, body):
        if repo not in self.hub.repos:
            return self.missing()
        place = self.hub.key(repo, revision)
        files = dict(self.hub.repos[place])
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif operation["key"] == "deletedFile":
                files.pop(value["path"], None)
        oid = self.hub.revisions[place] = hashlib.sha1(body).hexdigest()
        self.hub.repos[place] = files
        self.hub.commits += 1
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"}
        return self.answer(200, {**answer, "hookOutput": "", "pullRequestUrl": None})

    def missing(self):
        self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

    def tree(self, repo, revision, body):
        files = self.hub.repos.get(self.hub.key(repo, revision), {})
        entries = [{"type": "file", "path": path, "size": len(c), "oid": _blob(c)} for path, c in files.items()]
        self.answer(200, entries)

    def info(self, repo, revision=None, body=b""):
        if repo not in self.hub.repos:
            return self.missing()
        place = self.hub.key(repo, revision)
        files = [{"rfilename": path, "size": len(content)} for path, content in self.hub.repos[place].items()]
        described = {"_id": "x", "id": repo, "modelId": repo, "sha": self.hub.revisions[place]}
        described["private"] = self.hub.private.get(repo, False)
        return self.answer(200, {**described, "tags": [], "downloads": 0, "likes": 0, "siblings": files})

    def resolve(self, repo, revision, path, body):
        place = self.hub.key(repo, revision)
        if repo not in self.hub.repos:
            return self.missing()
        commit = {"X-Repo-Commit": self.hub.revisions.get(place, NO_REVISION)}
        content = self.hub.repos[place].get(path)
        if content is None:
            return self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", **commit})
        return self.answer(200, raw=content, headers={"ETag": f'"{_blob(content)}"', **commit})


def _sha256(content):
    return hashlib.sha256(content).hexdigest()


def _blob(content):
    """What git calls a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


REPO = "([^/]+/[^/]+)"
ROUTES = [
    ("/api/repos/create", _Handler.create),
    ("/api/whoami-v2", _Handler.whoami),
    ("/api/validate-yaml", _Handler.validate),
    ("/large/([0-9a-f]{64})", _Handler.large_file),
    (f"/{REPO}\\.git/info/lfs/objects/batch", _Handler.large_files),
    (f"/api/models/{REPO}/preupload/(.+)", _Handler.preupload),
    (f"/api/models/{REPO}/branch/(.+)", _Handler.branch),
    (f"/api/models/{REPO}/commit/(.+)", _Handler.commit),
    (f"/api/models/{REPO}/(?:tree|paths-info)/([^/]+).*", _Handler.tree),
    (f"/api/models/{REPO}(?:/revision/(.+))?", _Handler.info),
    (f"/{REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
