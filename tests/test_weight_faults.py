"""Tests damaged, hostile, foreign and remote weights: each fault raises a one-line error."""

import contextlib
import http.server
import json
import os
import pwd
import shlex
import struct
import subprocess
import sys
import threading
import time
import zipfile

import numpy as np
import pytest
from flax import serialization, traverse_util
from PIL import Image

import mixer
from helpers import GOLDENS, assert_same_bits, golden_params, run_program, tiny_config
from mixer import trainer
from mixer.errors import UserError
from mixer.evaluation import report
from mixer.evaluation.subject import open_subject
from mixer.models.mlp_mixer import VARIANTS
from mixer.models.registry import ARCHITECTURES
from mixer.runs import config as run
from mixer.weights import card as card_file
from mixer.weights import download, foreign, published
from mixer.weights import fetch as remote
from mixer.weights import formats as weights
from mixer.weights import load as loading

PUBLISHED = GOLDENS / "mixer_tiny_official.npz"
LEGACY = GOLDENS / "mixer_tiny_legacy.npz"
TIMM = GOLDENS / "mixer_tiny_timm.safetensors"
SECRET = "53cr3t"


def expect_error(path, match, **options):
    with pytest.raises(UserError, match=match) as error_info:
        loading.read(path, log=lambda line: None, **options)
    assert "\n" not in str(error_info.value) and SECRET not in str(error_info.value)
    return str(error_info.value)


def read_arrays(path):
    with np.load(path) as file:
        return dict(file)


# Loading from a local HTTP server.


class _Server(http.server.ThreadingHTTPServer):
    """Serves `files`, which maps a path to its bytes or to a function that answers requests."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.requests = {}, []

    def url(self, path):
        return f"http://127.0.0.1:{self.server_address[1]}/{path}"


class _Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        path = self.path.split("?")[0].lstrip("/")
        self.server.requests.append((path, self.headers["Range"]))
        content = self.server.files.get(path)
        if content is None:
            self.send_error(404)
        elif callable(content):
            content(self)
        else:
            self.answer(content)

    def answer(self, data, *, code=200, length=None, **headers):
        self.send_response(code)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    server = _Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("path", [PUBLISHED, LEGACY, TIMM], ids=lambda path: path.suffix)
def test_every_layout_loads_from_a_url(server, path):
    server.files = {f"a/{path.name}": path.read_bytes()}
    lines = []
    loaded = loading.read(server.url(f"a/{path.name}"), log=lines.append)
    assert_same_bits(loaded.params, loading.read(path, log=lines.append).params)
    assert loaded.card.source == server.url(f"a/{path.name}")
    assert published.find_accuracies(loaded.card.source, variant=None, num_classes=7) is None


def test_short_names_load_from_the_bucket(server, monkeypatch):
    card = loading.read(PUBLISHED, log=print).card
    monkeypatch.setitem(VARIANTS, "T/8", card.dimensions)
    monkeypatch.setattr(published, "IMAGE_SIZE", 32)
    url = server.url("t/Mixer-T_8.npz")
    published_file = published.Published(url, "mixer", "T/8", 7)
    monkeypatch.setitem(published.CHECKPOINTS, "T/8-i1k", published_file)
    server.files = {"t/Mixer-T_8.npz": PUBLISHED.read_bytes()}
    _, params = mixer.load("T/8-i1k", log=lambda line: None)
    assert_same_bits(params, golden_params())
    loading.find(published_file.url, log=print)
    assert len(server.requests) == 1


# A file that changes on the server during a download.

OLD, NEW = bytes(5000), bytes([1]) * 5000


def _serve_changing_file(part):
    """Answers first with a truncated old file, then with `part`, then with the new file."""

    def answer(handler):
        number = len([path for path, _ in handler.server.requests if path == "x.npz"])
        if number == 1:
            handler.answer(OLD[:2000], length=5000, **part.get("first", {"ETag": '"old"'}))
        elif number == 2 and handler.headers["Range"]:
            handler.answer(NEW[2000:], code=206, **part["then"])
        else:
            handler.answer(NEW, ETag='"new"')

    return answer


@pytest.mark.parametrize(
    "part",
    [
        {"then": {"ETag": '"new"', "Content_Range": "bytes 2000-4999/5000"}},
        {"then": {"Content_Range": "bytes 2000-4999/5000"}},
        {"then": {"ETag": '"old"', "Content_Range": "bytes 2000-4999/6000"}},
        {"then": {"ETag": '"old"', "Content_Range": "bytes 1000-4999/5000"}},
        {"then": {"ETag": '"old"'}},
        {"first": {}, "then": {"Content_Range": "bytes 2000-4999/5000"}},
        {"first": {"ETag": 'W/"a"'}, "then": {"Content_Range": "bytes 2000-4999/5000"}},
        {
            "first": {"Last_Modified": "Mon, 01 Jan 2024 00:00:00 GMT"},
            "then": {
                "Last_Modified": "Tue, 02 Jan 2024 00:00:00 GMT",
                "Content_Range": "bytes 2000-4999/5000",
            },
        },
    ],
    ids=str,
)
def test_download_never_mixes_two_versions_of_a_file(server, part):
    server.files = {"x.npz": _serve_changing_file(part)}
    assert remote.fetch(server.url("x.npz"), log=print).read_bytes() == NEW


def test_download_resumes_if_the_version_is_unchanged(server):
    part = {"then": {"ETag": '"old"', "Content_Range": "bytes 2000-4999/5000"}}
    server.files = {"x.npz": _serve_changing_file(part)}
    assert remote.fetch(server.url("x.npz"), log=print).read_bytes() == OLD[:2000] + NEW[2000:]


def test_download_restarts_if_the_file_became_shorter(server):
    def answer(handler):
        if len(handler.server.requests) == 1:
            handler.answer(OLD[:2000], length=5000, ETag='"old"')
        elif handler.headers["Range"]:
            handler.send_error(416)
        else:
            handler.answer(NEW[:1000], ETag='"new"')

    server.files = {"x.npz": answer}
    assert remote.fetch(server.url("x.npz"), log=print).read_bytes() == NEW[:1000]


# Slow and endless responses.


def _send_slowly(pieces, secs=0.02):
    def answer(handler):
        deadline = time.monotonic() + 10
        try:
            while time.monotonic() < deadline:
                handler.wfile.write(pieces)
                handler.wfile.flush()
                time.sleep(secs)
        except OSError:
            pass  # the client has closed the connection

    return answer


def _respond(headers, send_body):
    def answer(handler):
        handler.wfile.write(headers)
        send_body(handler)

    return answer


LENGTH = b"HTTP/1.0 200 OK\r\nContent-Length: 100000\r\n\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(_respond(LENGTH, _send_slowly(b"x")), id="bytes"),
        pytest.param(
            _respond(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", _send_slowly(b"0")),
            id="chunk",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            _respond(b"HTTP/1.0 200 OK\r\nX-Long: ", _send_slowly(b"x")),
            id="header",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            _respond(b"", _send_slowly(b"", secs=1)), id="nothing", marks=pytest.mark.slow
        ),
    ],
)
def test_slow_download_is_aborted(server, monkeypatch, answer):
    monkeypatch.setattr(download, "SLOW_SECS", 0.4)
    server.files = {"x.npz": answer}
    start = time.monotonic()
    with pytest.raises(UserError, match=r"x\.npz: .*bytes in the last .*10,000 per second"):
        remote.fetch(server.url("x.npz"), log=print)
    assert time.monotonic() - start < 3
    assert not list(remote.cache_dir().rglob("*x.npz*"))


def test_download_has_a_total_time_limit(server, monkeypatch):
    monkeypatch.setattr(download, "MAX_SECS", 0.5)
    monkeypatch.setattr(download, "SLOW_SECS", 0.6)
    server.files = {"x.npz": _respond(b"HTTP/1.0 200 OK\r\n\r\n", _send_slowly(b"x" * 5000))}
    with pytest.raises(UserError, match=r"not finished after 0\.5 s"):
        remote.fetch(server.url("x.npz"), log=print)


def test_stalled_download_fails_after_two_attempts(server, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT_SECS", 0.2)
    headers = LENGTH.replace(b"OK\r\n", b'OK\r\nETag: "a"\r\n') + b"x" * 100
    server.files = {"x.npz": _respond(headers, lambda handler: time.sleep(0.6))}
    with pytest.raises(UserError, match=r"received 100 of 100,000 bytes in 2 attempts"):
        remote.fetch(server.url("x.npz"), log=print)


def test_endless_download_does_not_fill_the_disk(server, monkeypatch):
    usage = download.shutil.disk_usage("/")._replace(free=100_000)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage)
    server.files = {"x.npz": _respond(b"HTTP/1.0 200 OK\r\n\r\n", _send_slowly(b"x" * 20_000, 0))}
    with pytest.raises(UserError, match="cannot be written: the server sent no length"):
        remote.fetch(server.url("x.npz"), log=print)
    monkeypatch.setattr(remote, "MAX_CARD_BYTES", 100)
    server.files = {"x.npz": NEW, "x.npz.json": NEW}
    with pytest.raises(UserError, match=r"x\.npz\.json: 5,000 bytes; expected at most 100"):
        remote.fetch(server.url("x.npz"), log=print)


@pytest.mark.parametrize(
    "location",
    [
        "file:///etc/passwd",
        "ftp://h/x",
        f"http://[::1/x?{SECRET}",
        "http://h:port/x",
        "x\x00",
        "//",
    ],
)
def test_redirect_to_an_invalid_address_is_an_error(server, location):
    server.files = {"x.npz": lambda handler: handler.answer(b"", code=302, Location=location)}
    expect_error(
        server.url("x.npz"),
        r"x\.npz(: the server refused| redirects to .*not an HTTP URL| cannot be reached)",
    )


def test_redirects_are_followed_up_to_a_limit(server):
    def answer(handler):
        handler.answer(b"", code=302, Location=server.url(f"x.npz?{SECRET}"))

    server.files = {"x.npz": answer, "y.npz": lambda h: h.answer(b"", code=302, Location="z.npz")}
    expect_error(server.url("x.npz"), r"x\.npz: the server refused the request: 302")
    server.files["z.npz"] = NEW
    assert remote.fetch(server.url("y.npz"), log=print).read_bytes() == NEW


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("file:///x.npz", "file:// is not supported"),
        ("ftp://h/x.npz?" + SECRET, "ftp:// is not supported"),
        ("://x.npz", ":// is not supported"),
        ("1a://x/y.npz", "1a:// is not supported"),
        ("gs://", "no bucket"),
        ("gs:///x.npz", "no bucket"),
        (f"http://[::1/x.npz?{SECRET}", r"http://\[::1/x.npz is not an HTTP URL"),
        (f"https://me:{SECRET}@h/x.npz", "https://h/x.npz: expected a URL without a user"),
        (f"https://h:{SECRET}x/x.npz".replace(SECRET, "abc"), "is not an HTTP URL"),
        ("http://h:99999/x.npz", "is not an HTTP URL"),
        ("http:///x.npz", "is not an HTTP URL"),
        ("http://", "is not an HTTP URL"),
        ("https://é..x/y.npz", "is not an HTTP URL"),
        ("http://127.0.0.1:1/%00.npz", "the file's name"),
        ("http://127.0.0.1:1/" + "a" * 300 + ".npz", "the file's name"),
        ("http://127.0.0.1:1/x.npz\nmore", "is not an HTTP URL"),
        ("http://127.0.0.1:1/caf\udce9.npz", "is not an HTTP URL"),
        ("HTTP://127.0.0.1:1/é x.npz?q=" + SECRET, "%C3%A9%20x.npz cannot be reached"),
        ("http://127.0.0.1:1/model.pth?" + SECRET, "model.pth is a pickled file"),
        ("hf://a/../b.npz", "expected hf://owner/name"),
        ("a" * 300, "no such run or file"),
    ],
)
def test_invalid_address_is_an_error(tmp_path, monkeypatch, address, message):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    expect_error(address, message)


def test_missing_home_directory_is_an_error(monkeypatch):
    def raise_key_error(uid):
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", raise_key_error)
    for path in ("B/16-i1k", "https://h/x.npz", "gs://b/x.npz"):
        expect_error(path, "no home directory.*XDG_CACHE_HOME=DIR")


def test_error_for_a_damaged_cached_file_says_what_to_delete(server):
    corrupted_bytes = bytearray(PUBLISHED.read_bytes())
    corrupted_bytes[len(corrupted_bytes) // 2] ^= 255
    sidecar = json.dumps({"format": "mlp-mixer weights, 1"}).encode()
    server.files = {"x.npz": b"none", "y.npz": bytes(corrupted_bytes)}
    server.files |= {"z.npz": PUBLISHED.read_bytes(), "z.npz.json": sidecar}
    for name in "xyz":
        path = remote.fetch(server.url(f"{name}.npz"), log=print)
        expect_error(server.url(f"{name}.npz"), f"; delete {path} to fetch it again$")
        path.unlink()
    server.files = {"z.npz": PUBLISHED.read_bytes()}  # without its sidecar
    loading.read(server.url("z.npz"), log=print)
    assert not list(remote.cache_dir().rglob("*.json"))


def test_unfinished_downloads_of_dead_processes_are_removed(server):
    server.files = {"x.npz": NEW}
    path = remote.fetch(server.url("x.npz"), log=print)
    path.rename(path.with_name(".x.npz.1234.new"))
    remote.fetch(server.url("x.npz"), log=print)
    assert sorted(os.listdir(path.parent)) == [".lock", "x.npz"]


# Secrets.


def test_url_secrets_are_not_stored_or_logged(server, tmp_path):
    server.files = {"x.npz": PUBLISHED.read_bytes()}
    signed_url = server.url(f"x.npz?X-Amz-Signature={SECRET}&X-Amz-Date=1")
    lines = []
    loaded = loading.read(signed_url, log=lines.append)
    weights.write_file(
        tmp_path / "out.npz",
        traverse_util.flatten_dict(loaded.params, sep="/"),
        loaded.card,
        layout="published",
    )
    texts = [*lines, (tmp_path / "out.npz.json").read_text(), *map(str, tmp_path.rglob("*"))]
    assert SECRET not in " ".join(texts) and server.url("x.npz") in lines[0]
    # A new signature is the same file; any other change of the query is a different file.
    path = remote.fetch(server.url("x.npz?X-Amz-Signature=another"), log=print)
    assert path == remote.fetch(signed_url, log=print)
    assert remote.fetch(server.url("x.npz?version=2"), log=print) != path
    expect_error(server.url(f"y.npz?token={SECRET}"), r"y\.npz: no such file")


def test_config_comparison_ignores_the_query_of_a_url():
    saved_config = {"init_from": f"https://h/x.npz?token={SECRET}"}  # as older code saved it
    assert run.changes(saved_config, {"init_from": "https://h/x.npz"}) == []
    assert run.changes(saved_config, {"init_from": "https://h/y.npz"})
    assert published.redact("gs://b/x?y") == "gs://b/x?y"
    assert published.redact("odd?name.npz") == "odd?name.npz"


# Headers that contradict the file, and strange values.


def _npy(header, data=b"", version=1):
    header = header.encode("latin1")
    length = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + length + header + data


def _header_of_shape(shape):
    return f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n"


def _write_zip(path, member, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("stem/kernel.npy", member)
    return path


@pytest.mark.parametrize(
    "header",
    [
        *map(
            _header_of_shape, ("(10000000000, 10)", "(-1, 4)", "(True, 4)", "(" + "1," * 70 + ")")
        ),
        *map(
            _header_of_shape,
            ("(1.5,)", "None", "((1,),)", "(" + "9" * 5000 + ",)", "(0, 4)", "(8,)"),
        ),
        *("garbage", "{", "(" * 3000, "-" * 9000 + "1", "'''", "\t x\n y", "\xff\x00", "[]"),
        "{'descr': ('<f4', (1000000, 1000000)), 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '|V99999999999', 'fortran_order': False, 'shape': (1,)}",
    ],
    ids=lambda header: header[:60],
)
def test_array_headers_are_checked_against_the_file(tmp_path, header):
    path = _write_zip(tmp_path / "x.npz", _npy(header, bytes(16)))
    expect_error(path, r"x\.npz is not a valid npz file of arrays: \S")


def test_oversized_archives_are_rejected(tmp_path):
    consistent_array = _npy(_header_of_shape("(5000000,)"), bytes(20_000_000))
    trailing_data = _npy(_header_of_shape("(1,)"), bytes(20_000_000))
    header = _npy(" " * 5_000_000, version=2)
    for member, message in (
        (consistent_array, "would decompress to 20,0"),
        (trailing_data, "would"),
        (header, "would"),
    ):
        expect_error(_write_zip(tmp_path / "x.npz", member, zipfile.ZIP_DEFLATED), message)
    np.savez_compressed(tmp_path / "fine.npz", **read_arrays(PUBLISHED))
    loaded = loading.read(tmp_path / "fine.npz", log=print)
    assert_same_bits(loaded.params, golden_params())


@pytest.mark.parametrize("number", ["999999999", "9" * 5000, "12345678901"])
def test_huge_block_numbers_in_array_names_are_an_error(tmp_path, number):
    for path, name in (
        (PUBLISHED, "MixerBlock_{}/LayerNorm_0/scale"),
        (LEGACY, "Mixer/encoderblock_{}/LayerNorm_0/scale"),
    ):
        extra_array = {name.format(number): np.zeros(24, np.float32)}
        np.savez(tmp_path / "x.npz", **read_arrays(path), **extra_array)
        text = expect_error(tmp_path / "x.npz", f"{number[:9]}.*")
        assert "does not fit the model" in text and len(text) < 600


def test_array_names_do_not_break_the_error_line(tmp_path):
    np.savez(tmp_path / "x.npz", **{"a\nb\x1b[31m": np.zeros(1, np.float32)})
    assert "\x1b" not in expect_error(tmp_path / "x.npz", r"a\\nb")
    empty_array = {"stem/kernel": np.zeros((0, 8, 3, 24), np.float32)}
    np.savez(tmp_path / "x.npz", **read_arrays(PUBLISHED) | empty_array)
    expect_error(tmp_path / "x.npz", r"stem/kernel: \(0, 8, 3, 24\) is empty")


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "x.npz")
    expect_error(tmp_path / "x.npz", "is not a regular file")
    (tmp_path / "y.npz").symlink_to("/dev/zero")
    expect_error(tmp_path / "y.npz", "is not a regular file")
    (tmp_path / "z.npz").write_bytes(PUBLISHED.read_bytes())
    os.mkfifo(tmp_path / "z.npz.json")
    expect_error(tmp_path / "z.npz", r"z\.npz\.json is not a regular file")


ODD = (None, [], {}, 3, -1, True, "x", float("nan"), 1e999, [[[]]], 10**300, [10**9, 10**9])
ODD += ([True, 16], [float("nan")] * 3, [None] * 3, 1e-300, [1e308] * 3, [{}] * 7)


def _check_find_error(path):
    """Checks that `loading.find` succeeds or raises an error of one line."""
    try:
        loading.find(path, log=lambda line: None)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 600


def test_card_with_wrong_types_raises_a_one_line_error(tmp_path):
    loaded = loading.read(PUBLISHED, log=print)
    flat = traverse_util.flatten_dict(loaded.params, sep="/")
    path = tmp_path / "x.npz"
    card = weights.write_file(path, flat, loaded.card, layout="published")
    values = json.loads(card.read_text())
    for key in values:
        for value in (*ODD, "value_range(" + "(" * 300, "decode|value_range(1e999)"):
            card.write_text(json.dumps(values | {key: value}))
            with contextlib.suppress(UserError):
                card_file.read_card(path)
    for value in ODD:
        card.write_text(json.dumps(dict.fromkeys(values, value) | {"format": values["format"]}))
        _check_find_error(path)
    for value in ([True, 16], [10**9, 10**9], [32, 32.0]):
        card.write_text(json.dumps(values | {"image_size": value}))
        expect_error(path, "image_size=")
    for text in ("[" * 100_000, "{", '{"format": "mlp-mixer weights, 1"}', "1" * 5000):
        card.write_text(text)
        expect_error(path, r"x\.npz\.json (is damaged|lacks)")


def test_timm_config_with_wrong_types_raises_a_one_line_error(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(TIMM.read_bytes())
    pretrained_cfg = dict(tag="goog_in21k", mean=[0.5] * 3, std=[0.5] * 3, crop_pct=0.875)
    pretrained_cfg |= dict(interpolation="bicubic", crop_mode="center")
    config = {"architecture": "mixer_b16_224"}
    for value in ODD:
        for key in (*pretrained_cfg, "label_names"):
            text = json.dumps(config | {"pretrained_cfg": pretrained_cfg | {key: value}})
            (tmp_path / "config.json").write_text(text)
            _check_find_error(path)
        (tmp_path / "config.json").write_text(json.dumps(config | {"pretrained_cfg": value}))
        _check_find_error(path)
    for key, value in (("mean", [float("nan")] * 3), ("std", None), ("crop_pct", 1e-300)):
        text = json.dumps(config | {"pretrained_cfg": pretrained_cfg | {key: value}})
        (tmp_path / "config.json").write_text(text)
        expect_error(path, "is not a valid timm config")


@pytest.mark.parametrize("size", [10**9, (32, 10**9), 32 * 10**6, 10**400], ids=lambda s: "size")
def test_huge_image_size_is_rejected_before_allocation(size):
    for resize in ("grow", "interpolate"):
        expect_error(PUBLISHED, "GB of memory|image_size|sides", image_size=size, resize=resize)


# Weights written by other programs.


def _printed_code(text):
    """Returns the Python code of the command that an error message suggests."""
    command = text.split("`")[1]
    program, flag, code = shlex.split(command)
    assert (program, flag) == ("python", "-c")
    return code


@pytest.mark.parametrize("name", ["model_best.pth.tar", "checkpoint.pth", "a 'b'.bin", "x.CKPT"])
def test_suggested_command_converts_a_pickled_file(tmp_path, monkeypatch, name):
    """Stand-ins replace PyTorch and timm, which are not installed."""
    (tmp_path / name).write_bytes(b"\x80\x04.")
    text = expect_error(
        tmp_path / name, "is a pickled file, which is not opened because it can run code"
    )
    code = _printed_code(text)
    assert f'timm.models.load_state_dict("{name}")' in code
    stand_ins = """
import sys, types
class Tensor:
    def clone(self): return self
    def contiguous(self): return "saved"
saved = {}
def module(name, **values):
    sys.modules[name] = types.SimpleNamespace(**values)
    return sys.modules[name]
torch = module("torch", is_tensor=lambda value: isinstance(value, Tensor))
models = module("timm.models", load_state_dict=lambda name: {"stem": Tensor(), "epoch": 3})
module("timm", models=models)
safe = module("safetensors.torch", save_file=lambda values, out: print(values, out))
module("safetensors", torch=safe)
"""
    result = subprocess.run(
        [sys.executable, "-c", stand_ins + code], capture_output=True, text=True, cwd=tmp_path
    )
    output_name = name.partition(".")[0] + ".safetensors"
    assert result.stdout.strip() == f"{{'stem': 'saved'}} {output_name}", result.stderr


def test_big_vision_checkpoints_are_recognised(tmp_path):
    step = tmp_path / "run" / "checkpoint.bv-000000100"
    (step / "params~stem~kernel").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint.bv-LAST").write_text("000000100")
    last_checkpoint = str(tmp_path / "run" / "checkpoint.bv")
    for path, checkpoint in (
        (step, str(step)),
        (tmp_path / "run", last_checkpoint),
        (tmp_path / "run" / "checkpoint.bv", last_checkpoint),
        (tmp_path / "run" / "checkpoint.bv-LAST", last_checkpoint),
    ):
        code = _printed_code(expect_error(path, "is a big_vision checkpoint"))
        assert f'u.tree_flatten_with_names(u.load_params("{checkpoint}"))' in code
        compile(code, "line", "exec")
    result = run_program("mixer.tools.convert", tmp_path / "run", tmp_path / "out.npz")
    assert result.returncode == 2 and "is a big_vision checkpoint" in result.stderr


def test_vision_transformer_checkpoints_are_recognised(tmp_path):
    (tmp_path / "vt").mkdir()
    (tmp_path / "vt" / "checkpoint_100").write_bytes(b"msgpack")
    (tmp_path / "orbax" / "checkpoint_20" / "d").mkdir(parents=True)
    for path in (
        tmp_path / "vt",
        tmp_path / "vt" / "checkpoint_100",
        tmp_path / "orbax",
        tmp_path / "orbax" / "checkpoint_20",
    ):
        code = _printed_code(expect_error(path, "is a Flax checkpoint"))
        assert f'restore_checkpoint("{path}", None)["0"]' in code
        compile(code, "line", "exec")


@pytest.mark.slow  # flax.training.checkpoints takes 3 s to import
def test_suggested_command_converts_a_vision_transformer_checkpoint(tmp_path, monkeypatch):
    params = traverse_util.unflatten_dict(read_arrays(PUBLISHED), sep="/")
    state = (params, {"0": {"trace": params}}, 100)
    (tmp_path / "vt").mkdir()
    (tmp_path / "vt" / "checkpoint_100").write_bytes(serialization.to_bytes(state))
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "vt", tmp_path / "vt" / "checkpoint_100"):
        exec(_printed_code(expect_error(path, "is a Flax checkpoint")), {})
        converted_arrays = read_arrays(tmp_path / "checkpoint_100.npz")
        assert_same_bits(traverse_util.unflatten_dict(converted_arrays, sep="/"), golden_params())
        (tmp_path / "checkpoint_100.npz").unlink()


def test_hub_folder_error_names_the_file_to_pass(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    expect_error(tmp_path, r"pytorch_model\.bin is a pickled file")
    (tmp_path / "other.safetensors").write_bytes(TIMM.read_bytes())
    expect_error(tmp_path, rf"pass a file in it instead: {tmp_path}/other\.safetensors")
    assert foreign.advice(tmp_path / "none") == ""


# Weights without a head.


@pytest.fixture(scope="module")
def headless(tmp_path_factory):
    arrays = {k: v for k, v in read_arrays(PUBLISHED).items() if not k.startswith("head/")}
    path = tmp_path_factory.mktemp("headless") / "x.npz"
    np.savez(path, **arrays)
    return path


def test_headless_weights_can_be_converted(headless, tmp_path):
    original_weights = loading.read(headless, log=print)
    assert original_weights.card.num_classes == 0 and "head" not in original_weights.params
    for name in ("b.safetensors", "run"):
        result = run_program("mixer.tools.convert", headless, tmp_path / name)
        assert result.returncode == 0, result.stderr
        converted_weights = loading.read(tmp_path / name, log=print)
        assert converted_weights.card == original_weights.card
        assert_same_bits(converted_weights.params, original_weights.params)
    headless_weights = loading.read(PUBLISHED, num_classes=0, log=print)
    assert_same_bits(headless_weights.params, original_weights.params)
    with pytest.raises(UserError, match="head/kernel: not in the model"):
        loading.read(PUBLISHED, num_classes=0, head="keep", log=print)


def test_unwritable_output_is_a_one_line_error(headless, tmp_path, monkeypatch):
    for output_path in (tmp_path / ("a" * 300 + ".npz"), "/proc/x.npz", "/proc/run"):
        result = run_program("mixer.tools.convert", headless, output_path)
        assert result.returncode == 2 and "cannot be written" in result.stderr
        assert len(result.stderr.splitlines()) == 1

    def raise_disk_full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array", raise_disk_full)
    result = run_program("mixer.tools.convert", headless, tmp_path / "y.npz")
    assert result.returncode == 2 and "y.npz cannot be written: No space left" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "x.png"
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_headless_weights_give_features_only(headless, picture, tmp_path):
    output_path = tmp_path / "features.npz"
    arguments = (picture, f"--weights={headless}", "--preprocess=decode")
    result = run_program("mixer.tools.predict", *arguments, f"--features={output_path}")
    assert result.returncode == 0, result.stderr
    assert read_arrays(output_path)["features"].shape == (1, 24) and not result.stdout
    for options in ((), (f"--features={output_path}", "--layer=logits")):
        result = run_program("mixer.tools.predict", *arguments, *options)
        assert result.returncode == 2 and "has no head" in result.stderr


@pytest.mark.slow
def test_headless_weights_can_be_probed_but_cannot_classify(headless, tmp_path):
    config = tiny_config(image_size=32, global_batch_size=32)

    def open_weights():
        return open_subject(str(headless), config=config, output=str(tmp_path))

    report.evaluate([open_weights], report.Options(suite=["fewshot"]))
    assert "fewshot" in json.loads((tmp_path / "results.json").read_text())
    with pytest.raises(UserError, match=r"no head.*fewshot"):
        report.evaluate([open_weights], report.Options(splits=["test"]))


@pytest.mark.slow
def test_run_from_a_url_resumes_and_stores_no_secret(server, tmp_path, capsys):
    server.files = {"x.npz": PUBLISHED.read_bytes()}
    schedule = dict(dataset__val_split="", dataset__test_split="", checkpoint__every_steps=2)
    schedule |= dict(schedule__warmup_steps=1)
    dims = {f"model__{name}": None for name in ARCHITECTURES["mixer"].dimensions}
    for steps in (2, 4):
        address = server.url(f"x.npz?token={SECRET}{steps}")
        config = tiny_config(
            init_from=address, image_size=32, total_steps=steps, **schedule, **dims
        )
        trainer.train(config, str(tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["init_from"] == server.url(
        "x.npz"
    )
    assert SECRET not in capsys.readouterr().out
    for path in (tmp_path / "run").rglob("*"):
        assert SECRET not in path.name
        assert path.is_dir() or SECRET.encode() not in path.read_bytes()
    result = run_program(
        "evaluate.py",
        f"--weights={server.url(f'x.npz?token={SECRET}')}",
        "--suite=throughput",
        "--batch_sizes=1",
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert SECRET not in result.stdout + result.stderr
    for path in (tmp_path / "runs").rglob("*"):
        assert SECRET not in str(path)
        assert path.is_dir() or SECRET.encode() not in path.read_bytes()
