"""Settings that several config files share (method: section 4)."""

import functools
from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from atebm_jax import seeds
from atebm_jax.archs import model_config
from atebm_jax.config import RANDOM, adversary, default
from atebm_jax.errors import check_choice

CIFAR_SIZE = "resize(32)|center_crop(32)"
CIFAR_BASIC = "pad_crop(4)|flip"
CIFAR_STRONG = f"{CIFAR_BASIC}|autoaugment_cifar10|cutout(16)"


def cifar(name: str, num_classes: int) -> ConfigDict:
    """WRN-34-10 on CIFAR-10 or CIFAR-100 of TFDS: data, augmentation, both stages.

    The L2 adversaries (eps 0.5, 10 steps of 0.1), SGD with weight decay 5e-4, batch 128
    and the contrastive step of 0.1 are the defaults already.
    """
    config = default()
    config.data.train = f"tfds:{name}:train"
    config.data.eval = f"tfds:{name}:test"
    config.data.test = f"tfds:{name}:test"
    config.data.image_shape = (32, 32, 3)
    config.data.augment_gen = CIFAR_BASIC
    config.data.augment_cls = CIFAR_STRONG
    # The paper's seeds are withdrawn; steps of these sizes cannot cross from noise.
    config.data.seeds = seeds.GAUSSIAN
    # Of a data set as seeds, whose images may have any size.
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
    """WRN-16-4 in bfloat16 for 20 + 10 epochs: a row for one GPU."""
    config = cifar(name, num_classes)
    config.model.depth = 16
    config.model.widen_factor = 4
    config.model.dtype = "bfloat16"

    config.stage1.num_epochs = 20.0
    config.stage1.eval_every_steps = 2000
    config.stage1.checkpoint_every_steps = 500

    config.stage2.num_epochs = 10.0
    _small_stage2(config)
    return config


def cifar_cpu(name: str, num_classes: int) -> ConfigDict:
    """WRN-10-2 in float32 for two CPU cores: both stages on all 50,000 images.

    A network so small underfits, hence the weak augmentation. Its adversary takes two
    steps of 0.3, which reach the radius of 0.5; the evaluation's takes twenty.
    """
    config = cifar(name, num_classes)
    config.data.augment_cls = CIFAR_BASIC
    config.data.num_workers = 0
    config.model.depth = 10
    config.model.widen_factor = 2

    for stage in (config.stage1, config.stage2):
        stage.adversary = adversary(epsilon=0.5, step_size=0.3, num_steps=2)
        stage.checkpoint_every_steps = 200
    config.stage1.num_epochs = 14.0
    config.stage1.warmup_steps = 200
    config.stage1.eval_every_steps = 1000

    config.stage2.num_epochs = 0.0
    config.stage2.num_steps = 500
    config.stage2.eval_every_steps = 250
    _small_stage2(config)

    config.evaluate.num_examples = 500
    config.evaluate.num_test_examples = 1000
    config.evaluate.samples.num = 100
    config.evaluate.samples.num_test = 1000
    return config


def _small_stage2(config: ConfigDict) -> None:
    """Stage 2 of small networks: docs/results.md has the runs behind it."""
    config.stage2.learning_rate = 1e-3
    config.stage2.contrastive_step_size = 0.2
    config.stage2.t_max = 25
    config.stage2.auc_threshold = 0.7


def methods(base: Callable[[], ConfigDict]) -> dict[str, Callable[[], ConfigDict]]:
    """Rows that differ in the method alone from a row of the paper's method."""

    def row(change: Callable[[ConfigDict], None]) -> ConfigDict:
        config = base()
        change(config)
        return config

    return {name: functools.partial(row, change) for name, change in METHODS.items()}


def _at(config: ConfigDict) -> None:
    config.stages = "stage1"


def _one_stage(config: ConfigDict) -> None:
    config.stages = "stage2"
    config.init_from = RANDOM
    config.stage2.normalization = "batch"
    # Nothing has learned before: at the rate of stage 1.
    for field in ("learning_rate", "schedule", "warmup_steps"):
        config.stage2[field] = config.stage1[field]


def _batchnorm(config: ConfigDict) -> None:
    config.stage2.normalization = "batch"


def _clean(config: ConfigDict) -> None:
    config.stage2.adversary.num_steps = 0


def _r1(config: ConfigDict) -> None:
    _clean(config)
    config.stage2.weight_r1 = 1.0


def _fixed_t(config: ConfigDict) -> None:
    config.stage2.t_start = config.stage2.t_max


def _jem(config: ConfigDict) -> None:
    """The same network without normalisation layers; samples are chains from noise."""
    config.stages = "jem"
    config.data.seeds = "noise"
    channels = config.data.image_shape[-1]
    config.model.name = "jem_wide_resnet"
    config.model.mean = config.model.std = (0.5,) * channels
    config.evaluate.samples.sampler = f"sgld(noise={config.jem.sgld_noise})"
    config.evaluate.samples.step_size = config.jem.sgld_step_size


def _ratio(config: ConfigDict) -> None:
    config.stages = "ratio"
    config.ratio.adversary = config.stage1.adversary
    config.ratio.learning_rate = config.stage1.learning_rate


#: Name of a row -> what it changes; method: sections 3 and 9.
METHODS: dict[str, Callable[[ConfigDict], None]] = {
    "at": _at,
    "dat_one_stage": _one_stage,
    "dat_batchnorm": _batchnorm,
    "dat_clean": _clean,
    "dat_r1": _r1,
    "dat_fixed_t": _fixed_t,
    "jem": _jem,
    "ratio": _ratio,
}


def imagenet(arch: str, size: int = 256) -> ConfigDict:
    """Stage 2 on ImageNet from imported weights: data, augmentation, SGD, adversary.

    The network is one of `archs.ARCHS`, for images of `size` pixels a side.
    """
    config = default()
    config.stages = "stage2"
    config.model = model_config(arch, dtype="bfloat16")
    config.data.train = "tfds:imagenet2012:train"
    config.data.eval = "tfds:imagenet2012:validation"
    config.data.test = "tfds:imagenet2012:validation"
    config.data.image_shape = (size, size, 3)
    # The paper's 300,000 images of Open Images where these are at hand: docs/data.md.
    config.data.seeds = seeds.GAUSSIAN
    config.data.augment_gen = f"resize({size})|center_crop({size})|flip"
    config.data.augment_cls = f"random_resized_crop({size})|flip"
    config.data.augment_seeds = f"random_resized_crop({size})|flip"
    evaluation = f"resize({256 * size // 224},bicubic)|center_crop({size})"
    config.data.preprocess = evaluation
    config.data.preprocess_seeds = evaluation
    config.data.num_workers = 8

    for stage in (config.stage1, config.stage2):
        stage.batch_size = 512
        stage.adversary = adversary(epsilon=3.0, step_size=2.0, num_steps=3)
    # Stage 1 is imported; its budget only makes the config complete.
    config.stage1.num_epochs = 100.0

    config.stage2.learning_rate = 1e-3
    config.stage2.weight_decay = 5e-4
    config.stage2.contrastive_step_size = 2.0
    config.stage2.auc_threshold = 0.4
    # The paper does not fix the length of stage 2.
    config.stage2.num_epochs = 5.0
    config.stage2.eval_every_steps = 1000
    config.stage2.checkpoint_every_steps = 500

    config.evaluate.batch_size = 128
    config.evaluate.num_examples = 1000
    config.evaluate.num_test_examples = 5000
    config.evaluate.attack = adversary(epsilon=3.0, step_size=1.0, num_steps=10)
    config.evaluate.samples.num = 200
    config.evaluate.samples.num_test = 1000
    config.evaluate.samples.step_size = 8.0
    config.evaluate.samples.num_steps = 14
    config.evaluate.samples.grid_rows = 1
    # Principal components of so many pixels take gigabytes for each thousand images.
    config.evaluate.samples.num_reference = 1000
    return config


def choose_row(row: str, rows: Mapping[str, Callable[[], ConfigDict]]) -> ConfigDict:
    """The config of a row of a config file's table; a `UserError` if there is none."""
    check_choice("row", row, rows)
    return rows[row]()
