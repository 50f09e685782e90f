"""Mixer-L/16 pre-trained on weakly labelled images with several labels: the JFT-300M recipe.

python train.py --config=configs/mixer_l16_jft.py --config.dataset.data_dir=/data/web \
    --config.dataset.label_file=/data/web/labels.jsonl
python train.py --config=configs/mixer_l16_jft.py:data=NAME --config.dataset.label_key=labels
python train.py --config=configs/mixer_l16_jft.py:mode=smoke      # on a laptop, no data

JFT-300M (300 M images, 18,291 classes) is not public. Bring a folder with a label file, or a TFDS
set whose `label_key` is a list of classes; docs/data.md describes both formats.
Expected with JFT: our references give no figure.
Hardware: TPUs with batch 4096; the time is not published.

Values: 14 epochs of batches of 4096, Adam at 1e-3, weight decay 0.03, warm-up over 10,000 steps,
linear decay, inception crop and flip, no other regularization [paper]. Our own choices: the initial
bias of the head is -10, about -log(18,291); the last 1 % of the training split is for validation,
and there is no test split. An epoch is one pass over your data. JFT's 14 epochs are about 1,025,000
steps, so set epochs= to match.

Arguments (`pretraining` in configs/common.py explains them): model= res= mode= epochs= data=
"""

from configs import common


def get_config(arg=""):
    return common.jft(arg, model="L/16", epochs=14.0, peak_lr=1e-3)
