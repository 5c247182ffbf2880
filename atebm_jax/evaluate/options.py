"""What an evaluation is asked for beside its config."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line asks for beside the config.

    Attributes:
      num_examples: images of each data set; 0 for all.
      num_samples: generated images.
      seed: of noise, attacks and resampling.
      epsilons: radii of the curve of robust accuracy; () for those around the config's.
      ood: sources of out-of-distribution images, "noise" among them.
      radii: of counterfactuals, L2 pixels.
      target: of counterfactuals: "next", "runner_up", or a class by place or name.
      num_resamples: of each bootstrap interval.
      norm, epsilon: threat of AutoAttack; None for that of config.evaluate.attack.
      version: of AutoAttack.
      attacks: of AutoAttack's version "custom", in their order.
      save_adversarial: write AutoAttack's images.
      feature_extractor: "inception", "model" or a checkpoint; "" for Inception where
        its weights are given, else the model.
      inception_weights: path of Inception's weights.
      reference_statistics: an `.npz` with `mu` and `sigma` instead of `data.train`.
      num_reference: images of data.train for the statistics; 0 for all.
      num_pairs: images of each side where pairs are compared.
      sweep: numbers of sampling steps to try below and above the config's; 0 for none.
      sweep_samples: images for that.
      quantise: a key of `recipes.QUANTISE`.
      score_protocol: one of `metrics.SCORE_PROTOCOLS`.
      cache_dir: of statistics of data sets; None for the user's cache.
    """

    num_examples: int = 1000
    num_samples: int = 1000
    seed: int = 0
    epsilons: Sequence[float] = ()
    ood: Sequence[str] = ("noise",)
    radii: Sequence[float] = (1.0, 2.0, 4.0, 8.0)
    target: str = "next"
    num_resamples: int = 200
    norm: str | None = None
    epsilon: float | None = None
    version: str = "standard"
    attacks: Sequence[str] = ()
    save_adversarial: bool = False
    feature_extractor: str = ""
    inception_weights: str | None = None
    reference_statistics: str | None = None
    num_reference: int = 0
    num_pairs: int = 5000
    sweep: int = 3
    sweep_samples: int = 2560
    quantise: str = "reference"
    score_protocol: str = "reference"
    cache_dir: str | None = None
