"""A `gs://` that is a folder of this machine, for the three libraries by which the project uses it.

TensorStore, which stores Orbax's arrays, speaks HTTP with a small server; etils.epath goes through
TensorFlow's file system calls as it does on Google Cloud; Orbax's question about the bucket's kind
is answered by a stand-in for google-cloud-storage.
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
    """The part of Cloud Storage's JSON API that TensorStore uses, for buckets in `root`."""

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

        def _asked(self) -> tuple[Path, str, dict[str, str]]:
            """Bucket's folder, object's name and parameters of the request."""
            url = urllib.parse.urlsplit(self.path)
            bucket, _, name = url.path.partition("/b/")[2].partition("/o")
            values = {key: value[0] for key, value in urllib.parse.parse_qs(url.query).items()}
            return root / bucket, urllib.parse.unquote(name.lstrip("/")), values

        @staticmethod
        def _generation(path: Path) -> str:
            digest = hashlib.blake2b(path.read_bytes(), digest_size=6).hexdigest()
            return str(int(digest, 16) + 1) if path.is_file() else "0"

        def do_GET(self) -> None:
            bucket, name, values = self._asked()
            if not name:  # a listing
                start, end = values.get("startOffset", ""), values.get("endOffset", "\uffff")
                names = (
                    path.relative_to(bucket).as_posix()
                    for path in sorted(bucket.rglob("*"))
                    if path.is_file()
                )
                prefix = values.get("prefix", "")
                items = [
                    {"name": each, "size": str((bucket / each).stat().st_size)}
                    for each in names
                    if each.startswith(prefix) and start <= each < end
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
                first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
                stop = min(int(last) + 1 if last else len(data), len(data))
                headers["Content_Range"] = f"bytes {first}-{stop - 1}/{len(data)}"
                self._answer(206, data[int(first) : stop], **headers)
            else:
                self._answer(200, data, **headers)

        def do_POST(self) -> None:
            bucket, _, values = self._asked()
            data = self.rfile.read(int(self.headers["Content-Length"]))
            path = bucket / values["name"]
            wanted = values.get("ifGenerationMatch")
            if wanted is not None and wanted != (self._generation(path) if path.exists() else "0"):
                self._answer(412, b"{}")
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            body = {"name": values["name"], "generation": self._generation(path)}
            self._answer(200, json.dumps(body).encode())

        def do_DELETE(self) -> None:
            bucket, name, _ = self._asked()
            (bucket / name).unlink(missing_ok=True)
            self._answer(204, b"")

    return Handler


class _Backend(backend._TfBackend):
    """TensorFlow's calls, in the folder instead of in the bucket."""

    def __init__(self, root: Path):
        def local(path):
            text = os.fspath(path)
            return str(root / text.removeprefix("gs://")) if text.startswith("gs://") else text

        real = super().gfile

        def listdir(path):
            # Cloud Storage gives the names of directories with a slash.
            names = real.listdir(local(path))
            return [f"{n}/" if real.isdir(f"{local(path)}/{n}") else n for n in names]

        def glob(pattern):
            return [f"gs://{Path(path).relative_to(root)}" for path in real.glob(local(pattern))]

        def translated(function):
            return lambda *paths, **values: function(*map(local, paths), **values)

        names = ("exists", "isdir", "makedirs", "mkdir", "rmtree", "remove", "rename", "stat")
        self._gfile = types.SimpleNamespace(
            **{name: translated(getattr(real, name)) for name in names},
            GFile=lambda path, mode: real.GFile(local(path), mode),
            listdir=listdir,
            glob=glob,
        )

    @property
    def gfile(self):
        return self._gfile


@contextlib.contextmanager
def buckets(root: Path, monkeypatch):
    """Within it, `gs://BUCKET/x` is `root/BUCKET/x`."""
    server = ThreadingHTTPServer(("localhost", 0), _handler(root))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://localhost:{server.server_port}")
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "x")
    kind = types.SimpleNamespace(hierarchical_namespace_enabled=False)
    storage = types.ModuleType("google.cloud.storage")
    storage.Client = lambda: types.SimpleNamespace(get_bucket=lambda name: kind)
    cloud = types.ModuleType("google.cloud")
    cloud.storage = storage
    monkeypatch.setitem(sys.modules, "google.cloud", cloud)
    monkeypatch.setitem(sys.modules, "google.cloud.storage", storage)
    fake, real = _Backend(root), gpath._GPath._backend.fget
    monkeypatch.setattr(
        gpath._GPath,
        "_backend",
        property(lambda path: fake if path._uri_scheme == "gs" else real(path)),
    )
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
