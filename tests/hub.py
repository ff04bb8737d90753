"""A stand-in for the Hugging Face Hub: serves the files of one data set as the Hub's API does."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from threading import Thread
from typing import Any

_COMMIT = "c" * 40


@contextmanager
def hub_with(name: str, files: Mapping[str, bytes]) -> Iterator[str]:
    """Serves a data set's files; gives what `HF_ENDPOINT` has to be."""
    digests = {path: hashlib.sha1(content).hexdigest() for path, content in files.items()}
    listed = [
        {"type": "file", "path": path, "size": len(content), "oid": digests[path]} for path, content in files.items()
    ]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = PurePosixPath(self.path.partition("?")[0])
            file = path.name
            if path.match(f"/datasets/{name}/resolve/*/*") and file in files:
                self._answer(200, files[file], {"ETag": digests[file], "X-Repo-Commit": _COMMIT})
            elif path.match(f"/api/datasets/{name}/tree/{_COMMIT}"):
                self._answer(200, listed)
            elif path.match(f"/api/datasets/{name}") or path.match(f"/api/datasets/{name}/revision/*"):
                self._answer(200, {"id": name, "sha": _COMMIT, "siblings": [{"rfilename": file} for file in files]})
            else:
                self._answer(404, {}, {"X-Error-Code": "EntryNotFound"})

        do_HEAD = do_GET  # noqa: N815 - http.server's name

        def _answer(self, status: int, content: Any, headers: Mapping[str, str] | None = None) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for header, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                self.send_header(header, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Keeps quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
