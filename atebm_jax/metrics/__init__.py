"""Pure statistics: no model, no file, no config."""

from atebm_jax.metrics.calibration import (
    Calibration,
    Reliability,
    brier_score,
    calibration,
    fit_temperature,
    negative_log_likelihood,
    reliability,
    risk_coverage,
    temperature_error,
)
from atebm_jax.metrics.curves import average_precision, fpr_at_tpr, roc_curve
from atebm_jax.metrics.generation import (
    SCORE_PROTOCOLS,
    Moments,
    SplitSums,
    feature_statistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    score_spread,
    split_of_images,
)
from atebm_jax.metrics.images import psnr, spectral_distance
from atebm_jax.metrics.intervals import (
    auroc_interval,
    bootstrap_interval,
    jackknife_interval,
    wilson_interval,
)
from atebm_jax.metrics.ranking import accuracy, auroc

__all__ = [
    "SCORE_PROTOCOLS",
    "Calibration",
    "Moments",
    "Reliability",
    "SplitSums",
    "accuracy",
    "auroc",
    "auroc_interval",
    "average_precision",
    "bootstrap_interval",
    "brier_score",
    "calibration",
    "feature_statistics",
    "fit_temperature",
    "fpr_at_tpr",
    "frechet_distance",
    "inception_score",
    "jackknife_interval",
    "kernel_distance",
    "negative_log_likelihood",
    "precision_recall",
    "psnr",
    "reliability",
    "risk_coverage",
    "roc_curve",
    "score_spread",
    "spectral_distance",
    "split_of_images",
    "temperature_error",
    "wilson_interval",
]
