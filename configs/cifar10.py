"""CIFAR-10: the rows of the paper, and smaller rows of our own.

    python -m atebm_jax.main --config=configs/cifar10.py:wrn34_10_t50 \\
        --config.data.data_dir=TFDS_FOLDER --workdir=runs/cifar10_t50

Rows of the paper, with its numbers after stage 2 (clean / AutoAttack L2 0.5 / FID):

* `wrn34_10_t40`: 91.92 / 75.75 / 9.12 at T = 40.
* `wrn34_10_t50`: 90.72 / 74.65 / 7.57 at T = 50.

None was run. Stage 1 takes six hours on one H100 (estimated by `--dry_run
--peak_tflops=494`, at 40 % of the peak of TF32). Stage 2 takes at least 0.06 to 0.24
hours (T = 40) and 0.06 to 0.43 hours (T = 50) on eight H100, from all steps at T = 0 to
all at T_max, and up to eight times that on one: bounds by the compiler, not measured
(docs/cost.md).

Row for stage 2 of a published classifier, DeepMind's WRN-28-10 with SiLU:

* `dm_wrn28_10`: the L2 classifier of Wang et al. (2023): 95.16 clean, 83.68 AutoAttack
  L2 0.5 (published by RobustBench, not run here). Import its file, and give the result
  as `--config.init_from=runs/wang2023`:

      python -m atebm_jax.convert --from=Wang2023Better_WRN-28-10.pt --to=runs/wang2023

  Nobody has published stage 2 of this network; its settings are those of
  `wrn34_10_t50`. There the paper gives 1.7 points of clean and 1.1 of robust accuracy
  for a FID of 7.57: expect the same order. It was not run.
  The compiler's bounds are 0.05 to 0.36 hours on eight H100.

Row for one GPU:

* `small`: WRN-16-4 in bfloat16, 20 + 10 epochs; it was not run. docs/cost.md has the
  compiler's bounds of its hours. Its stage 2 has the learning rate, the contrastive
  steps and the threshold of `hour`, which was run.

Rows for two CPU cores, WRN-10-2 in float32. Put JAX_NUM_CPU_DEVICES=2 before the
command:

* `hour`: 5 epochs of stage 1 and 200 steps of stage 2. It takes an hour and ten
  minutes (estimated; 86 minutes with other work beside it). Measured numbers:
  docs/results.md.
* `cpu`: 14 epochs of stage 1 and 500 steps of stage 2. It takes two hours and a
  quarter. Clean 0.718, 20-step PGD 0.560, AutoAttack L2 0.5 0.523 of 1,000 test
  images. All measured numbers: docs/results.md.
* `noise`: like `hour`, but the seeds are uniform noise, and the steps are long enough
  to cross from there to images. It was run for 127 of its 200 steps and learns
  slowly.

Rows of other methods on the network and budget of `cpu`, as configs/digits.py describes
them: `at`, `jem` and `ratio`, and of ours `dat_one_stage`, `dat_batchnorm`,
`dat_clean`, `dat_r1` and `dat_fixed_t`; `dat` is `cpu`. None was run to its end, `at`,
`jem` and `ratio` for an hour (docs/results.md). 1,000 steps of `jem`, `ratio` or
`dat_one_stage` take about as long as both stages (estimated). `jem` has its published
learning rate: at 1e-3, that of the digits, it diverged at step 21.

Seeds: the paper's come from 80 Million Tiny Images, which its makers have withdrawn.
The default here is a Gaussian fitted to the training images, which needs no other data
set. `--config.data.seeds=folder:PATH` or `tfds:NAME:SPLIT` uses images of any size.

Length of stage 2: the paper does not give it. The budgets here are ours.

Test set: the evaluation during training uses it too, so the best checkpoints are chosen
on it. The report is of the last checkpoints.
`--config.data.train='tfds:cifar10:train[:45000]'
--config.data.eval='tfds:cifar10:train[45000:]'` keeps the two apart.
"""

from ml_collections import ConfigDict

from atebm_jax.archs import model_config
from atebm_jax.presets import choose_row, cifar, cifar_cpu, cifar_small, methods


def get_config(row: str = "small") -> ConfigDict:
    return choose_row(row, ROWS)


def wrn34_10_t40() -> ConfigDict:
    config = cifar("cifar10", num_classes=10)
    config.stage2.learning_rate = 1e-3
    config.stage2.t_max = 50
    config.stage2.auc_threshold = 0.8
    config.evaluate.samples.num_steps = 32
    return config


def wrn34_10_t50() -> ConfigDict:
    config = cifar("cifar10", num_classes=10)
    config.stage2.learning_rate = 1e-3
    config.stage2.t_max = 100
    config.stage2.auc_threshold = 0.7
    return config


def dm_wrn28_10() -> ConfigDict:
    config = wrn34_10_t50()
    config.stages = "stage2"
    config.model = model_config("dm_wrn28_10")
    return config


def small() -> ConfigDict:
    return cifar_small("cifar10", num_classes=10)


def cpu() -> ConfigDict:
    config = cifar_cpu("cifar10", num_classes=10)
    # This network does not overfit, so it needs no crops.
    config.data.augment_cls = "flip"
    config.data.augment_gen = "flip"
    # One step as long as the radius: 1.5 times as many images per second as with two.
    config.stage1.adversary.num_steps = 1
    config.stage1.adversary.step_size = 0.5
    for stage in (config.jem, config.ratio):
        stage.batch_size = 128
        stage.num_steps = 1000
        stage.eval_every_steps = 250
        stage.checkpoint_every_steps = 200
    config.jem.warmup_steps = 100
    return config


def dat_one_stage() -> ConfigDict:
    config = methods(cpu)["dat_one_stage"]()
    config.stage2.num_steps = 1000
    return config


def hour() -> ConfigDict:
    config = cifar_cpu("cifar10", num_classes=10)
    config.stage1.num_epochs = 5.0
    config.stage2.num_steps = 200
    config.stage2.eval_every_steps = 100
    return config


def noise() -> ConfigDict:
    config = hour()
    config.data.seeds = "noise"
    # Noise is 21 L2 pixels from an image, and at least 14 from any that is like one
    # (docs/curriculum.md): 40 steps of 1 can reach them.
    config.stage2.contrastive_step_size = 1.0
    config.stage2.t_max = 40
    config.evaluate.samples.step_size = 1.0
    return config


ROWS = {
    "wrn34_10_t40": wrn34_10_t40,
    "wrn34_10_t50": wrn34_10_t50,
    "dm_wrn28_10": dm_wrn28_10,
    "small": small,
    "cpu": cpu,
    "hour": hour,
    "noise": noise,
    "dat": cpu,
    **methods(cpu),
    "dat_one_stage": dat_one_stage,
}
