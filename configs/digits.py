"""Handwritten digits: both stages, evaluation and samples.

    python -m atebm_jax.main --config=configs/digits.py --workdir=runs/digits

Rows, by the method (`--config=configs/digits.py:jem`); network, data and evaluation are
the same, and 800 steps are those of both stages of `dat` together:

* `dat`: the paper's method, the default.
* `at`: its stage 1 alone, ordinary adversarial training.
* `jem` and `ratio`: what the paper compares with, 800 steps. JEM's network is the same
  without normalisation layers.
* `dat_one_stage`: the joint loss from scratch, 800 steps, BatchNorm in training mode.
* `dat_batchnorm`: stage 2 with BatchNorm in training mode.
* `dat_clean`: stage 2 with plain instead of adversarial cross-entropy.
* `dat_r1`: that, with the R1 penalty.
* `dat_fixed_t`: T = T_max from the first step of stage 2.

Data: scikit-learn's `load_digits`, which comes with the packages. It has 1,797 real
digits of 8x8 pixels; a fifth is held out.
Hardware: two CPU cores, a few minutes.
Expected numbers: docs/results.md.
"""

from ml_collections import ConfigDict

from atebm_jax.config import adversary, default
from atebm_jax.presets import choose_row, methods


def get_config(row: str = "dat") -> ConfigDict:
    return choose_row(row, ROWS)


def dat() -> ConfigDict:
    config = default()
    config.data.train = "digits:train"
    config.data.eval = "digits:test"
    config.data.test = "digits:test"
    config.data.seeds = "noise"
    config.data.image_shape = (8, 8, 1)
    # Shifts of one pixel, only in the classifier's batches.
    config.data.augment_cls = "pad_crop(1)"

    config.model.depth = 10
    config.model.widen_factor = 1
    config.model.num_classes = 10

    config.stage1.batch_size = 64
    config.stage1.num_steps = 400
    config.stage1.learning_rate = 0.1
    config.stage1.schedule = "cosine"
    config.stage1.adversary = adversary(epsilon=0.5, step_size=0.15, num_steps=5)
    config.stage1.eval_every_steps = 100
    config.stage1.checkpoint_every_steps = 50

    config.stage2.batch_size = 64
    config.stage2.num_steps = 400
    config.stage2.learning_rate = 0.01
    config.stage2.schedule = "constant"
    # Without it two seeds of three die at step 7 (docs/trouble.md).
    config.stage2.warmup_steps = 50
    config.stage2.adversary = adversary(epsilon=0.5, step_size=0.15, num_steps=5)
    config.stage2.contrastive_step_size = 0.3
    config.stage2.t_max = 30
    config.stage2.auc_threshold = 0.8
    config.stage2.auc_window_images = 256
    config.stage2.eval_every_steps = 100
    config.stage2.checkpoint_every_steps = 50

    for stage in (config.jem, config.ratio):
        stage.batch_size = 64
        stage.num_steps = 800
        stage.eval_every_steps = 200
        stage.checkpoint_every_steps = 50
    config.jem.learning_rate = 1e-3
    config.jem.warmup_steps = 50
    # As long as 10,000 chains are in as many steps as JEM's.
    config.jem.buffer_size = 1000

    config.evaluate.batch_size = 100
    config.evaluate.num_examples = 0
    config.evaluate.attack = adversary(epsilon=0.5, step_size=0.1, num_steps=20)
    config.evaluate.samples.num = 200
    config.evaluate.samples.num_test = 1000
    config.evaluate.samples.step_size = 0.3
    config.evaluate.samples.num_steps = 60
    config.evaluate.samples.judge = "svc"
    return config


def dat_one_stage() -> ConfigDict:
    config = methods(dat)["dat_one_stage"]()
    config.stage2.num_steps = 800
    return config


ROWS = {"dat": dat, **methods(dat), "dat_one_stage": dat_one_stage}
