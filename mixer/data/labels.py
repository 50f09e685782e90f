"""Labels computed from TFDS features: some labels of VTAB, and ImageNet-ReaL.

Each label is a pure function of one example, selected by `dataset.label_key`. The VTAB labels are
defined by the benchmark (Zhai et al., 2019, arXiv 1910.04867), with constants from its public code
(google-research/task_adaptation, `data/{clevr,dsprites,kitti}.py`). The other data sets of the
benchmark have a stored label, such as `label_key="label"`.
"""

import dataclasses
import itertools
from collections.abc import Callable

import tensorflow as tf

from mixer.data.imagenet import names as imagenet_names
from mixer.data.imagenet import real as imagenet_real_labels

# Distances of the closest object, in units of depth of CLEVR: class i is the interval
# (CLEVR_DISTANCES[i], CLEVR_DISTANCES[i + 1]].
CLEVR_DISTANCES = (0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0)
CLEVR_FEWEST_OBJECTS, CLEVR_MOST_OBJECTS = 3, 10
# Metres to the closest vehicle along the camera's axis; the last class is "no vehicle".
KITTI_DISTANCES = (-100.0, 8.0, 20.0, 999.0)
KITTI_NO_VEHICLE = 1000.0  # metres, beyond the last threshold
KITTI_VEHICLE_TYPES = 3  # types 0, 1 and 2 are car, van and truck
DSPRITES_BINS = 16


@dataclasses.dataclass(frozen=True)
class Derived:
    """A label that is computed from other features.

    Attributes:
      dataset: TFDS name of the data set.
      features: features of an example from which the label is computed.
      class_names: class names in label order.
      compute: graph function from {feature: value} to a () int32. For an example without the label,
        as in CLEVR's unannotated test split, it returns a number outside the classes.
      several: whether `compute` returns (n,) int32, any number of classes per image.
    """

    dataset: str
    features: tuple[str, ...]
    class_names: tuple[str, ...]
    compute: Callable[[dict[str, tf.Tensor]], tf.Tensor]
    several: bool = False


def clevr_count(example):
    """Returns the number of objects in the scene, 3 to 10, as 8 classes."""
    return tf.size(example["objects"]["size"]) - CLEVR_FEWEST_OBJECTS


def clevr_distance(example):
    """Returns the depth of the closest object, as 6 intervals."""
    return _interval(tf.reduce_min(example["objects"]["pixel_coords"][:, 2]), CLEVR_DISTANCES)


def kitti_distance(example):
    """Returns the distance of the closest car, van or truck, as 3 intervals and "none"."""
    is_vehicle = example["objects"]["type"] < KITTI_VEHICLE_TYPES
    depths = tf.boolean_mask(example["objects"]["location"][:, 2], is_vehicle)
    return _interval(tf.reduce_min(tf.concat([depths, [KITTI_NO_VEHICLE]], 0)), KITTI_DISTANCES)


def dsprites_position(example):
    """Returns the horizontal position of the sprite: 32 steps in 16 classes."""
    return _bin(example["label_x_position"], 32)


def dsprites_orientation(example):
    """Returns the angle of the sprite: 40 steps in 16 classes of 3, 2, 3, 2, ... steps."""
    return _bin(example["label_orientation"], 40)


def smallnorb_azimuth(example):
    """Returns the azimuth of the camera: 18 classes, 20 degrees apart."""
    return tf.cast(example["label_azimuth"], tf.int32)


def smallnorb_elevation(example):
    """Returns the elevation of the camera: 9 classes, 5 degrees apart."""
    return tf.cast(example["label_elevation"], tf.int32)


def imagenet_real(example):
    """Returns the ReaL classes of an ImageNet validation image, looked up by its file name."""
    values, starts = imagenet_real_labels.labels()
    number = tf.strings.regex_replace(example["file_name"], r".*ILSVRC2012_val_(\d{8})\..*", r"\1")
    assertion = tf.debugging.Assert(
        tf.strings.regex_full_match(number, r"\d{8}"),
        ["file", example["file_name"], "is not in ImageNet's validation set"],
    )
    with tf.control_dependencies([assertion]):
        image = tf.strings.to_number(number, tf.int32) - 1
    starts = tf.constant(starts)
    return tf.constant(values)[starts[image] : starts[image + 1]]


def _interval(value, thresholds) -> tf.Tensor:
    """Returns i such that the () float32 is in (thresholds[i], thresholds[i + 1]]."""
    number = tf.searchsorted(tf.constant(thresholds), value[None], side="left")
    return number[0] - 1


def _bin(value, steps: int) -> tf.Tensor:
    return tf.cast(value, tf.int32) * DSPRITES_BINS // steps


def _interval_names(thresholds) -> tuple[str, ...]:
    return tuple(f"{low:g} to {high:g}" for low, high in itertools.pairwise(thresholds))


DERIVED = {
    "clevr_count": Derived(
        "clevr",
        ("objects",),
        tuple(map(str, range(CLEVR_FEWEST_OBJECTS, CLEVR_MOST_OBJECTS + 1))),
        clevr_count,
    ),
    "clevr_distance": Derived(
        "clevr", ("objects",), _interval_names(CLEVR_DISTANCES), clevr_distance
    ),
    "kitti_distance": Derived(
        "kitti",
        ("objects",),
        (*_interval_names((0.0, *KITTI_DISTANCES[1:3])), "above 20", "none"),
        kitti_distance,
    ),
    "dsprites_position": Derived(
        "dsprites", ("label_x_position",), tuple(map(str, range(DSPRITES_BINS))), dsprites_position
    ),
    "dsprites_orientation": Derived(
        "dsprites",
        ("label_orientation",),
        tuple(map(str, range(DSPRITES_BINS))),
        dsprites_orientation,
    ),
    # The degrees in these names were not checked against the data set's documentation.
    "smallnorb_azimuth": Derived(
        "smallnorb",
        ("label_azimuth",),
        tuple(f"{degrees} degrees" for degrees in range(0, 360, 20)),
        smallnorb_azimuth,
    ),
    "smallnorb_elevation": Derived(
        "smallnorb",
        ("label_elevation",),
        tuple(f"{degrees} degrees" for degrees in range(30, 75, 5)),
        smallnorb_elevation,
    ),
    "real_label": Derived(
        "imagenet2012",
        ("file_name",),
        imagenet_names.synsets("imagenet1k"),
        imagenet_real,
        several=True,
    ),
}
