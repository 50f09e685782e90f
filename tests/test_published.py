"""What names of sources say, and fetching: with a server on this machine, without a network."""

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

TIMM_STEPS = (
    "decode(dct='accurate')|resize_small(256, method='bicubic', antialias=True)|central_crop(224)"
)
MIIL_STEPS = (
    "decode(dct='accurate')|resize_small(256, method='bilinear', antialias=True)|central_crop(224)"
    "|value_range(0, 1)"
)
HUB_CACHE = "/cache/models--timm--mixer_b16_224.goog_in21k/snapshots/0a"
BV_STEPS = "decode|resize_small(256, method='area', published=True)|central_crop(224)"


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
def test_released_files_have_the_models_number_of_parameters(name):
    released = CHECKPOINTS[name]
    shapes = _shapes(released.variant, released.num_classes)
    size = 4 * released.num_params + 20_000
    published.check(released, shapes, size)
    with pytest.raises(UserError, match=rf"{size - 30_000:,}"):
        published.check(released, shapes, size - 30_000)
    with pytest.raises(UserError, match=rf"{size + 2_000_000:,}"):
        published.check(released, shapes, size + 2_000_000)
    fewer = {key: shape for key, shape in shapes.items() if "head" not in key}
    with pytest.raises(UserError, match=rf"{released.num_params:,} .*\d"):
        published.check(released, fewer, size)


def test_addresses_of_the_released_files():
    assert len(CHECKPOINTS) == 11 == len({released.url for released in CHECKPOINTS.values()})
    url = "https://storage.googleapis.com/mixer_models/"
    for name, released in CHECKPOINTS.items():
        assert released.num_classes == (21843 if name.endswith("i21k") else 1000)
    assert CHECKPOINTS["L/16-i21k"].url == f"{url}imagenet21k/Mixer-L_16.npz"
    assert CHECKPOINTS["S/8-gsam"].url == f"{url}gsam/Mixer-S_8.npz"
    for source in ("B/16-sam", f"{url}sam/Mixer-B_16.npz", "gs://mixer_models/sam/Mixer-B_16.npz"):
        assert published.find(source) is CHECKPOINTS["B/16-sam"]
    assert published.find("gs://mixer_models/sam/Mixer-L_16.npz") is None
    assert published.find("runs/Mixer-B_16.npz") is None


def test_short_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert published.by_short_name("B-i21k/16") is CHECKPOINTS["B/16-i21k"]  # big_vision's
    for name in ("B/16-i12k", "H/14-jft", "B/16", "b/16-i1k"):
        with pytest.raises(UserError, match=rf"{name}'.*B/16-i1k, L/16-i1k, "):
            published.by_short_name(name)
    with pytest.raises(UserError, match=r"'B/16-i1k'"):
        published.by_short_name("B/16-i12k")
    for path in ("runs/digits", "runs/16", "B/16.npz", "/B/16-i1k", "./B/16-i1k"):
        assert published.by_short_name(path) is None
    (tmp_path / "B" / "16-i1k").mkdir(parents=True)  # what is there goes first
    assert published.by_short_name("B/16-i1k") is None


@pytest.mark.parametrize(
    ("source", "num_classes", "class_names", "steps"),
    [
        ("B/16-i1k", 1000, "imagenet1k", BV_STEPS),
        ("gs://mixer_models/imagenet21k/Mixer-B_16.npz", 21843, "imagenet21k", BV_STEPS),
        ("/data/Mixer-L_16.npz", 1000, "imagenet1k", BV_STEPS),
        ("/data/Mixer-B_16.npz", 10, None, None),  # fine-tuned
        ("/data/mine.npz", 1000, None, None),
        ("/data/mine.npz", 21843, "imagenet21k", None),
        ("/data/mine.npz", 11221, "imagenet21k_miil", None),
    ],
)
def test_facts_of_npz_files(source, num_classes, class_names, steps):
    found = facts(source, layout="published", num_classes=num_classes)
    assert (found.class_names, found.preprocess((224, 224))) == (class_names, steps)
    by_name = steps is not None and source.startswith("/")  # not by its address
    assert ("imagenet1k" in found.note) == by_name and bool(found.note) == by_name


@pytest.mark.parametrize(
    ("source", "num_classes", "class_names", "steps", "notes"),
    [
        ("hf://timm/mixer_b16_224.goog_in21k_ft_in1k", 1000, "imagenet1k", TIMM_STEPS, "651 tanh"),
        ("hf://timm/mixer_l16_224.goog_in21k", 21843, "imagenet21k", TIMM_STEPS, "tanh"),
        ("hf://timm/mixer_b16_224.miil_in21k", 11221, "imagenet21k_miil", MIIL_STEPS, ""),
        ("/w/mixer_b16_224.miil_in21k_ft_in1k.safetensors", 1000, "imagenet1k", MIIL_STEPS, ""),
        ("/w/mixer_b16_224_miil-9229a591.safetensors", 1000, "imagenet1k", MIIL_STEPS, ""),
        ("mixer_b16_224.goog_in21k_tuned.safetensors", 1000, None, None, ""),  # somebody's own
        ("/w/jx_mixer_b16_224-76587d61.safetensors", 1000, "imagenet1k", TIMM_STEPS, "651 tanh"),
        (HUB_CACHE + "/model.safetensors", 21843, "imagenet21k", TIMM_STEPS, "tanh"),
        ("/w/mixer_b16_224.goog_in21k_ft_in1k/model.safetensors", 37, None, None, ""),
        ("/w/mixer_b16_224.safetensors", 1000, None, None, ""),
        ("/googler/miil/model.safetensors", 1000, None, None, ""),
    ],
)
def test_facts_of_timms_names(source, num_classes, class_names, steps, notes):
    found = facts(source, layout="timm", num_classes=num_classes)
    assert (found.class_names, found.preprocess((224, 224))) == (class_names, steps)
    assert bool(found.note) == bool(notes)
    for word in notes.split():
        assert word in found.note
    assert ("651" in found.note) == ("651" in notes)


def test_steps_follow_the_image_size():
    npz = facts("B/16-i1k", layout="published", num_classes=1000).preprocess
    assert npz((448, 448)) == BV_STEPS.replace("256", "512").replace("224", "448")
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
def test_other_models_are_refused_by_name(source):
    with pytest.raises(UserError, match=r"^(gmixer|resmlp|gmlp)_\S+"):
        facts(source, layout="timm", num_classes=1000)


def test_folders_that_only_sound_like_other_models_are_not():
    for source in ("/gmixer_trials/a.safetensors", "/gmlp_s16_224/mixer_b16_224.safetensors"):
        facts(source, layout="timm", num_classes=5)


def _hub(tag="goog_in21k_ft_in1k", architecture="mixer_b16_224", **values):
    inner = dict(tag=tag, mean=[0.5] * 3, std=[0.5] * 3, interpolation="bicubic", crop_pct=0.875)
    inner.update(input_size=[3, 224, 224], crop_mode="center", num_classes=1000)
    label_names = values.pop("label_names", None)
    outer = {"architecture": architecture, "num_classes": 1000, "pretrained_cfg": inner | values}
    return outer | ({"label_names": label_names} if label_names else {})


def _timm(fields, num_classes=1000):
    return timm_facts(fields, source="hf://me/mine", num_classes=num_classes)


def test_timms_config():
    found = _timm(_hub())
    assert (found.class_names, found.preprocess((224, 224))) == ("imagenet1k", TIMM_STEPS)
    assert "651" in found.note and "tanh" in found.note
    miil = dict(mean=[0.0] * 3, std=[1.0] * 3, interpolation="bilinear")
    found = _timm(_hub("miil_in21k", **miil), 11221)
    assert found.preprocess((224, 224)) == MIIL_STEPS
    assert (found.class_names, found.note) == ("imagenet21k_miil", "")
    own = _hub("", mean=[0.25] * 3, std=[0.5] * 3, crop_pct=1.0, label_names=["cat", "dog"])
    found = _timm(own, 2)
    assert found.class_names == ("cat", "dog")
    assert found.preprocess((64, 64)).endswith(
        "resize_small(64, method='bicubic', antialias=True)|central_crop(64)|value_range(-0.5, 1.5)"
    )
    assert _timm(own, 3).class_names is None  # the names are for another head
    flat = {"architecture": "mixer_b16_224", **_hub()["pretrained_cfg"]}  # early exports
    assert _timm(flat).preprocess((224, 224)) == TIMM_STEPS


def test_timms_config_that_no_step_expresses():
    imagenet = dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    for values, word in ((imagenet, "0.485"), (dict(crop_mode="squash"), "squash")):
        found = _timm(_hub(**values))
        assert found.preprocess((224, 224)) is None and found.class_names == "imagenet1k"
        assert word in found.note and "hf://me/mine" in found.note


@pytest.mark.parametrize(
    "values",
    [dict(std=[0.0] * 3), dict(mean=None), dict(crop_pct="much"), dict(mean=[]), dict(crop_pct=0)],
    ids=str,
)
def test_damaged_timm_config_is_named(values):
    with pytest.raises(UserError, match=r"config\.json of hf://me/mine"):
        _timm(_hub(**values))


def test_timms_config_of_another_model_is_refused():
    with pytest.raises(UserError, match=r"gmlp_s16_224\.ra3_in1k.*gMLP"):
        _timm(_hub("ra3_in1k", "gmlp_s16_224"))


# Fetching.


class _Server(http.server.ThreadingHTTPServer):
    """Serves `files` (bytes by path); `rules` change the answers by path."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.rules, self.asked = {}, {}, []

    def url(self, path):
        return f"http://127.0.0.1:{self.server_address[1]}/{path}"


class _Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        path = self.path.split("?")[0].lstrip("/")
        rule = self.server.rules.get(path, {})
        first = int((self.headers["Range"] or "bytes=0-")[6:-1])
        self.server.asked.append((path, first))
        data = self.server.files.get(path)
        if data is None or "code" in rule:
            self.send_error(rule.get("code", 404))
            return
        tag = f'"{zlib.crc32(data)}"'
        if rule.get("no_range") or self.headers["If-Range"] != tag:
            first = 0
        self.send_response(206 if first else 200)
        self.send_header("ETag", tag)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Type", rule.get("type", "application/octet-stream"))
        if not rule.get("no_length"):
            self.send_header("Content-Length", str(rule.get("length", len(data)) - first))
        self.end_headers()
        self.wfile.write(data[first : first + rule.get("at_most", len(data))])


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


def _fetch(path):
    lines = []
    found = remote.fetch(path, log=lines.append)
    assert len(lines) == 1
    return found, lines[0]


def _cached():
    return [path.name for path in remote.cache_dir().rglob("*") if path.is_file()]


def test_download_is_cached_under_its_own_name_with_its_json(server):
    server.files = {"a/Mixer-B_16.npz": DATA, "a/Mixer-B_16.npz.json": b'{"x": 1}'}
    path, line = _fetch(server.url("a/Mixer-B_16.npz?download=true"))
    assert path.read_bytes() == DATA and path.name == "Mixer-B_16.npz"
    assert json.loads(path.with_name(path.name + ".json").read_text()) == {"x": 1}
    assert server.url("a/Mixer-B_16.npz") in line and str(path) in line
    asked = len(server.asked)
    again, line = _fetch(server.url("a/Mixer-B_16.npz?download=true"))
    assert again == path and "cached" in line and len(server.asked) == asked
    other, _ = _fetch(server.url("a/Mixer-B_16.npz"))  # another address, another folder
    assert other != path


def test_file_without_json_and_safetensors_with_timms_config(server):
    server.files = {"x.npz": DATA, "m/model.safetensors": DATA, "m/config.json": b"{}"}
    server.rules = {"x.npz.json": dict(code=403)}
    path, _ = _fetch(server.url("x.npz"))
    assert sorted(_cached()) == [".lock", "x.npz"]
    path, _ = _fetch(server.url("m/model.safetensors"))
    assert (path.parent / "config.json").read_text() == "{}"
    assert not (path.parent / "model.safetensors.json").exists()


def test_connection_that_breaks_off_is_taken_up_where_it_ended(server):
    server.files = {"x.npz": DATA}
    server.rules = {"x.npz": dict(at_most=2000)}
    path, _ = _fetch(server.url("x.npz"))
    assert path.read_bytes() == DATA
    assert server.asked[:3] == [("x.npz", 0), ("x.npz", 2000), ("x.npz", 4000)]


def test_server_that_knows_no_ranges_begins_again(server):
    server.files = {"x.npz": DATA}
    server.rules = {"x.npz": dict(at_most=3000, no_range=True)}
    with pytest.raises(UserError, match=r"3,000 of 5,120 .* 4 "):
        remote.fetch(server.url("x.npz"), log=print)
    assert _cached() == [".lock"]


def test_length_that_the_server_does_not_tell(server):
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
def test_what_does_not_come_whole_leaves_nothing(server, rule, message):
    server.files, server.rules = {"x.npz": DATA, "x.npz.json": b"{}"}, {"x.npz": rule}
    with pytest.raises(UserError, match=message):
        remote.fetch(server.url("x.npz"), log=print)
    assert _cached() == [".lock"]


def test_json_that_fails_leaves_nothing(server):
    """Weights must not be cached without the JSON that says what they are."""
    server.files, server.rules = {"x.npz": DATA}, {"x.npz.json": dict(code=500)}
    with pytest.raises(UserError, match=r"x.npz.json.* 500"):
        remote.fetch(server.url("x.npz"), log=print)
    assert _cached() == [".lock"]


def test_no_network_and_other_kinds_of_files(server):
    with http.server.HTTPServer(("127.0.0.1", 0), _Handler) as other:
        closed = f"http://127.0.0.1:{other.server_address[1]}/x.npz"
    with pytest.raises(UserError, match="Connection refused"):
        remote.fetch(closed, log=print)
    for name in ("pytorch_model.bin", "mixer.pth", ""):
        with pytest.raises(UserError, match=r"\.npz or \.safetensors"):
            remote.fetch(server.url(name), log=print)
    assert not server.asked


def test_cache_that_cannot_be_written(server, tmp_path):
    server.files = {"x.npz": DATA}
    (tmp_path / "cache").write_text("a file is in the way")
    with pytest.raises(UserError, match=r"Not a directory.*XDG_CACHE_HOME"):
        remote.fetch(server.url("x.npz"), log=print)


def test_second_process_waits_for_the_first_and_takes_its_file(server, monkeypatch):
    import fcntl

    server.files = {"x.npz": DATA}
    path, _ = _fetch(server.url("x.npz"))
    path.unlink()
    server.asked.clear()
    lock = fcntl.flock

    def first_one_is_done(file, operation):
        lock(file, operation)
        path.write_bytes(b"from the first")

    monkeypatch.setattr(fcntl, "flock", first_one_is_done)
    assert remote.fetch(server.url("x.npz"), log=print).read_bytes() == b"from the first"
    assert not server.asked


def test_progress_bar_goes_to_a_terminal_on_stderr(server, monkeypatch, capsys):
    server.files = {"x.npz": DATA}
    remote.fetch(server.url("x.npz"), log=lambda line: None)
    out, err = capsys.readouterr()
    assert out == err == ""
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal then
    remote.fetch(server.url("x.npz?again"), log=lambda line: None)
    out, err = capsys.readouterr()
    assert out == "" and "x.npz" in err


def test_what_is_remote(tmp_path, monkeypatch):
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
    """gs://bucket is a folder of this machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    real = remote.epath.Path

    def path(address):
        return real(str(address).replace("gs://bucket", str(bucket)))

    monkeypatch.setattr(remote, "epath", types.SimpleNamespace(Path=path, PathLike=str))
    return bucket


def test_cloud_storage(storage):
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
def test_cloud_storage_that_fails(storage, monkeypatch, error, message):
    def path(address):
        raise error

    monkeypatch.setattr(remote.epath, "Path", path)
    monkeypatch.setattr(remote.published, "by_short_name", lambda path: None)
    with pytest.raises(UserError, match=message):
        remote.fetch("gs://bucket/x.npz", log=print)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A huggingface_hub with one repository, with the errors of version 1."""
    folder = tmp_path / "models--timm--mixer_b16_224.goog_in21k" / "snapshots" / "0a"
    folder.mkdir(parents=True)
    errors = types.ModuleType("huggingface_hub.errors")
    for name, bases in (
        ("EntryNotFoundError", (Exception,)),
        ("LocalEntryNotFoundError", (FileNotFoundError,)),
        ("HfHubHTTPError", (OSError,)),
        ("RepositoryNotFoundError", ("HfHubHTTPError",)),
        ("GatedRepoError", ("RepositoryNotFoundError",)),
        ("HFValidationError", (ValueError,)),
    ):
        bases = tuple(getattr(errors, base) if isinstance(base, str) else base for base in bases)
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
    module.fault, module.offline = None, False
    module.utils = types.SimpleNamespace(disable_progress_bars=lambda: None)
    module.folder = folder
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return module


def test_hub(hub):
    (hub.folder / "model.safetensors").write_bytes(DATA)
    (hub.folder / "config.json").write_text("{}")
    path, line = _fetch("hf://timm/mixer_b16_224.goog_in21k")
    assert path.read_bytes() == DATA and str(path) in line
    (hub.folder / "sub").mkdir()
    (hub.folder / "sub" / "x.npz").write_bytes(b"npz")
    assert _fetch("hf://timm/mixer_b16_224.goog_in21k/sub/x.npz")[0].read_bytes() == b"npz"


def test_hub_out_of_reach_with_weights_in_the_cache(hub):
    (hub.folder / "model.safetensors").write_bytes(DATA)
    (hub.folder / "config.json").write_text("{}")
    hub.fault, hub.offline = hub.errors.LocalEntryNotFoundError("x"), True
    path, line = _fetch("hf://timm/mixer_b16_224.goog_in21k")
    assert path.read_bytes() == DATA and "model.safetensors.json" in line
    (hub.folder / "config.json").unlink()
    assert (
        "model.safetensors.json and config.json" in _fetch("hf://timm/mixer_b16_224.goog_in21k")[1]
    )


def test_hub_says_what_is_wrong_in_one_line(hub, monkeypatch):
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


def test_tensorflow_is_not_needed():
    from helpers import run_python

    code = "import sys; sys.modules['tensorflow'] = None; import mixer.weights.fetch; print('fine')"
    assert run_python("-c", code).stdout.strip() == "fine"
