"""ImageNet at 256 pixels (transformers: 224): stage 2 from an imported classifier.

    python -m atebm_jax.convert --from=CHECKPOINT.pt --arch=resnet50 --to=runs/rn50
    python -m atebm_jax.main --config=configs/imagenet256.py:resnet50_t30 \\
        --config.init_from=runs/rn50 --config.data.data_dir=TFDS_FOLDER \\
        --workdir=runs/resnet50_t30

Rows: the docstring of each row below says where it starts and what the paper reports
(clean / AutoAttack L2 3.0 / Inception Score / FID). The sizes of ConvNeXt other than L
and the transformers are not in the paper. No row has been run to its end yet.

Hardware: the paper's stage 2 of ConvNeXt-L took about 20 hours on 8 accelerators of the
MI300 class. ResNet-50 needs a fraction of that. To estimate memory, FLOPs and speed of
a row on given devices, add `--dry_run --devices=8` to its command; to compile its step
for a machine that is not here, `--dry_run --target=h100:8` (docs/cost.md has all rows).

Data: a prepared TFDS `imagenet2012`; or class folders,
`--config.data.train=folder:PATH/train --config.data.eval=folder:PATH/val
--config.data.test=folder:PATH/val`; or `prepared:PATH` (docs/data.md).

Seeds: the default is a Gaussian fitted to the training images (at 32 pixels, enlarged).
This works for small networks on CIFAR-10 (docs/curriculum.md) but has not been run
here. The paper uses some 300,000 images of Open Images whose labels do not overlap
ImageNet's. docs/data.md says how to prepare them; then give
`--config.data.seeds=prepared:PATH`.

Length of stage 2: the paper does not give it. The budgets here are ours.

The row `smoke` tries both stages on a CPU with a ResNet-18 at 64 pixels, 8 + 8 steps.
It needs a TFDS data set of photographs called `imagenet_sample` (1,000 classes) in
`--config.data.data_dir`. It takes four minutes of CPU time. Its numbers mean nothing.
"""

from ml_collections import ConfigDict

from atebm_jax.presets import choose_row, imagenet


def get_config(row: str = "resnet50_t30") -> ConfigDict:
    return choose_row(row, ROWS)


def resnet50_t15() -> ConfigDict:
    """From a robust ResNet-50 (L2 eps 3). The shorter of the paper's two curricula."""
    config = imagenet("resnet50")
    config.stage2.t_max = 15
    return config


def resnet50_t30() -> ConfigDict:
    """From a robust ResNet-50 (L2 eps 3). Paper: 55.96 / 37.14 / 319.3 / 5.28."""
    config = imagenet("resnet50")
    config.stage2.t_max = 30
    return config


def wrn50_4_t30() -> ConfigDict:
    """From a robust Wide-ResNet-50-4 (L2 eps 3). The shorter of the two curricula."""
    config = imagenet("wide_resnet50_4")
    config.stage2.t_max = 30
    config.stage2.auc_threshold = 0.2
    config.evaluate.samples.num_steps = 17
    return config


def wrn50_4_t65() -> ConfigDict:
    """From a robust Wide-ResNet-50-4 (L2 eps 3).

    Paper: 58.78 / 40.74 / 358.0 / 4.94, sampled with 19 steps.
    """
    config = wrn50_4_t30()
    config.stage2.t_max = 65
    config.evaluate.samples.num_steps = 19
    return config


def _convnext(size: str) -> ConfigDict:
    return _with_adamw(imagenet(f"convnext_{size}_cvst"))


def _with_adamw(config: ConfigDict) -> ConfigDict:
    """The paper's recipe for ConvNeXt-L."""
    config.stage2.optimizer = "adamw"
    config.stage2.learning_rate = 3e-4
    config.stage2.weight_decay = 0.05
    config.stage2.contrastive_step_size = 3.0
    config.stage2.t_max = 110
    config.stage2.auc_threshold = 0.2
    config.evaluate.samples.num_steps = 36
    return config


def convnext_large_t110() -> ConfigDict:
    """From a robust ConvNeXt-L with ConvStem (Linf 4/255).

    Paper: 75.78 / 56.40 / 310.2 / 3.29, sampled with 36 steps.
    """
    return _convnext("large")


def convnext_base() -> ConfigDict:
    """The recipe of ConvNeXt-L for ConvNeXt-B with ConvStem; not in the paper."""
    return _convnext("base")


def convnext_small() -> ConfigDict:
    """The recipe of ConvNeXt-L for ConvNeXt-S with ConvStem; not in the paper."""
    return _convnext("small")


def convnext_tiny() -> ConfigDict:
    """The recipe of ConvNeXt-L for ConvNeXt-T with ConvStem; not in the paper."""
    return _convnext("tiny")


def xcit_s12() -> ConfigDict:
    """The recipe of ConvNeXt-L for XCiT-S12 at 224 pixels; not in the paper.

    From Debenedetti et al., 2023 (Linf 4/255; clean 72.34, AutoAttack Linf 41.78),
    imported with --normalization=none.
    """
    return _with_adamw(imagenet("xcit_s12", size=224))


def swin_b() -> ConfigDict:
    """The recipe of ConvNeXt-L for Swin-B at 224 pixels; not in the paper.

    From Liu et al., 2023 (Linf 4/255).
    """
    return _with_adamw(imagenet("swin_b", size=224))


def smoke() -> ConfigDict:
    """Both stages of a ResNet-18 at 64 pixels in minutes; its numbers mean nothing."""
    config = imagenet("resnet18", size=64)
    for role in ("train", "eval", "test"):
        config.data[role] = "tfds:imagenet_sample:train"
    config.data.num_workers = 0
    config.model.dtype = "float32"
    config.stages = "stage1,stage2"
    for stage in (config.stage1, config.stage2):
        stage.num_epochs = 0.0
        stage.num_steps = 8
        stage.batch_size = 8
        stage.eval_every_steps = 8
        stage.checkpoint_every_steps = 4
        stage.adversary.num_steps = 1
    config.stage1.learning_rate = 0.02
    config.stage2.t_max = 2
    config.stage2.auc_threshold = 0.0
    config.stage2.auc_window_images = 16
    config.evaluate.batch_size = 16
    config.evaluate.num_examples = 16
    config.evaluate.num_test_examples = 32
    config.evaluate.attack.num_steps = 3
    config.evaluate.samples.num = 16
    config.evaluate.samples.num_test = 32
    config.evaluate.samples.num_steps = 8
    config.evaluate.samples.num_reference = 128
    return config


ROWS = {
    "resnet50_t15": resnet50_t15,
    "resnet50_t30": resnet50_t30,
    "wrn50_4_t30": wrn50_4_t30,
    "wrn50_4_t65": wrn50_4_t65,
    "convnext_large_t110": convnext_large_t110,
    "convnext_base": convnext_base,
    "convnext_small": convnext_small,
    "convnext_tiny": convnext_tiny,
    "xcit_s12": xcit_s12,
    "swin_b": swin_b,
    "smoke": smoke,
}
