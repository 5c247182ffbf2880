"""What an evaluation is asked for beside its config: fields that are flags too."""

import dataclasses
from collections.abc import Sequence
from typing import Any


def _option(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line asks for beside the config.

    The flag of a field has its name, default and text (`autoattack_version` for
    `version`). `num_resamples`, of each bootstrap interval, has none.
    """

    num_examples: int = _option(1000, "Images of each data set; 0 for all.")
    num_samples: int = _option(1000, "Generated images.")
    seed: int = _option(0, "Of noise, attacks and resampling.")
    epsilons: Sequence[float] = _option(
        (), "Radii of the curve under PGD; default multiples of the config's."
    )
    ood: Sequence[str] = _option(
        ("noise",), "Out-of-distribution sets: noise, sources."
    )
    radii: Sequence[float] = _option((1.0, 2.0, 4.0, 8.0), "Of counterfactuals, L2.")
    target: str = _option(
        "next", "Of counterfactuals: next, runner_up or a class by number or name."
    )
    num_resamples: int = 200
    norm: str | None = _option(
        None, "AutoAttack's: l2, linf or l1; default the config's."
    )
    epsilon: float | None = _option(None, "AutoAttack's radius, with --norm.")
    version: str = _option("standard", "standard, plus, rand or custom.")
    attacks: Sequence[str] = _option((), "Of --autoattack_version=custom, in order.")
    save_adversarial: bool = _option(False, "Keep AutoAttack's images.")
    feature_extractor: str = _option(
        "",
        "inception, efficientnet_lite0, model, or a checkpoint; default inception with "
        "--inception_weights, else model.",
    )
    inception_weights: str | None = _option(
        None, "Path of Inception-v3's weights, for FID."
    )
    reference_statistics: str | None = _option(
        None, "An .npz with mu and sigma of real images, instead of data.train."
    )
    num_reference: int = _option(
        0, "Real images for FID's statistics; 0 for all of data.train."
    )
    num_pairs: int = _option(5000, "Images of each side for precision and recall.")
    sweep: int = _option(
        3, "Numbers of sampling steps to try below and above the config's; 0 for none."
    )
    sweep_samples: int = _option(2560, "Samples for each of them.")
    quantise: str = _option(
        "reference", "Samples to bytes: reference (down) or nearest."
    )
    score_protocol: str = _option(
        "reference", "Of the Inception Score: reference or torch_fidelity."
    )
    cache_dir: str | None = _option(
        None, "Of statistics of data sets; default the user's cache."
    )

    @property
    def resampling(self) -> dict[str, Any]:
        """Arguments of `metrics.bootstrap_interval`."""
        return {"num_resamples": self.num_resamples, "seed": self.seed}
