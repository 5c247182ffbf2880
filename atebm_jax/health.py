"""Signs that a network dies, or that nothing is left to learn from; pure functions.

The evidence of a sign is a cumulative sum over the steps (Page, 1954),
e <- max(0, e + gain). The sign is shown once, when its evidence reaches 1. One step
gains at most 1 / PATIENCE, so that a few unlucky steps are not enough. Few images gain
less, so that a small batch takes longer.

A fresh network has cross-entropy ln K and accuracy 1 / K. These are signs of death
only after the network was demonstrably better. Stage 2 starts from a trained network,
and too high a learning rate can kill it in its first update: there one clear batch is
enough to call it better.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np

#: Steps with a sign before it is shown, at least.
PATIENCE = 5

# Log-likelihood ratio that makes an evidence of 1: once in a million by chance.
_NATS = 14.0
# What is known of a network from stage 1, as evidence that it is better than chance.
_TRAINED = 0.6
# Cross-entropies as shares of ln K: of a network that learns, of one in between (taken
# for neither) and of one at chance; and the measured variance of an image.
_LEARNT, _BETWEEN, _CHANCE, _VARIANCE = 0.76, 0.92, 1.0, 0.2
# The same of the accuracy, as multiples of the odds of a guess, 1 / (K - 1).
_LEARNT_ODDS, _BETWEEN_ODDS, _CHANCE_ODDS = 4.0, 2.0, 1.0

# Steps of a running median.
_MEDIAN_STEPS = 50
# Logits are without spread below this share of their median spread.
_NO_SPREAD = 0.05
# A gradient norm is large beyond its median, and that of the first step, times this.
_LARGE_NORM = 10.0
# Scores and logits run away beyond those of the first step, or ln K + 1, times this.
_RUN_AWAY = 100.0

# Signs of dying; the others mean that nothing is left to learn.
_DYING = ("cross_entropy", "accuracy", "logit_spread", "gradient_norm", "energy")

# Full windows of the AUC, each of so many images at least, and its limits.
_WINDOWS, _WINDOW_IMAGES = 3, 1000
_EASY_AUC, _HALF_WIDTH = 0.99, 0.05


class Sign(NamedTuple):
    """What was seen."""

    name: str  #: as in `sign_NAME` of the metrics and in `curves.png`
    dying: bool  #: whether the network dies; else nothing is left to learn from
    since: int  #: first step whose metrics showed it
    text: str  #: what was seen, the likely cause, what to change, and the page on it


@dataclass(frozen=True)
class Setting:
    """The properties of a stage that the signs depend on."""

    stage: str  #: its block of the config, for the remedy
    num_classes: int  #: K
    batch_size: int  #: B
    classifies: bool = True  #: whether the cross-entropy has a weight
    t_max: int = 0  #: T_max; 0 for no curriculum
    auc_window: int = 1  #: steps in the curriculum's window
    trained: bool = False  #: whether the stage starts from a trained network


@dataclass(frozen=True)
class Watch:
    """What is remembered of a stage's steps; plain JSON values, kept in checkpoints."""

    better_entropy: float = 0.0  #: evidence that it was below chance; 1 stays
    better_accuracy: float = 0.0  #: the same of the accuracy
    norms: Sequence[float] = ()  #: latest gradient norms, large ones left out
    spreads: Sequence[float] = ()  #: latest spreads of a trained network's logits
    first_norm: float | None = None  #: of the first step
    first_size: float | None = None  #: of scores and logits, in the first step
    window: Sequence[float] = (0, 0, 0.0)  #: T, steps with it, sum of their AUCs
    #: name -> (evidence in (0, 1], first step of it)
    evidence: Mapping[str, Sequence[float]] = field(default_factory=dict)
    shown: Sequence[str] = ()  #: signs that were shown; each is shown once
    count: int = 0  #: signs shown in the stage, those before a rollback included

    def suspicious(self) -> bool:
        """Whether evidence of dying is mounting: do not keep such a state."""
        return any(
            name in _DYING and evidence >= 0.5
            for name, (evidence, _) in self.evidence.items()
        )


def begin(setting: Setting) -> Watch:
    """A watch that has seen no step yet."""
    known = _TRAINED if setting.trained else 0.0
    return Watch(better_entropy=known, better_accuracy=known)


def restore(stored: Any, setting: Setting) -> Watch:
    """The watch that was stored (`asdict`); a new one where none was."""
    names = {f.name for f in fields(Watch)}
    if isinstance(stored, Mapping) and stored.keys() == names:
        return Watch(**stored)
    return begin(setting)


def look(
    watch: Watch, metrics: Mapping[str, float], setting: Setting, step: int
) -> tuple[Watch, list[Sign]]:
    """Takes the metrics of one step.

    They are those of `train_step.make`, as plain numbers; signs of what a method does
    not measure are not shown. A step that was skipped, as it was not finite, is not
    looked at.

    Returns:
      (what is remembered now, signs that are shown for the first time).
    """
    if metrics["skipped_in_row"] > 0:
        return watch, []
    watch = _remember(watch, metrics, setting)
    gains = _gains(watch, metrics, setting)
    watch = replace(watch, **_history(watch, metrics, gains, setting))
    watch, windows = _windows(watch, metrics, setting)
    evidence = dict(watch.evidence)
    for name, gain in (gains | windows).items():
        before, since = evidence.pop(name, (0.0, step))
        total = min(before + gain, 1.0)
        if total > 0:
            evidence[name] = (total, since)
    shown = [
        Sign(name, name in _DYING, int(since), _text(name, watch, metrics, setting))
        for name, (total, since) in evidence.items()
        # Five fifths make less than one in floating point.
        if total > 1 - 1e-6 and name not in watch.shown
    ]
    return replace(
        watch,
        evidence=evidence,
        shown=(*watch.shown, *(sign.name for sign in shown)),
        count=watch.count + len(shown),
    ), shown


def entropy_evidence(
    cross_entropy: float, setting: Setting, null: float, alternative: float
) -> float:
    """Evidence of a batch for one mean cross-entropy against another.

    The log-likelihood ratio of normal variables, in units of what is needed: positive
    where the batch is nearer to the alternative.

    Args:
      cross_entropy: mean over the batch, in nats.
      setting: of the stage.
      null, alternative: means that it speaks against and for, as shares of ln K.
    """
    share = cross_entropy / math.log(setting.num_classes)
    ratio = (alternative - null) / _VARIANCE * (share - (null + alternative) / 2)
    return setting.batch_size * ratio / _NATS


def accuracy_evidence(
    accuracy: float, setting: Setting, null: float, alternative: float
) -> float:
    """Evidence of a batch for one accuracy against another, as `entropy_evidence`.

    The log-likelihood ratio of independent guesses. Accuracies lie in [0, 1]; null and
    alternative are odds, as multiples of 1 / (K - 1).
    """
    fewest = setting.num_classes - 1
    ratio = accuracy * math.log(alternative / null)
    ratio -= math.log((fewest + alternative) / (fewest + null))
    return setting.batch_size * ratio / _NATS


def _limited(gain: float) -> float:
    """At most 1 / PATIENCE; 0 for NaN."""
    return 0.0 if math.isnan(gain) else min(gain, 1 / PATIENCE)


def _counted(seen: bool) -> float:
    """The gain of a sign that must be seen in PATIENCE steps in a row."""
    return 1 / PATIENCE if seen else -1.0


def _remember(watch: Watch, metrics: Mapping[str, float], setting: Setting) -> Watch:
    """How the network was in its first step, and whether it is better than chance."""
    if watch.first_norm is None:
        watch = replace(
            watch, first_norm=metrics["gradient_norm"], first_size=_size(metrics)
        )
    if not setting.classifies or setting.num_classes == 1:
        return watch
    if "loss_ce" in metrics:
        gain = entropy_evidence(metrics["loss_ce"], setting, _BETWEEN, _LEARNT)
        watch = replace(watch, better_entropy=_latched(watch.better_entropy, gain))
    if not math.isnan(accuracy := _accuracy(metrics)):
        gain = accuracy_evidence(accuracy, setting, _BETWEEN_ODDS, _LEARNT_ODDS)
        watch = replace(watch, better_accuracy=_latched(watch.better_accuracy, gain))
    return watch


def _latched(evidence: float, gain: float) -> float:
    """The next evidence of what stays once it was shown."""
    return 1.0 if evidence >= 1 else min(max(evidence + gain, 0.0), 1.0)


def _gains(
    watch: Watch, metrics: Mapping[str, float], setting: Setting
) -> dict[str, float]:
    """Evidence of dying in one step, by sign."""
    usual_size = max(math.log(setting.num_classes) + 1, watch.first_size or 0.0)
    gains = {"energy": _counted(_size(metrics) > _RUN_AWAY * usual_size)}
    if watch.better_entropy >= 1:
        gains["cross_entropy"] = _limited(
            entropy_evidence(metrics["loss_ce"], setting, _BETWEEN, _CHANCE)
        )
    if watch.better_accuracy >= 1:
        gains["accuracy"] = _limited(
            accuracy_evidence(_accuracy(metrics), setting, _BETWEEN_ODDS, _CHANCE_ODDS)
        )
    if watch.spreads:
        least = _NO_SPREAD * float(np.median(watch.spreads))
        gains["logit_spread"] = _counted(metrics["logit_spread"] < least)
    if len(watch.norms) >= PATIENCE:
        most = _LARGE_NORM * _usual_norm(watch)
        gains["gradient_norm"] = _counted(metrics["gradient_norm"] > most > 0)
    return gains


def _history(
    watch: Watch,
    metrics: Mapping[str, float],
    gains: Mapping[str, float],
    setting: Setting,
) -> dict[str, Any]:
    """The histories of the medians; what shows a sign is left out of them."""
    made: dict[str, Any] = {}
    if gains.get("gradient_norm", 0) <= 0:
        norms = (*watch.norms, metrics["gradient_norm"])
        made["norms"] = norms[-_MEDIAN_STEPS:]
    # Logits of a fresh network may shrink in its first steps. Those that stage 2 starts
    # from count from the first: few images may never show that they are better.
    trained = setting.trained or watch.better_entropy >= 1
    measured = "logit_spread" in metrics
    if trained and measured and gains.get("logit_spread", 0) <= 0:
        spreads = (*watch.spreads, metrics["logit_spread"])
        made["spreads"] = spreads[-_MEDIAN_STEPS:]
    return made


def _windows(
    watch: Watch, metrics: Mapping[str, float], setting: Setting
) -> tuple[Watch, dict[str, float]]:
    """Adds an AUC to the window; evidence that nothing is left to learn if it is full.

    A window is of one T, as long as the curriculum's, and of 1,000 images at least.
    """
    if "auc" not in metrics or setting.t_max == 0:
        return watch, {}
    at, count, total = watch.window
    steps = metrics["T"]
    if steps != at:
        count, total = 0, 0.0
    count, total = count + 1, total + metrics["auc"]
    length = max(setting.auc_window, -(-_WINDOW_IMAGES // setting.batch_size))
    if count < length:
        return replace(watch, window=(steps, count, total)), {}
    mean = total / count
    seen = {
        "auc_one": steps == setting.t_max and mean > _EASY_AUC,
        "auc_half": steps == 0 and abs(mean - 0.5) < _HALF_WIDTH,
    }
    gains = {name: 1 / _WINDOWS if found else -1.0 for name, found in seen.items()}
    return replace(watch, window=(steps, 0, 0.0)), gains


def _accuracy(metrics: Mapping[str, float]) -> float:
    """On adversarial images, or on clean ones where the method makes no others."""
    return metrics.get("accuracy_adv", metrics.get("accuracy", math.nan))


def _size(metrics: Mapping[str, float]) -> float:
    """How large scores and logits are; contrastive ones, as seeds drift by design."""
    names = ("score_real", "score_contrastive", "logit_spread")
    return max(abs(metrics.get(name, 0.0)) for name in names)


def _usual_norm(watch: Watch) -> float:
    """A converged network has spikes of the gradient that are small by its start."""
    return max(float(np.median(watch.norms)), watch.first_norm or 0.0)


def _text(
    name: str, watch: Watch, metrics: Mapping[str, float], setting: Setting
) -> str:
    """What was seen, its likely cause, and the page on it."""
    window = f"AUC of {_WINDOWS} windows"
    number = setting.num_classes
    measured = lambda name: metrics.get(name, math.nan)
    seen = {
        "cross_entropy": "cross-entropy at chance or above "
        f"({measured('loss_ce'):.3g}, ln {number} = {math.log(number):.3g}) after it "
        "was better",
        "accuracy": f"{'adversarial ' * ('accuracy_adv' in metrics)}accuracy at chance "
        f"({_accuracy(metrics):.2g}, "
        f"1 / {number}) after it was better",
        "logit_spread": "all images of a batch get the same logits (spread "
        f"{measured('logit_spread'):.2g}, "
        f"{np.median(watch.spreads or 0.0):.2g} before)",
        "gradient_norm": f"gradient norm {metrics['gradient_norm']:.3g}, many times "
        f"the usual {_usual_norm(watch):.3g}",
        "energy": f"energies run away (as far as {_size(metrics):.3g}, "
        f"{watch.first_size or 0.0:.3g} in the first step)",
        "auc_one": f"{window} above {_EASY_AUC} at T_max: nothing is left to learn "
        "from, most likely as the contrastive steps are too few or too short to bring "
        f"the seeds near real images: raise config.{setting.stage}.t_max or config."
        f"{setting.stage}.contrastive_step_size, or choose other config.data.seeds "
        '(docs/trouble.md, "AUC stuck at 1, T at its maximum")',
        "auc_half": f"{window} at one half at T = 0: the energy sees no difference "
        "between real images and seeds, most likely as config.data.seeds are images "
        'of the same kind (docs/trouble.md, "AUC near one half")',
    }[name]
    if name not in _DYING:
        return seen
    return (
        f"{seen}: the network is dying, most likely of too high a "
        f"config.{setting.stage}.learning_rate for the weights it started from "
        '(docs/trouble.md, "A network that dies")'
    )
