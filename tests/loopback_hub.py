"""A hub on loopback: a real HTTP server for pushing and pulling models that records every request."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

NO_REVISION = "0" * 40
USER = {"type": "user", "name": "me", "orgs": [], "auth": {"accessToken": {"role": "write", "displayName": "t"}}}


class Hub:
    """Repositories in memory.

    Attributes:
        repos: File contents by path, by repository id.
        revisions: Latest commit by repository id.
        log: (method, path, bytes of the body) of every request.
    """

    def __init__(self):
        self.repos, self.revisions, self.log = {}, {}, []

    def start(self):
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


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
        path, body = unquote(urlparse(self.path).path), self.body()
        self.hub.log.append((self.command, self.path, len(body)))
        for pattern, handle in ROUTES:
            found = re.fullmatch(pattern, path)
            if found:
                return handle(self, *found.groups(), body=body)
        return self.answer(404, {"error": f"not here: {path}"})

    do_GET = do_POST = do_HEAD = do_PUT = do_DELETE = respond

    def whoami(self, body):
        self.answer(200, USER)

    def validate(self, body):
        self.answer(200, {"errors": [], "warnings": []})

    def create(self, body):
        wanted = json.loads(body)
        repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        self.hub.repos.setdefault(repo, {})
        self.hub.revisions.setdefault(repo, NO_REVISION)
        self.answer(200, {"url": f"{self.hub.url}/{repo}", "id": repo, "name": repo})

    def preupload(self, repo, revision, body):
        files = [file["path"] for file in json.loads(body)["files"]]
        modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for path in files]
        self.answer(200, {"files": modes})

    def commit(self, repo, revision, body):
        files = self.hub.repos[repo]
        for line in body.splitlines():
            operation = json.loads(line)
            if operation["key"] == "file":
                files[operation["value"]["path"]] = base64.b64decode(operation["value"]["content"])
            elif operation["key"] == "deletedFile":
                files.pop(operation["value"]["path"], None)
        oid = self.hub.revisions[repo] = hashlib.sha1(body).hexdigest()
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"}
        self.answer(200, {**answer, "hookOutput": "", "pullRequestUrl": None})

    def tree(self, repo, revision, body):
        files = self.hub.repos.get(repo, {})
        entries = [{"type": "file", "path": path, "size": len(c), "oid": _oid(c)} for path, c in files.items()]
        self.answer(200, entries)

    def info(self, repo, revision=None, body=b""):
        if repo not in self.hub.repos:
            return self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        files = [{"rfilename": path, "size": len(content)} for path, content in self.hub.repos[repo].items()]
        described = {"_id": "x", "id": repo, "modelId": repo, "sha": self.hub.revisions[repo], "private": False}
        return self.answer(200, {**described, "tags": [], "downloads": 0, "likes": 0, "siblings": files})

    def resolve(self, repo, revision, path, body):
        content = self.hub.repos.get(repo, {}).get(path)
        commit = {"X-Repo-Commit": self.hub.revisions.get(repo, NO_REVISION)}
        if content is None:
            return self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", **commit})
        return self.answer(200, raw=content, headers={"ETag": f'"{_oid(content)}"', **commit})


def _oid(content):
    return hashlib.sha1(content).hexdigest()


REPO = "([^/]+/[^/]+)"
ROUTES = [
    ("/api/repos/create", _Handler.create),
    ("/api/whoami-v2", _Handler.whoami),
    ("/api/validate-yaml", _Handler.validate),
    (f"/api/models/{REPO}/preupload/(.+)", _Handler.preupload),
    (f"/api/models/{REPO}/commit/(.+)", _Handler.commit),
    (f"/api/models/{REPO}/(?:tree|paths-info)/([^/]+).*", _Handler.tree),
    (f"/api/models/{REPO}(?:/revision/(.+))?", _Handler.info),
    (f"/{REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
