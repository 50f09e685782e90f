"""Classifies images with a trained model.

  python -m mixer.tools.predict cat.jpg photos/ --weights=runs/pets
  python -m mixer.tools.predict @list.txt --weights=Mixer-B_16.npz --json > predictions.jsonl
  python -m mixer.tools.predict photos/ --weights=runs/pets --features=features.npz

Images are files, folders (searched recursively and sorted) or @list.txt with one path per line, in
most formats that Pillow reads. They are preprocessed as for the evaluation of the model. Images
that cannot be read are reported on stderr and skipped; the exit code is then 1.
"""

import dataclasses
import json
import sys

from absl import flags

from mixer import files
from mixer.cli import config as cli
from mixer.errors import UserError, printable

WEIGHTS = flags.DEFINE_string(
    "weights",
    "",
    "A run, a checkpoint of a run, a weight file, or a published name such as B/16-i21k.",
)
MAX_INT32 = 2**31 - 1  # indices on devices are int32
TOP = flags.DEFINE_integer("top", 5, "Number of classes to print per image.", 1, MAX_INT32)
JSON = flags.DEFINE_bool("json", False, "Print one JSON object per line instead of a table.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images per batch.", 1, MAX_INT32)
FEATURES = flags.DEFINE_string("features", "", "npz file for the values of --layer.")
LAYER = flags.DEFINE_string(
    "layer", "pre_logits", "For --features: stem, block_0, block_1, ..., pre_logits or logits."
)
PREPROCESS = flags.DEFINE_string(
    "preprocess",
    "",
    "Preprocessing such as 'decode|resize(224)', which replaces the one stored with the weights.",
)
IMAGE_SIZE = flags.DEFINE_list(
    "image_size",
    None,
    "Resize the weights for images of this size in pixels: SIDE or HEIGHT,WIDTH.",
)


def main(argv: list[str]) -> None:
    """Predicts the classes of the images in the arguments."""
    if not WEIGHTS.value:
        raise UserError(
            "--weights is missing; expected a run or a file, as in --weights=runs/digits"
        )
    if flags.FLAGS["layer"].present and not FEATURES.value:
        raise UserError(f"--layer={LAYER.value} needs --features=OUT.npz")

    import numpy as np

    from mixer.console import Console, ProgressBar
    from mixer.tools.predict import prediction
    from mixer.weights import load as loading

    images = prediction.list_images(argv[1:])
    if FEATURES.value:
        files.check_output("--features", FEATURES.value)

    console, output = Console(stderr=True), Console()  # only results go to stdout

    def say(text: str) -> None:
        console.say(printable(text))

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
        say("the class names are unknown; classes are printed as numbers, from 0")
    # Hide the bar if JSON goes to the terminal, so that it does not appear between the lines.
    is_shown = len(images) > BATCH_SIZE.value and not (JSON.value and output.is_terminal)
    bar = ProgressBar(
        console, "predicting", total=len(images), redirect_stdout=False, is_shown=is_shown
    )
    predictions: list[prediction.Prediction] = []
    readable: list[str] = []
    features = None
    with bar:
        for result in results:
            bar.count(1, "images")
            if isinstance(result, prediction.Unreadable):
                say(f"{result.image}: {result.reason}")
                continue
            if result.features is not None:
                if features is None:  # the operating system allocates rows when they are written
                    features = np.empty((len(images), *result.features.shape), np.float32)
                features[len(readable)] = result.features
            readable.append(result.image)
            if not loaded.card.num_classes:
                continue  # without a head there are only features
            if JSON.value:
                output.out(json.dumps(prediction.as_json(result, names)), highlight=False)
            else:
                predictions.append(dataclasses.replace(result, features=None))
    if predictions:
        output.print(prediction.as_table(predictions, names))
    if features is not None:
        features = features[: len(readable)]
        prediction.write_features(FEATURES.value, features, readable)
        say(
            f"{FEATURES.value}: {LAYER.value} of {len(readable):,} images, {features.shape} float32"
        )
    if len(readable) < len(images):
        say(f"{len(images) - len(readable):,} of {len(images):,} images could not be read")
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
