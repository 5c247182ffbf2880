"""The config: fields with their defaults and meaning, and how it is checked.

Fields of one family of networks or of one training method stand in its file. A file in
`configs/` starts from `default()` and sets what its data set needs; the command line
overrides single fields (`--config.stage2.auc_threshold=0.7`).
"""

import ast
import difflib
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import ml_collections

from atebm_jax.errors import UserError, check_choice
from atebm_jax.models import FAMILIES
from atebm_jax.stages import PAPER, STAGES

#: The `init_from` that stands for random weights, whatever a stage starts from.
RANDOM = "random"

#: Fields that cannot change what is computed: a workdir may be continued with others.
RUN_CONTROL = frozenset(
    {
        "stages",
        "log_every_steps",
        "data.num_workers",
        "data.num_threads",
        # Only the order of sums, as with the number of devices.
        "mesh",
        *(f"{name}.num_micro_batches" for name in STAGES),
        # Earlier versions wrote it; nothing reads it.
        "model.conv_gradient",
    }
)


def default() -> ml_collections.ConfigDict:
    """A complete config; what is empty or 0 here is set by the files in `configs/`."""
    config = ml_collections.ConfigDict()
    # Seed of the parameters, the data order, the augmentation and all noise.
    config.seed = 0
    # "auto" (stage1 and stage2; only stage2 with init_from), or any of the methods of
    # `atebm_jax.stages`: "stage1", "stage1,stage2".
    config.stages = "auto"
    # Workdir or checkpoint whose averaged weights the first stage starts from; "random"
    # for stage2 from scratch.
    config.init_from = ""
    # Devices of all processes: "data:-1" splits the batch over them, "data:-1,fsdp:4"
    # also parameters, averages and optimiser over groups of 4; -1 is what is left.
    config.mesh = "data:-1"
    # Metrics are fetched, shown and written every so many steps.
    config.log_every_steps = 10
    # Steps in a row with NaN or Inf after which the job rolls back.
    config.max_skipped_in_row = 10
    # When the network dies (`atebm_jax.health`): "rollback" to the last good
    # checkpoint, "stop", "note" to go on with nothing but a line, or "report" to end
    # the stage at its last good checkpoint and have the report say so, as of NaN.
    config.on_dying = "rollback"
    # Rollbacks of a stage after which the job gives up.
    config.max_rollbacks = 3
    # The learning rate is multiplied by this at each rollback, to the stage's end.
    config.rollback_learning_rate_factor = 0.3
    config.data = _data()
    config.model = _model()
    for name, method in STAGES.items():
        config[name] = _stage()
        method.block(config[name])
    config.evaluate = _evaluate()
    return config


def adversary(
    *,
    norm: str = "l2",
    epsilon: float = 0.5,
    step_size: float,
    num_steps: int,
    momentum: float = 0.0,
    keep_best: bool = False,
) -> ml_collections.ConfigDict:
    """An attack on the classifier's cross-entropy."""
    block = ml_collections.ConfigDict()
    # "l2", "linf" or "unbounded".
    block.norm = norm
    # Radius in the norm's pixels of a [0, 1] image.
    block.epsilon = epsilon
    # Pixels of the norm per step.
    block.step_size = step_size
    block.num_steps = num_steps
    # Decay of the velocity (the paper's published stage 1: 0.9); 0 without keep_best
    # is plain PGD.
    block.momentum = momentum
    # Return the iterate with the highest loss (the paper's published stage 1: True).
    block.keep_best = keep_best
    return block


def _data() -> ml_collections.ConfigDict:
    data = ml_collections.ConfigDict()
    # Sources: "digits:SPLIT", "tfds:NAME:SPLIT", "cifar:PATH:SPLIT", "folder:PATH"
    # or "prepared:PATH".
    data.train = ""
    # Held-out images for the evaluation while training; never used to train, but the
    # best checkpoints are chosen on them.
    data.eval = ""
    # Held-out images for the final report.
    data.test = ""
    # Seeds of the contrastive images and samples: "noise"; "gaussian", drawn from a
    # normal distribution fitted to the training images, "gaussian_per_class" from one
    # for each class; or a source.
    data.seeds = "noise"
    # Folder with prepared TFDS data sets; empty for the TFDS default.
    data.data_dir = ""
    # (height, width, channels) after augmentation and preprocessing.
    data.image_shape = (32, 32, 3)
    # Augmentations, operations joined by "|": generative batch, classifier's batch,
    # seeds.
    data.augment_gen = ""
    data.augment_cls = ""
    data.augment_seeds = ""
    # Fixed preparation, without randomness, of evaluation images and of the seeds that
    # evaluation samples start from.
    data.preprocess = ""
    data.preprocess_seeds = ""
    # Worker processes that decode and augment; 0 uses threads of this process.
    data.num_workers = 0
    data.num_threads = 4
    # Undecodable images that are skipped before the job stops.
    data.max_bad_images = 10
    return data


def _model() -> ml_collections.ConfigDict:
    model = ml_collections.ConfigDict()
    # Family: a key of `atebm_jax.models.FAMILIES`.
    model.name = "wide_resnet"
    model.num_classes = 10
    # Input normalisation inside the network, one number a channel; () for none.
    model.mean = ()
    model.std = ()
    # Normalise each image by its own mean and standard deviation instead.
    model.standardize = False
    # "relu", "swish" or "gelu", for WideResNets and ResNets; ConvNeXts and transformers
    # have GELU, JEM's WideResNet has leaky ReLU.
    model.activation = "relu"
    # Compute dtype of the convolutions, "float32" or "bfloat16".
    model.dtype = "float32"
    # Keep only the blocks' inputs and compute a block again in the backward pass: less
    # memory for activations, about a third more computation.
    model.remat = False
    # What families read beside; each says in its file what for.
    for name, family in FAMILIES.items():
        for field, value in family.fields.items():
            if repr(model.get(field, value)) != repr(value):
                raise UserError(
                    f"the networks {name!r} declare model.{field} with the default "
                    f"{value!r}, and it has {model[field]!r} already: give that one, "
                    "or the field another name."
                )
            model[field] = value
    return model


def _stage() -> ml_collections.ConfigDict:
    stage = ml_collections.ConfigDict()
    # Images a step and stream, over all devices and processes.
    stage.batch_size = 128
    # Parts of a batch that pass one after the other, for less memory; the update is
    # that of the whole batch. Not for batch statistics, that is BatchNorm in stage1.
    stage.num_micro_batches = 1
    # Length, one of the two: passes over the training set, or steps; the other is 0.
    stage.num_epochs = 0.0
    stage.num_steps = 0
    # "sgd" (Nesterov 0.9, coupled decay), "adamw" (0.9, 0.95, decoupled decay) or
    # "adam" (0.9, 0.999).
    stage.optimizer = "sgd"
    stage.learning_rate = 0.1
    # "constant", "cosine" (to 0) or "step".
    stage.schedule = "cosine"
    # Steps of linear warm-up.
    stage.warmup_steps = 0
    # For "step": fractions of the stage, and the factor at each.
    stage.decay_at = (0.5, 0.75)
    stage.decay_factor = 0.1
    stage.weight_decay = 5e-4
    # Limit of the weight average's decay.
    stage.average_decay = 0.999
    # Held-out evaluation with the averaged weights, and a checkpoint, every so many
    # steps, and at the end; 0 for only at the end.
    stage.eval_every_steps = 0
    # Checkpoints in between; 0 for none.
    stage.checkpoint_every_steps = 0
    stage.adversary = adversary(step_size=0.1, num_steps=10)
    return stage


def _evaluate() -> ml_collections.ConfigDict:
    evaluate = ml_collections.ConfigDict()
    evaluate.batch_size = 128
    # Images of data.eval in each periodic evaluation; 0 for all.
    evaluate.num_examples = 1000
    # Images of data.test in the final report; 0 for all.
    evaluate.num_test_examples = 0
    evaluate.attack = adversary(step_size=0.1, num_steps=20)
    samples = ml_collections.ConfigDict()
    # Samples in each periodic evaluation and in the final report.
    samples.num = 100
    samples.num_test = 1000
    # A rule of `atebm_jax.ascent`, "pgd" (the paper's) say, with settings where they
    # are not the defaults: "sgld(noise=0.005)".
    samples.sampler = "pgd"
    # As of the sampler, L2 pixels per step ("sgld": factor of the gradient), and steps.
    samples.step_size = 0.2
    samples.num_steps = 35
    # Rows of the grid, one column a class.
    samples.grid_rows = 8
    # Principal components of the training images for the sample distance.
    samples.pca_components = 32
    # Training images that the components and the reference are estimated on.
    samples.num_reference = 5000
    # Classifier of real images that judges the samples' classes: "svc" or "".
    samples.judge = ""
    evaluate.samples = samples
    return evaluate


def stages_to_run(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """The stages that `config.stages` asks for, in order.

    Raises:
      UserError: an unknown name.
    """
    if config.stages == "auto":
        return PAPER[1:] if config.init_from else PAPER
    names = tuple(name.strip() for name in config.stages.split(","))
    if not names or names != tuple(name for name in STAGES if name in names):
        raise UserError(
            f"config.stages is {config.stages!r}: choose auto, or of "
            f"{', '.join(STAGES)} one or more in this order."
        )
    return names


def check(config: ml_collections.ConfigDict) -> None:
    """Refuses values that no job can run with; the rooms check their own further.

    Raises:
      UserError: names the field, its value, what is allowed and the remedy.
    """
    check_complete(config)
    stages_to_run(config)
    fields = dict(flatten(config))
    for field, value in fields.items():
        _check_number(field, value)
    shape = tuple(config.data.image_shape)
    if len(shape) != 3 or not all(type(n) is int and n > 0 for n in shape):
        raise UserError(
            f"config.data.image_shape is {shape}: give (height, width, channels)."
        )
    if len(config.model.mean) != len(config.model.std) or not all(
        value > 0 for value in config.model.std
    ):
        raise UserError(
            f"config.model.mean is {tuple(config.model.mean)} and config.model.std "
            f"{tuple(config.model.std)}: give both with one number a channel, the "
            "second positive, or neither."
        )
    if config.model.standardize and config.model.mean:
        raise UserError(
            "config.model.standardize is True and config.model.mean is "
            f"{tuple(config.model.mean)}: an image is normalised by its own mean or by "
            "these; give --config.model.mean='()' --config.model.std='()' for its own."
        )
    for field, smallest in _SMALLEST.items():
        if fields[field] < smallest:
            raise UserError(
                f"config.{field} is {fields[field]}: it must be at least {smallest}."
            )
    _check_dying(config)
    for field in ("train", "eval", "test", "seeds"):
        if not config.data[field]:
            raise UserError(
                f"config.data.{field} is empty: give a source such as "
                "'tfds:cifar10:train' or 'folder:PATH'."
            )
    for name in stages_to_run(config):
        _check_stage(name, config[name])


def check_complete(config: ml_collections.ConfigDict) -> None:
    """Refuses a config that lacks a field, or has one of another type.

    Raises:
      UserError: names the first such field.
    """
    fields = dict(flatten(config))
    for field, usual in flatten(default()):
        if field not in fields:
            raise UserError(
                f"the config has no field {field}: start from "
                "atebm_jax.config.default(), which has all of them, and set others."
            )
        kinds = _KINDS.get(type(usual), type(usual))
        if not isinstance(fields[field], kinds):
            raise UserError(
                f"config.{field} is {fields[field]!r}: expected a value such as "
                f"{usual!r}."
            )


# What stands for a number or for several, beside a default's own type.
_KINDS: dict[type, tuple[type, ...]] = {float: (float, int), tuple: (tuple, list)}


def _check_number(field: str, value: Any) -> None:
    """Refuses numbers that no formula can use."""
    numbers = value if isinstance(value, tuple | list) else [value]
    if numbers is value and not all(isinstance(n, int | float) for n in value):
        raise UserError(f"config.{field} is {value!r}: its elements must be numbers.")
    finite = all(abs(n) <= _LARGEST for n in numbers if isinstance(n, float))
    unbounded = field.endswith("epsilon") and value == math.inf
    if not finite and not unbounded:
        raise UserError(
            f"config.{field} is {value}: it must be a finite number, in float32 too."
        )
    if any(isinstance(n, int) and abs(n) >= 2**31 for n in numbers):
        raise UserError(
            f"config.{field} is {value}: a whole number must be below 2**31, as it is "
            "counted in 32 bits."
        )
    if field.endswith("step_size") and not value > 0:
        raise UserError(f"config.{field} is {value}: it must be positive.")
    if field.endswith(("adversary.num_steps", "attack.num_steps")) and value < 0:
        raise UserError(f"config.{field} is {value}: it must be >= 0.")


# Of float32, in which everything is computed; a comparison with NaN is False.
_LARGEST = 3.4e38

_SMALLEST: dict[str, float] = {
    "seed": 0,
    "log_every_steps": 1,
    "max_skipped_in_row": 1,
    "max_rollbacks": 0,
    "data.num_workers": 0,
    "data.num_threads": 1,
    "data.max_bad_images": 0,
    "evaluate.batch_size": 1,
    "evaluate.num_examples": 0,
    "evaluate.num_test_examples": 0,
    "evaluate.samples.num": 2,
    "evaluate.samples.num_test": 2,
    "evaluate.samples.num_steps": 0,
    "evaluate.samples.grid_rows": 1,
    "evaluate.samples.pca_components": 1,
    "evaluate.samples.num_reference": 2,
}


#: What a job may do when the network dies.
ON_DYING = ("rollback", "stop", "note", "report")


def _check_dying(config: ml_collections.ConfigDict) -> None:
    check_choice("config.on_dying", config.on_dying, ON_DYING)
    factor = config.rollback_learning_rate_factor
    if not 0 < factor <= 1:
        raise UserError(
            f"config.rollback_learning_rate_factor is {factor}: it must lie in (0, 1]."
        )


# Of a stage's fields: whether a value can be, and what it must do.
_MUST: dict[str, tuple[Callable[[float], bool], str]] = {
    "batch_size": (lambda x: x >= 1, "be positive"),
    "num_steps": (lambda x: x >= 0, "be >= 0"),
    "eval_every_steps": (lambda x: x >= 0, "be >= 0"),
    "checkpoint_every_steps": (lambda x: x >= 0, "be >= 0"),
    "learning_rate": (lambda x: x > 0, "be positive"),
    "average_decay": (lambda x: 0 <= x < 1, "lie in [0, 1)"),
}


def _check_stage(name: str, stage: ml_collections.ConfigDict) -> None:
    for field, (holds, must) in _MUST.items():
        if not holds(stage[field]):
            raise UserError(f"config.{name}.{field} is {stage[field]}: it must {must}.")
    parts = stage.num_micro_batches
    if parts < 1 or stage.batch_size % parts:
        raise UserError(
            f"config.{name}.num_micro_batches is {parts}: it must divide "
            f"config.{name}.batch_size, {stage.batch_size}."
        )
    if (stage.num_epochs > 0) == (stage.num_steps > 0):
        raise UserError(
            f"config.{name}.num_epochs is {stage.num_epochs} and config.{name}."
            f"num_steps {stage.num_steps}: a budget is required, exactly one of the "
            "two must be positive."
        )
    STAGES[name].check(name, stage)


def num_steps(stage: ml_collections.ConfigDict, num_train: int) -> int:
    """Steps of a stage: its `num_steps`, or its epochs over `num_train` images."""
    if stage.num_steps > 0:
        return stage.num_steps
    return max(round(stage.num_epochs * num_train / stage.batch_size), 1)


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every field of a config or of plain dicts."""
    for name, value in config.items():
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def complete(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A stored config (as plain JSON) with the defaults of fields that it lacks.

    What an earlier version wrote has no fields that came later; their defaults are
    what it did.
    """
    return _filled(stored, default().to_dict())


def _filled(stored: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    made = dict(stored)
    for name, value in defaults.items():
        if isinstance(value, Mapping):
            inner = stored.get(name, {})
            made[name] = _filled(inner, value) if isinstance(inner, Mapping) else inner
        elif name not in stored:
            made[name] = list(value) if isinstance(value, tuple) else value
    return made


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Fields in which two configs (as plain JSON) differ, run control left out."""
    before, after = dict(flatten(old)), dict(flatten(new))
    return [
        f"{name}: {before.get(name, 'absent')!r} before, "
        f"{after.get(name, 'absent')!r} now"
        for name in sorted(before.keys() | after.keys())
        if name not in RUN_CONTROL and before.get(name) != after.get(name)
    ]


def check_override(config: ml_collections.ConfigDict, field: str, text: str) -> None:
    """Refuses an override, `--config.FIELD=TEXT`, that does not fit the config.

    Raises:
      UserError: names the nearest fields, or the type that is expected.
    """
    fields = dict(flatten(config))
    if field not in fields:
        inside = [name for name in fields if name.startswith(f"{field}.")]
        names = inside[:5] or nearest(field, fields) or sorted(config)
        problem = "is a group of fields" if inside else "does not exist"
        raise UserError(
            f"--config.{field} {problem}: the nearest valid names are "
            f"{', '.join(names)}."
        )
    wanted = type(fields[field])
    if not _PARSES[wanted](text):
        raise UserError(
            f"--config.{field}={text} is no {wanted.__name__}: expected a value such "
            f"as {fields[field]!r}."
        )


def nearest(field: str, fields: Collection[str]) -> list[str]:
    """At most four fields that a misspelt one may mean, by all of it or its end."""
    leaf = {name.rpartition(".")[2]: name for name in fields}
    end = field.rpartition(".")[2]
    near = difflib.get_close_matches(field, fields, n=3, cutoff=0.6)
    near += [leaf[name] for name in difflib.get_close_matches(end, leaf, 3, 0.6)]
    return list(dict.fromkeys(near))[:4]


def _is_number(text: str, kind: type) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True


def _is_tuple(text: str) -> bool:
    try:
        return isinstance(ast.literal_eval(text), tuple | list)
    except (SyntaxError, ValueError):
        return False


_PARSES = {
    bool: lambda text: text.lower() in ("true", "false", "1", "0"),
    int: lambda text: _is_number(text, int),
    float: lambda text: _is_number(text, float),
    str: lambda text: True,
    tuple: _is_tuple,
}
