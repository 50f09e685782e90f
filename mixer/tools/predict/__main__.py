"""Says what is in pictures.

  python -m mixer.tools.predict cat.jpg photos/ --weights=runs/pets
  python -m mixer.tools.predict @list.txt --weights=Mixer-B_16.npz --json > predictions.jsonl
  python -m mixer.tools.predict photos/ --weights=runs/pets --features=features.npz

Images are files, folders (all images below, sorted) or @list.txt with a path a line; of most
formats that Pillow reads. They are preprocessed as in the evaluation of the weights. An image that
cannot be read is named on stderr and passed over; the exit code is 1 then.
"""

import dataclasses
import json
import sys

from absl import flags

from mixer import files
from mixer.cli import config as cli
from mixer.errors import UserError

WEIGHTS = flags.DEFINE_string(
    "weights", "", "A run, a step of it, a file of weights, or a short name such as B/16-i21k."
)
MOST = 2**31 - 1  # of images and classes: indices on devices are int32
TOP = flags.DEFINE_integer("top", 5, "Number of classes to tell of each image.", 1, MOST)
JSON = flags.DEFINE_bool("json", False, "Print a JSON object a line in place of a table.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images computed at once.", 1, MOST)
FEATURES = flags.DEFINE_string("features", "", "npz file to write the values of --layer to.")
LAYER = flags.DEFINE_string(
    "layer", "pre_logits", "For --features: stem, block_0, block_1, ..., pre_logits or logits."
)
PREPROCESS = flags.DEFINE_string(
    "preprocess", "", "Steps such as 'decode|resize(224)' in place of the weights' own."
)
IMAGE_SIZE = flags.DEFINE_list(
    "image_size",
    None,
    "For images of another size: a side in pixels, or HEIGHT,WIDTH; the weights are grown to it.",
)


def main(argv: list[str]) -> None:
    """Predicts the images that the arguments name."""
    if not WEIGHTS.value:
        raise UserError("--weights is missing; give a run or a file, as in --weights=runs/digits")
    if flags.FLAGS["layer"].present and not FEATURES.value:
        raise UserError(f"--layer={LAYER.value} is of the features; give --features=OUT.npz too")

    import numpy as np

    from mixer.console import Console, ProgressBar
    from mixer.data.sources import folder
    from mixer.tools.predict import prediction
    from mixer.weights import load as loading

    images = prediction.list_images(argv[1:])
    if FEATURES.value:
        files.check_output("--features", FEATURES.value)

    console, output = Console(stderr=True), Console()  # stdout has the results alone

    def say(text: str) -> None:
        console.say(folder.displayed(text))

    size = cli.image_size("image_size", IMAGE_SIZE.value)
    loaded = loading.read(WEIGHTS.value, image_size=size, log=say)
    results = prediction.predict(
        loaded,
        images,
        preprocess=PREPROCESS.value or loaded.card.preprocess,
        top=TOP.value,
        batch_size=BATCH_SIZE.value,
        layer=LAYER.value if FEATURES.value else None,
    )
    names = prediction.names_of(loaded.card)
    if names is None and loaded.card.num_classes:
        say("the names of the classes are not known: they are told by their numbers, from 0")
    # A bar would be drawn between the lines of JSON if both go to a terminal.
    bar_options = dict(
        total=len(images),
        redirect_stdout=False,
        is_shown=len(images) > BATCH_SIZE.value and not (JSON.value and output.is_terminal),
    )
    shown: list[prediction.Prediction] = []
    read: list[str] = []
    features = None
    with ProgressBar(console, "predicting", **bar_options) as bar:
        for result in results:
            bar.count(1, "images")
            if isinstance(result, prediction.Unreadable):
                say(f"{result.image}: {result.reason}")
                continue
            if result.features is not None:
                if features is None:  # rows not yet written take no memory
                    features = np.empty((len(images), *result.features.shape), np.float32)
                features[len(read)] = result.features
            read.append(result.image)
            if not loaded.card.num_classes:
                continue  # features alone
            if JSON.value:
                output.out(json.dumps(prediction.as_json(result, names)), highlight=False)
            else:
                shown.append(dataclasses.replace(result, features=None))
    if shown:
        output.print(prediction.as_table(shown, names))
    if features is not None:
        features = features[: len(read)]
        prediction.write_features(FEATURES.value, features, read)
        say(f"{FEATURES.value}: {LAYER.value} of {len(read):,} images, {features.shape} float32")
    if len(read) < len(images):
        say(f"{len(images) - len(read):,} of {len(images):,} images could not be read")
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
