"""AutoAttack (Croce and Hein, 2020): each attack sees what the ones before it left."""

from atebm_jax.autoattack.ensemble import Progress, Result, Unit, run
from atebm_jax.autoattack.versions import ATTACKS, VERSIONS

__all__ = ["ATTACKS", "VERSIONS", "Progress", "Result", "Unit", "run"]
