"""A fake Google Cloud Storage whose buckets are local directories.

It serves the three libraries through which the project uses `gs://`: TensorStore, which writes
Orbax's arrays, talks to a small HTTP server; etils.epath calls a fake of TensorFlow's file system;
Orbax, which asks for the type of the bucket, calls a fake of google-cloud-storage.
"""

import contextlib
import hashlib
import json
import os
import sys
import threading
import types
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from etils.epath import backend, gpath


def _handler(root: Path) -> type[BaseHTTPRequestHandler]:
    """Returns a handler of the JSON API calls that TensorStore uses, for buckets in `root`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_) -> None:
            pass

        def _answer(self, code: int, body: bytes, **headers: str) -> None:
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _parse_request(self) -> tuple[Path, str, dict[str, str]]:
            """Returns the bucket's directory, the object's name, and the query parameters."""
            url = urllib.parse.urlsplit(self.path)
            bucket, _, name = url.path.partition("/b/")[2].partition("/o")
            values = {key: value[0] for key, value in urllib.parse.parse_qs(url.query).items()}
            return root / bucket, urllib.parse.unquote(name.lstrip("/")), values

        @staticmethod
        def _generation(path: Path) -> str:
            digest = hashlib.blake2b(path.read_bytes(), digest_size=6).hexdigest()
            return str(int(digest, 16) + 1) if path.is_file() else "0"

        def do_GET(self) -> None:
            bucket, name, values = self._parse_request()
            if not name:  # a listing
                start, end = values.get("startOffset", ""), values.get("endOffset", "\uffff")
                names = (
                    path.relative_to(bucket).as_posix()
                    for path in sorted(bucket.rglob("*"))
                    if path.is_file()
                )
                prefix = values.get("prefix", "")
                items = [
                    {"name": name, "size": str((bucket / name).stat().st_size)}
                    for name in names
                    if name.startswith(prefix) and start <= name < end
                ]
                self._answer(200, json.dumps({"items": items}).encode())
                return
            path = bucket / name
            if not path.is_file():
                self._answer(404, b"{}")
                return
            data = path.read_bytes()
            headers = {"x_goog_generation": self._generation(path)}
            if "Range" in self.headers:
                start, _, end = self.headers["Range"].removeprefix("bytes=").partition("-")
                stop = min(int(end) + 1 if end else len(data), len(data))
                headers["Content_Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
                self._answer(206, data[int(start) : stop], **headers)
            else:
                self._answer(200, data, **headers)

        def do_POST(self) -> None:
            bucket, _, values = self._parse_request()
            data = self.rfile.read(int(self.headers["Content-Length"]))
            path = bucket / values["name"]
            generation = self._generation(path) if path.exists() else "0"
            if values.get("ifGenerationMatch", generation) != generation:
                self._answer(412, b"{}")
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            body = {"name": values["name"], "generation": self._generation(path)}
            self._answer(200, json.dumps(body).encode())

        def do_DELETE(self) -> None:
            bucket, name, _ = self._parse_request()
            (bucket / name).unlink(missing_ok=True)
            self._answer(204, b"")

    return Handler


class _Backend(backend._TfBackend):
    """TensorFlow's file system calls, with paths in local directories instead of buckets."""

    def __init__(self, root: Path):
        def local_path(path):
            text = os.fspath(path)
            return str(root / text.removeprefix("gs://")) if text.startswith("gs://") else text

        tf_gfile = super().gfile

        def listdir(path):
            # Cloud Storage adds a slash to the names of directories.
            names = tf_gfile.listdir(local_path(path))
            return [f"{n}/" if tf_gfile.isdir(f"{local_path(path)}/{n}") else n for n in names]

        def glob(pattern):
            return [
                f"gs://{Path(path).relative_to(root)}"
                for path in tf_gfile.glob(local_path(pattern))
            ]

        def with_local_paths(function):
            return lambda *paths, **values: function(*map(local_path, paths), **values)

        names = ("exists", "isdir", "makedirs", "mkdir", "rmtree", "remove", "rename", "stat")
        self._gfile = types.SimpleNamespace(
            **{name: with_local_paths(getattr(tf_gfile, name)) for name in names},
            GFile=lambda path, mode: tf_gfile.GFile(local_path(path), mode),
            listdir=listdir,
            glob=glob,
        )

    @property
    def gfile(self):
        return self._gfile


@contextlib.contextmanager
def buckets(root: Path, monkeypatch):
    """A context in which `gs://BUCKET/x` is `root/BUCKET/x`."""
    server = ThreadingHTTPServer(("localhost", 0), _handler(root))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://localhost:{server.server_port}")
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "x")
    bucket = types.SimpleNamespace(hierarchical_namespace_enabled=False)
    storage = types.ModuleType("google.cloud.storage")
    storage.Client = lambda: types.SimpleNamespace(get_bucket=lambda name: bucket)
    cloud = types.ModuleType("google.cloud")
    cloud.storage = storage
    monkeypatch.setitem(sys.modules, "google.cloud", cloud)
    monkeypatch.setitem(sys.modules, "google.cloud.storage", storage)
    fake_backend, real_backend = _Backend(root), gpath._GPath._backend.fget
    monkeypatch.setattr(
        gpath._GPath,
        "_backend",
        property(lambda path: fake_backend if path._uri_scheme == "gs" else real_backend(path)),
    )
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
