"""The training methods, each a file: what a job can train, stage by stage.

`adversaries` runs the PGD loops and is never differentiated; `loss` is what the
optimiser differentiates, with those images as constants.
"""

from atebm_jax.stages import adversarial, jem, joint, ratio
from atebm_jax.stages.method import Batch, Method, Stage, Variables
from atebm_jax.stages.parts import CONTRASTIVE, Part

#: The methods by their block of the config, in the order of a job; the only list.
STAGES: dict[str, Method] = {
    "stage1": adversarial.METHOD,
    "stage2": joint.METHOD,
    "jem": jem.METHOD,
    "ratio": ratio.METHOD,
}

#: Those of the paper's method, one after the other.
PAPER = ("stage1", "stage2")

__all__ = ["CONTRASTIVE", "PAPER", "STAGES"]
__all__ += ["Batch", "Method", "Part", "Stage", "Variables"]
