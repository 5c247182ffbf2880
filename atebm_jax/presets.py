"""Settings that several config files share (method: section 4)."""

import difflib
from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from atebm_jax.config import default
from atebm_jax.errors import UserError

CIFAR_SIZE = "resize(32)|center_crop(32)"
CIFAR_BASIC = "pad_crop(4)|flip"
CIFAR_STRONG = f"{CIFAR_BASIC}|autoaugment_cifar10|cutout(16)"


def cifar(name: str, num_classes: int) -> ConfigDict:
    """WRN-34-10 on CIFAR-10 or CIFAR-100: data, augmentation, both stages.

    The L2 adversaries (eps 0.5, 10 steps of 0.1), SGD with weight decay 5e-4, batch 128
    and the contrastive step of 0.1 are the defaults already.

    Args:
      name: of the TFDS data set.
      num_classes: its classes.
    """
    config = default()
    config.data.train = f"tfds:{name}:train"
    config.data.eval = f"tfds:{name}:test"
    config.data.test = f"tfds:{name}:test"
    config.data.image_shape = (32, 32, 3)
    config.data.augment_gen = CIFAR_BASIC
    config.data.augment_cls = CIFAR_STRONG
    # Seeds are noise unless asked otherwise; images of any size then fit.
    config.data.augment_seeds = f"{CIFAR_SIZE}|{CIFAR_BASIC}"
    config.data.preprocess_seeds = CIFAR_SIZE
    config.data.num_workers = 4

    config.model.depth = 34
    config.model.widen_factor = 10
    config.model.num_classes = num_classes
    config.model.mean = (0.4914, 0.4822, 0.4465)
    config.model.std = (0.2470, 0.2435, 0.2616)

    config.stage1.num_epochs = 300.0
    config.stage1.learning_rate = 0.1
    config.stage1.schedule = "cosine"
    config.stage1.eval_every_steps = 5000
    config.stage1.checkpoint_every_steps = 1000

    # The paper does not fix the length of stage 2.
    config.stage2.num_epochs = 30.0
    config.stage2.eval_every_steps = 1000
    config.stage2.checkpoint_every_steps = 500

    config.evaluate.batch_size = 256
    config.evaluate.samples.num = 1000
    config.evaluate.samples.num_test = 10_000
    config.evaluate.samples.step_size = 0.2
    config.evaluate.samples.num_steps = 35
    return config


def cifar_small(name: str, num_classes: int) -> ConfigDict:
    """WRN-16-4 in bfloat16 for 20 + 10 epochs: a row for one GPU and half an hour."""
    config = cifar(name, num_classes)
    config.model.depth = 16
    config.model.widen_factor = 4
    config.model.dtype = "bfloat16"

    config.stage1.num_epochs = 20.0
    config.stage1.eval_every_steps = 2000
    config.stage1.checkpoint_every_steps = 500

    config.stage2.num_epochs = 10.0
    config.stage2.learning_rate = 1e-2
    config.stage2.t_max = 40
    config.stage2.auc_threshold = 0.8
    return config


def choose_row(row: str, rows: Mapping[str, Callable[[], ConfigDict]]) -> ConfigDict:
    """The config of a row of a config file's table.

    Raises:
      UserError: there is no such row.
    """
    if row not in rows:
        near = difflib.get_close_matches(row, rows, n=1)
        meant = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(
            f"there is no row {row!r}{meant}: choose one of {', '.join(rows)}."
        )
    return rows[row]()
