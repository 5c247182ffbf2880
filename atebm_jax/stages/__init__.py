"""The training methods, each a file: what a job can train, stage by stage.

`adversaries` runs the PGD loops and is never differentiated; `loss` is what the
optimiser differentiates, with those images as constants.
"""

from atebm_jax.stages import adversarial, joint
from atebm_jax.stages.method import Batch, Method, Stage, Variables

#: The stages of a job by their block of the config, in their order; the only list.
STAGES: dict[str, Method] = {
    "stage1": adversarial.METHOD,
    "stage2": joint.METHOD,
}

__all__ = ["STAGES", "Batch", "Method", "Stage", "Variables"]
