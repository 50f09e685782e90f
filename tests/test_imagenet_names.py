"""The ImageNet class lists, compared with digests of timm's files and with each other."""

import hashlib
from pathlib import Path

import pytest

from mixer.data.imagenet import names as imagenet_names
from mixer.data.imagenet.names import LISTS, class_names, synsets
from mixer.errors import UserError

# SHA-256 of the ids and of the names, each in label order and joined by newlines.
DIGESTS = {
    "imagenet1k": (
        "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd",
        "a40d9be82eb4738becd1dd69991b89f87f309975e860a6f3f45395d8c06a7e0d",
    ),
    "imagenet21k": (
        "c03345e3490e010defaeac86b00012db28ecb79af13daba0b72525fa37c66e94",
        "1cc12d5969905d8d13e02c7db8f075bfb34f9cdf8fb6fe7608d34da5c4306f49",
    ),
    "imagenet21k_miil": (
        "e96927e3af1cf32cd60c35b4407ba6e16396a2696feefed66c4017b403c5596a",
        "59bbc2483cebb08b0f015ee1608c2f2a818a5c0220f7e8c748eddfa62d8a167b",
    ),
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_match_those_of_timm(name):
    assert len(synsets(name)) == len(class_names(name)) == LISTS[name]
    assert list(synsets(name)) == sorted(set(synsets(name)))
    for lines, digest in zip((synsets(name), class_names(name)), DIGESTS[name], strict=True):
        assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == digest


def test_well_known_classes_have_their_labels():
    names = class_names("imagenet1k")
    assert names[0] == "tench, Tinca tinca" and names[281] == "tabby, tabby cat"
    assert names[999] == "toilet tissue, toilet paper, bathroom tissue"
    assert [label for label, name in enumerate(names) if name == "crane"] == [134, 517]
    assert synsets("imagenet1k")[0] == "n01440764"
    assert class_names("imagenet21k")[0] == "organism, being"


def test_lists_agree_on_the_names_of_shared_synsets():
    names = {name: dict(zip(synsets(name), class_names(name), strict=True)) for name in LISTS}
    imagenet21k = names["imagenet21k"]
    assert names["imagenet21k_miil"].items() <= imagenet21k.items()
    assert names["imagenet1k"].items() - imagenet21k.items() == {("n04399382", "teddy, teddy bear")}


def test_unknown_list_is_an_error_and_the_file_is_small():
    with pytest.raises(UserError, match=r"'imagenet22k'.*'imagenet21k'"):
        class_names("imagenet22k")
    file = Path(imagenet_names.__file__).with_name("imagenet_classes.xz")
    assert file.stat().st_size < 300_000
