"""Tests what weight names imply, and downloads from a local server, without a network."""

import http.server
import json
import sys
import threading
import types
import zlib

import numpy as np
import pytest

from mixer.errors import UserError
from mixer.weights import fetch as remote
from mixer.weights import published
from mixer.weights.published import CHECKPOINTS, facts, timm_facts

TIMM_OPS = (
    "decode(dct='accurate')|resize_small(256, method='bicubic', antialias=True)|central_crop(224)"
)
MIIL_OPS = (
    "decode(dct='accurate')|resize_small(256, method='bilinear', antialias=True)|central_crop(224)"
    "|value_range(0, 1)"
)
HUB_CACHE = "/cache/models--timm--mixer_b16_224.goog_in21k/snapshots/0a"
BV_OPS = "decode|resize_small(256, method='area', published=True)|central_crop(224)"


def _shapes(variant, num_classes):
    import jax

    from mixer.models.registry import make_model

    model = make_model(variant=variant, num_classes=num_classes)
    init = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 224, 224, 3), np.float32))
    flat = jax.tree_util.tree_leaves_with_path(init["params"])
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in flat}


@pytest.mark.parametrize(
    "name",
    [
        "B/16-i1k",
        "S/8-gsam",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("L/16-i21k", "B/32-sam", "S/32-gsam")),
    ],
)
def test_released_file_sizes_and_shapes_are_checked(name):
    checkpoint = CHECKPOINTS[name]
    shapes = _shapes(checkpoint.variant, checkpoint.num_classes)
    size = 4 * checkpoint.num_params + 20_000
    published.check(checkpoint, shapes, size)
    with pytest.raises(UserError, match=rf"{size - 30_000:,}"):
        published.check(checkpoint, shapes, size - 30_000)
    with pytest.raises(UserError, match=rf"{size + 2_000_000:,}"):
        published.check(checkpoint, shapes, size + 2_000_000)
    headless_shapes = {key: shape for key, shape in shapes.items() if "head" not in key}
    with pytest.raises(UserError, match=rf"{checkpoint.num_params:,} .*\d"):
        published.check(checkpoint, headless_shapes, size)


def test_released_checkpoints_have_the_right_urls_and_classes():
    assert len(CHECKPOINTS) == 16 == len({checkpoint.url for checkpoint in CHECKPOINTS.values()})
    url = "https://storage.googleapis.com/mixer_models/"
    for name, checkpoint in CHECKPOINTS.items():
        assert checkpoint.num_classes == (21843 if name.endswith("i21k") else 1000)
    assert CHECKPOINTS["L/16-i21k"].url == f"{url}imagenet21k/Mixer-L_16.npz"
    assert CHECKPOINTS["S/8-gsam"].url == f"{url}gsam/Mixer-S_8.npz"
    for source in ("B/16-sam", f"{url}sam/Mixer-B_16.npz", "gs://mixer_models/sam/Mixer-B_16.npz"):
        assert published.find(source) is CHECKPOINTS["B/16-sam"]
    assert published.find("gs://mixer_models/sam/Mixer-L_16.npz") is None
    vit_checkpoint = CHECKPOINTS["ViT-B/16-i21k"]
    assert published.find("gs://vit_models/imagenet21k/ViT-B_16.npz") is vit_checkpoint
    assert vit_checkpoint.url.startswith("https://storage.googleapis.com/vit_models/")
    # 86,567,656 with 1,000 classes (REFERENCE, section 4); 20,843 more, and the layer before them.
    assert vit_checkpoint.num_params == 86_567_656 + 20_843 * 769 + 768 * 769
    assert published.find("runs/Mixer-B_16.npz") is None


def test_short_names_are_resolved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # big_vision uses this name.
    assert published.by_short_name("B-i21k/16") is CHECKPOINTS["B/16-i21k"]
    for name in ("B/16-i12k", "H/14-jft", "B/16", "b/16-i1k"):
        with pytest.raises(UserError, match=rf"{name}'.*B/16-i1k, L/16-i1k, "):
            published.by_short_name(name)
    with pytest.raises(UserError, match=r"'B/16-i1k'"):
        published.by_short_name("B/16-i12k")
    for path in ("runs/digits", "runs/16", "B/16.npz", "/B/16-i1k", "./B/16-i1k"):
        assert published.by_short_name(path) is None
    (tmp_path / "B" / "16-i1k").mkdir(parents=True)  # an existing path takes precedence
    assert published.by_short_name("B/16-i1k") is None


@pytest.mark.parametrize(
    ("source", "num_classes", "class_names", "ops"),
    [
        ("B/16-i1k", 1000, "imagenet1k", BV_OPS),
        ("gs://mixer_models/imagenet21k/Mixer-B_16.npz", 21843, "imagenet21k", BV_OPS),
        ("/data/Mixer-L_16.npz", 1000, "imagenet1k", BV_OPS),
        ("/data/Mixer-B_16.npz", 10, None, None),  # fine-tuned
        ("/data/mine.npz", 1000, None, None),
        ("/data/mine.npz", 21843, "imagenet21k", None),
        ("/data/mine.npz", 11221, "imagenet21k_miil", None),
    ],
)
def test_name_of_an_npz_file_implies_classes_and_preprocessing(
    source, num_classes, class_names, ops
):
    implied_facts = facts(source, layout="published", num_classes=num_classes)
    assert (implied_facts.class_names, implied_facts.preprocess((224, 224))) == (class_names, ops)
    by_name = ops is not None and source.startswith("/")  # recognised by file name, not by URL
    assert ("imagenet1k" in implied_facts.note) == by_name and bool(implied_facts.note) == by_name


@pytest.mark.parametrize(
    ("source", "num_classes", "class_names", "ops", "notes"),
    [
        ("hf://timm/mixer_b16_224.goog_in21k_ft_in1k", 1000, "imagenet1k", TIMM_OPS, "651 tanh"),
        ("hf://timm/mixer_l16_224.goog_in21k", 21843, "imagenet21k", TIMM_OPS, "tanh"),
        ("hf://timm/mixer_b16_224.miil_in21k", 11221, "imagenet21k_miil", MIIL_OPS, ""),
        ("/w/mixer_b16_224.miil_in21k_ft_in1k.safetensors", 1000, "imagenet1k", MIIL_OPS, ""),
        ("/w/mixer_b16_224_miil-9229a591.safetensors", 1000, "imagenet1k", MIIL_OPS, ""),
        ("mixer_b16_224.goog_in21k_tuned.safetensors", 1000, None, None, ""),  # a user's file
        ("/w/jx_mixer_b16_224-76587d61.safetensors", 1000, "imagenet1k", TIMM_OPS, "651 tanh"),
        (HUB_CACHE + "/model.safetensors", 21843, "imagenet21k", TIMM_OPS, "tanh"),
        ("/w/mixer_b16_224.goog_in21k_ft_in1k/model.safetensors", 37, None, None, ""),
        ("/w/mixer_b16_224.safetensors", 1000, None, None, ""),
        ("/googler/miil/model.safetensors", 1000, None, None, ""),
    ],
)
def test_timm_name_implies_classes_and_preprocessing(source, num_classes, class_names, ops, notes):
    implied_facts = facts(source, layout="timm", num_classes=num_classes)
    assert (implied_facts.class_names, implied_facts.preprocess((224, 224))) == (class_names, ops)
    assert bool(implied_facts.note) == bool(notes)
    for word in notes.split():
        assert word in implied_facts.note
    assert ("651" in implied_facts.note) == ("651" in notes)


def test_implied_preprocessing_depends_on_the_image_size():
    npz = facts("B/16-i1k", layout="published", num_classes=1000).preprocess
    assert npz((448, 448)) == BV_OPS.replace("256", "512").replace("224", "448")
    timm = facts("mixer_b16_224.goog_in21k", layout="timm", num_classes=21843).preprocess
    assert timm((448, 448)).startswith("decode(dct='accurate')|resize_small(512, method='bicubic'")
    assert npz((224, 448)) is None and timm((224, 448)) is None


@pytest.mark.parametrize(
    "source",
    [
        "hf://timm/gmixer_24_224.ra3_in1k",
        "/w/resmlp_big_24_224.fb_in1k.safetensors",
        "https://host/timm/gmlp_s16_224.ra3_in1k/resolve/main/model.safetensors",
        "/w/mixer_b16_224.goog_in21k/resmlp_12_distilled_224.safetensors",
    ],
)
def test_other_architectures_are_named_in_the_error(source):
    with pytest.raises(UserError, match=r"^(gmixer|resmlp|gmlp)_\S+"):
        facts(source, layout="timm", num_classes=1000)


def test_folder_names_do_not_imply_an_architecture():
    for source in ("/gmixer_trials/a.safetensors", "/gmlp_s16_224/mixer_b16_224.safetensors"):
        facts(source, layout="timm", num_classes=5)


def _hub_config(tag="goog_in21k_ft_in1k", architecture="mixer_b16_224", **values):
    pretrained_cfg = dict(
        tag=tag, mean=[0.5] * 3, std=[0.5] * 3, interpolation="bicubic", crop_pct=0.875
    )
    pretrained_cfg.update(input_size=[3, 224, 224], crop_mode="center", num_classes=1000)
    label_names = values.pop("label_names", None)
    config = {
        "architecture": architecture,
        "num_classes": 1000,
        "pretrained_cfg": pretrained_cfg | values,
    }
    return config | ({"label_names": label_names} if label_names else {})


def _timm_facts(fields, num_classes=1000):
    return timm_facts(fields, source="hf://me/mine", num_classes=num_classes)


def test_timm_config_implies_classes_and_preprocessing():
    implied_facts = _timm_facts(_hub_config())
    assert (implied_facts.class_names, implied_facts.preprocess((224, 224))) == (
        "imagenet1k",
        TIMM_OPS,
    )
    assert "651" in implied_facts.note and "tanh" in implied_facts.note
    miil = dict(mean=[0.0] * 3, std=[1.0] * 3, interpolation="bilinear")
    implied_facts = _timm_facts(_hub_config("miil_in21k", **miil), 11221)
    assert implied_facts.preprocess((224, 224)) == MIIL_OPS
    assert (implied_facts.class_names, implied_facts.note) == ("imagenet21k_miil", "")
    user_config = _hub_config(
        "", mean=[0.25] * 3, std=[0.5] * 3, crop_pct=1.0, label_names=["cat", "dog"]
    )
    implied_facts = _timm_facts(user_config, 2)
    assert implied_facts.class_names == ("cat", "dog")
    assert implied_facts.preprocess((64, 64)).endswith(
        "resize_small(64, method='bicubic', antialias=True)|central_crop(64)|value_range(-0.5, 1.5)"
    )
    # Two class names do not fit a head of three classes.
    assert _timm_facts(user_config, 3).class_names is None
    # Early exports of timm have a flat config.
    flat_config = {"architecture": "mixer_b16_224", **_hub_config()["pretrained_cfg"]}
    assert _timm_facts(flat_config).preprocess((224, 224)) == TIMM_OPS


def test_timm_squash_resizes_both_sides():
    ops_for = _timm_facts(_hub_config(crop_mode="squash")).preprocess
    resize = "decode(dct='accurate')|resize({}, method='bicubic', antialias=True)"
    assert ops_for((224, 224)) == resize.format(256) + "|central_crop(224)"
    assert ops_for((64, 96)) is None
    ops_for = _timm_facts(_hub_config(crop_mode="squash", crop_pct=1.0)).preprocess
    assert ops_for((64, 96)) == resize.format((64, 96))
    assert ops_for((64, 64)) == resize.format(64)


def test_timm_config_implies_the_image_size():
    assert _timm_facts(_hub_config(input_size=[3, 64, 96])).image_size == (64, 96)
    for side, size in ((448, (448, 448)), ([64, 96], (64, 96))):
        config = _hub_config() | {"model_args": {"img_size": side}}
        assert _timm_facts(config).image_size == size
    assert _timm_facts(_hub_config(input_size=None)).image_size is None
    for size in ([3, 0, 0], [3, "a", "b"], 7):
        with pytest.raises(UserError, match=r"config\.json of hf://me/mine"):
            _timm_facts(_hub_config(input_size=size))


def test_timm_preprocessing_without_an_equivalent_op_is_noted():
    imagenet = dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    for values, word in ((imagenet, "0.485"), (dict(crop_mode="border"), "border")):
        implied_facts = _timm_facts(_hub_config(**values))
        assert implied_facts.preprocess((224, 224)) is None
        assert implied_facts.class_names == "imagenet1k"
        assert word in implied_facts.note and "hf://me/mine" in implied_facts.note


@pytest.mark.parametrize(
    "values",
    [dict(std=[0.0] * 3), dict(mean=None), dict(crop_pct="much"), dict(mean=[]), dict(crop_pct=0)],
    ids=str,
)
def test_invalid_timm_config_is_an_error(values):
    with pytest.raises(UserError, match=r"config\.json of hf://me/mine"):
        _timm_facts(_hub_config(**values))


def test_timm_config_of_another_architecture_is_an_error():
    with pytest.raises(UserError, match=r"gmlp_s16_224\.ra3_in1k.*gMLP"):
        _timm_facts(_hub_config("ra3_in1k", "gmlp_s16_224"))


# Downloads.


class _Server(http.server.ThreadingHTTPServer):
    """Serves `files` (path: bytes); `rules` (path: options) change the answers."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.rules, self.requests = {}, {}, []

    def url(self, path):
        return f"http://127.0.0.1:{self.server_address[1]}/{path}"


class _Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        path = self.path.split("?")[0].lstrip("/")
        rule = self.server.rules.get(path, {})
        start = int((self.headers["Range"] or "bytes=0-")[6:-1])
        self.server.requests.append((path, start))
        data = self.server.files.get(path)
        if data is None or "code" in rule:
            self.send_error(rule.get("code", 404))
            return
        tag = f'"{zlib.crc32(data)}"'
        if rule.get("no_range") or self.headers["If-Range"] != tag:
            start = 0
        self.send_response(206 if start else 200)
        self.send_header("ETag", tag)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Type", rule.get("type", "application/octet-stream"))
        if not rule.get("no_length"):
            self.send_header("Content-Length", str(rule.get("length", len(data)) - start))
        self.end_headers()
        self.wfile.write(data[start : start + rule.get("at_most", len(data))])


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


DATA = bytes(range(256)) * 20


def _fetch(source):
    lines = []
    path = remote.fetch(source, log=lines.append)
    assert len(lines) == 1
    return path, lines[0]


def _cached():
    return [path.name for path in remote.cache_dir().rglob("*") if path.is_file()]


def test_download_is_cached_with_its_name_and_json(server):
    server.files = {"a/Mixer-B_16.npz": DATA, "a/Mixer-B_16.npz.json": b'{"x": 1}'}
    path, line = _fetch(server.url("a/Mixer-B_16.npz?download=true"))
    assert path.read_bytes() == DATA and path.name == "Mixer-B_16.npz"
    assert json.loads(path.with_name(path.name + ".json").read_text()) == {"x": 1}
    assert server.url("a/Mixer-B_16.npz") in line and str(path) in line
    num_requests = len(server.requests)
    cached_path, line = _fetch(server.url("a/Mixer-B_16.npz?download=true"))
    assert cached_path == path and "cached" in line and len(server.requests) == num_requests
    other_path, _ = _fetch(server.url("a/Mixer-B_16.npz"))  # a different URL has its own folder
    assert other_path != path


def test_json_is_optional_and_timm_config_is_downloaded(server):
    server.files = {"x.npz": DATA, "m/model.safetensors": DATA, "m/config.json": b"{}"}
    server.rules = {"x.npz.json": dict(code=403)}
    path, _ = _fetch(server.url("x.npz"))
    assert sorted(_cached()) == [".lock", "x.npz"]
    path, _ = _fetch(server.url("m/model.safetensors"))
    assert (path.parent / "config.json").read_text() == "{}"
    assert not (path.parent / "model.safetensors.json").exists()


def test_interrupted_download_resumes(server):
    server.files = {"x.npz": DATA}
    server.rules = {"x.npz": dict(at_most=2000)}
    path, _ = _fetch(server.url("x.npz"))
    assert path.read_bytes() == DATA
    assert server.requests[:3] == [("x.npz", 0), ("x.npz", 2000), ("x.npz", 4000)]


def test_download_without_range_support_restarts(server):
    server.files = {"x.npz": DATA}
    server.rules = {"x.npz": dict(at_most=3000, no_range=True)}
    with pytest.raises(UserError, match=r"3,000 of 5,120 .* 4 "):
        remote.fetch(server.url("x.npz"), log=print)
    assert _cached() == [".lock"]


def test_download_of_unknown_length_completes(server):
    server.files, server.rules = {"x.npz": DATA}, {"x.npz": dict(no_length=True)}
    assert _fetch(server.url("x.npz"))[0].read_bytes() == DATA


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (dict(code=404), "404"),
        (dict(code=403), "403"),
        (dict(code=401), "401"),
        (dict(code=500), "500"),
        (dict(type="text/html; charset=utf-8"), "web page"),
        (dict(length=6000), "5,120 of 6,000"),
        (dict(length=10**15), r"1,000,000,000.0 MB.* free"),
    ],
    ids=str,
)
def test_failed_download_leaves_no_file(server, rule, message):
    server.files, server.rules = {"x.npz": DATA, "x.npz.json": b"{}"}, {"x.npz": rule}
    with pytest.raises(UserError, match=message):
        remote.fetch(server.url("x.npz"), log=print)
    assert _cached() == [".lock"]


def test_failed_json_download_leaves_no_file(server):
    """Weights must not be cached without the JSON file that describes them."""
    server.files, server.rules = {"x.npz": DATA}, {"x.npz.json": dict(code=500)}
    with pytest.raises(UserError, match=r"x.npz.json.* 500"):
        remote.fetch(server.url("x.npz"), log=print)
    assert _cached() == [".lock"]


def test_refused_connection_and_unsupported_suffix_are_errors(server):
    with http.server.HTTPServer(("127.0.0.1", 0), _Handler) as closed_server:
        closed_url = f"http://127.0.0.1:{closed_server.server_address[1]}/x.npz"
    with pytest.raises(UserError, match="Connection refused"):
        remote.fetch(closed_url, log=print)
    for name in ("pytorch_model.bin", "mixer.pth", ""):
        with pytest.raises(UserError, match=r"\.npz or \.safetensors"):
            remote.fetch(server.url(name), log=print)
    assert not server.requests


def test_unwritable_cache_is_an_error(server, tmp_path):
    server.files = {"x.npz": DATA}
    (tmp_path / "cache").write_text("a file is in the way")
    with pytest.raises(UserError, match=r"Not a directory.*XDG_CACHE_HOME"):
        remote.fetch(server.url("x.npz"), log=print)


def test_second_process_waits_and_uses_the_first_download(server, monkeypatch):
    import fcntl

    server.files = {"x.npz": DATA}
    path, _ = _fetch(server.url("x.npz"))
    path.unlink()
    server.requests.clear()
    lock = fcntl.flock

    def flock_after_download(file, operation):
        lock(file, operation)
        path.write_bytes(b"from the first")

    monkeypatch.setattr(fcntl, "flock", flock_after_download)
    assert remote.fetch(server.url("x.npz"), log=print).read_bytes() == b"from the first"
    assert not server.requests


def test_progress_bar_is_drawn_on_a_terminal_only(server, monkeypatch, capsys):
    server.files = {"x.npz": DATA}
    remote.fetch(server.url("x.npz"), log=lambda line: None)
    out, err = capsys.readouterr()
    assert out == err == ""
    monkeypatch.setenv("FORCE_COLOR", "1")  # makes rich assume a terminal
    remote.fetch(server.url("x.npz?again"), log=lambda line: None)
    out, err = capsys.readouterr()
    assert out == "" and "x.npz" in err


def test_is_remote_file_accepts_urls_and_short_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("B/16-i1k", "https://h/x.npz", "hf://a/b", "gs://b/x.npz", "gs://b/x.safetensors"):
        assert remote.is_remote_file(path)
    for path in ("runs/digits", "gs://b/runs/digits", "x.npz", tmp_path):
        assert not remote.is_remote_file(path)
    assert remote.fetch("~/x.npz", log=print) == remote.epath.Path("~/x.npz").expanduser()
    with pytest.raises(UserError, match="B/17-i1k"):
        remote.is_remote_file("B/17-i1k")


@pytest.fixture
def storage(tmp_path, monkeypatch):
    """Maps gs://bucket to a local folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    epath_class = remote.epath.Path

    def path(address):
        return epath_class(str(address).replace("gs://bucket", str(bucket)))

    monkeypatch.setattr(remote, "epath", types.SimpleNamespace(Path=path, PathLike=str))
    return bucket


def test_weights_are_copied_from_cloud_storage(storage):
    (storage / "x.npz").write_bytes(DATA)
    (storage / "x.npz.json").write_text("{}")
    path, line = _fetch("gs://bucket/x.npz")
    assert path.read_bytes() == DATA and path.with_name(path.name + ".json").read_text() == "{}"
    assert line.startswith("gs://bucket/x.npz: ") and "0.0 MB" in line
    with pytest.raises(UserError, match=r"gs://bucket/y\.npz"):
        remote.fetch("gs://bucket/y.npz", log=print)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ImportError("gcsfs"), "TensorFlow.*gcsfs"),
        (RuntimeError("no credentials\nmore"), "no credentials$"),
    ],
)
def test_cloud_storage_failure_is_one_line_of_error(storage, monkeypatch, error, message):
    def path(address):
        raise error

    monkeypatch.setattr(remote.epath, "Path", path)
    monkeypatch.setattr(remote.published, "by_short_name", lambda path: None)
    with pytest.raises(UserError, match=message):
        remote.fetch("gs://bucket/x.npz", log=print)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Stands in for huggingface_hub 1.x, with one repository and the library's errors."""
    folder = tmp_path / "models--timm--mixer_b16_224.goog_in21k" / "snapshots" / "0a"
    folder.mkdir(parents=True)
    errors = types.ModuleType("huggingface_hub.errors")
    for name, base_classes in (
        ("EntryNotFoundError", (Exception,)),
        ("LocalEntryNotFoundError", (FileNotFoundError,)),
        ("HfHubHTTPError", (OSError,)),
        ("RepositoryNotFoundError", ("HfHubHTTPError",)),
        ("GatedRepoError", ("RepositoryNotFoundError",)),
        ("HFValidationError", (ValueError,)),
    ):
        bases = tuple(
            getattr(errors, base) if isinstance(base, str) else base for base in base_classes
        )
        if name == "LocalEntryNotFoundError":
            bases += (errors.EntryNotFoundError,)
        setattr(errors, name, type(name, bases, {}))

    def hf_hub_download(repository, file):
        if module.fault and not (module.offline and (folder / file).exists()):
            raise module.fault
        if repository != "timm/mixer_b16_224.goog_in21k":
            raise errors.RepositoryNotFoundError("404\n\nRepository Not Found")
        if not (folder / file).exists():
            raise errors.EntryNotFoundError(f"404\n\nno {file}")
        return str(folder / file)

    module = types.ModuleType("huggingface_hub")
    module.errors, module.hf_hub_download = errors, hf_hub_download
    module.list_repo_files = lambda repository: [path.name for path in folder.iterdir()]
    module.fault, module.offline = None, False
    module.utils = types.SimpleNamespace(disable_progress_bars=lambda: None)
    module.folder = folder
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return module


def test_weights_are_downloaded_from_the_hub(hub):
    (hub.folder / "model.safetensors").write_bytes(DATA)
    (hub.folder / "config.json").write_text("{}")
    path, line = _fetch("hf://timm/mixer_b16_224.goog_in21k")
    assert path.read_bytes() == DATA and str(path) in line
    (hub.folder / "sub").mkdir()
    (hub.folder / "sub" / "x.npz").write_bytes(b"npz")
    assert _fetch("hf://timm/mixer_b16_224.goog_in21k/sub/x.npz")[0].read_bytes() == b"npz"


def test_sharded_hub_file_is_fetched_with_its_shards(hub):
    places = {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}
    index = hub.folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    (hub.folder / "config.json").write_text("{}")
    (hub.folder / places["a"]).write_bytes(DATA)
    repository = "hf://timm/mixer_b16_224.goog_in21k"
    with pytest.raises(UserError, match=r"has no file that its model\.safetensors\.index\.json"):
        remote.fetch(repository, log=print)
    (hub.folder / places["b"]).write_bytes(DATA)
    for name in (repository, f"{repository}/{index.name}"):
        assert _fetch(name)[0] == remote.epath.Path(index)
    (hub.folder / "model.safetensors").write_bytes(DATA)  # is preferred
    assert _fetch(repository)[0].name == "model.safetensors"


def test_hub_error_suggests_a_conversion(hub):
    for name in ("README.md", "pytorch_model.bin"):
        (hub.folder / name).write_bytes(b"")
    repository = "hf://timm/mixer_b16_224.goog_in21k"
    pickled = (
        rf"has no model\.safetensors.*{repository}/pytorch_model\.bin is a pickled file.*python -c"
    )
    with pytest.raises(UserError, match=pickled):
        remote.fetch(repository, log=print)
    with pytest.raises(UserError, match=r"flax_model\.msgpack is a Flax msgpack file.*python -c"):
        remote.fetch(f"{repository}/flax_model.msgpack", log=print)


def test_offline_hub_uses_cached_weights_and_names_missing_files(hub):
    (hub.folder / "model.safetensors").write_bytes(DATA)
    (hub.folder / "config.json").write_text("{}")
    hub.fault, hub.offline = hub.errors.LocalEntryNotFoundError("x"), True
    path, line = _fetch("hf://timm/mixer_b16_224.goog_in21k")
    assert path.read_bytes() == DATA and "model.safetensors.json" in line
    (hub.folder / "config.json").unlink()
    assert (
        "model.safetensors.json and config.json" in _fetch("hf://timm/mixer_b16_224.goog_in21k")[1]
    )


def test_hub_failures_are_one_line_of_error(hub, monkeypatch):
    repository = "hf://timm/mixer_b16_224.goog_in21k"
    errors = hub.errors
    for fault, path, message in (
        (None, repository, "model.safetensors"),
        (None, f"{repository}/pytorch_model.bin", "pytorch_model.bin"),
        (None, "hf://me/mine", "hf://me/mine: "),
        (None, "hf://mine", "hf://owner/name"),
        (None, "hf://timm/gmixer_24_224.ra3_in1k", "gmixer_24_224"),
        (errors.LocalEntryNotFoundError("x"), repository, "goog_in21k.*cache"),
        (errors.GatedRepoError("x"), repository, "terms"),
        (errors.HFValidationError("bad\nname"), "hf://a b/c", "bad$"),
        (ConnectionError("no route"), repository, "no route"),
    ):
        hub.fault = fault
        with pytest.raises(UserError, match=message):
            remote.fetch(path, log=print)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"huggingface_hub.*\[hub\]"):
        remote.fetch(repository, log=print)


def test_fetch_does_not_import_tensorflow():
    from helpers import run_python

    code = "import sys; sys.modules['tensorflow'] = None; import mixer.weights.fetch; print('fine')"
    assert run_python("-c", code).stdout.strip() == "fine"
