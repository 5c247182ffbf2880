"""The curriculum on T, the number of contrastive steps (paper, section 4).

T starts at 0. After every training step the AUC between real and contrastive images
enters a window; once the window is full and its mean reaches the threshold, the
energy tells the two apart too easily: T grows by one and the window is emptied.
"""

import flax.struct
import jax
import jax.numpy as jnp

from atebm_jax.errors import UserError


@flax.struct.dataclass
class Curriculum:
    """State of the curriculum; everything a resumed run needs."""

    num_steps: jax.Array  #: [] int32, T
    window: jax.Array  #: [W] float32, the last AUCs as a ring buffer
    count: jax.Array  #: [] int32, AUCs written since the window was emptied


def window_length(window_images: int, batch_size: int) -> int:
    """Steps in the AUC window, ceil(window_images / batch_size); the paper has 1000.

    Raises:
      UserError: `window_images` or `batch_size` is not positive.
    """
    if window_images < 1 or batch_size < 1:
        raise UserError(
            f"auc_window_images is {window_images} and batch_size {batch_size}: "
            "both must be positive."
        )
    return -(-window_images // batch_size)


def init(length: int, num_steps: int = 0) -> Curriculum:
    """T = 0, or another start, and an empty window of `length` steps."""
    return Curriculum(
        num_steps=jnp.full((), num_steps, jnp.int32),
        window=jnp.zeros((length,), jnp.float32),
        count=jnp.zeros((), jnp.int32),
    )


def update(
    curriculum: Curriculum, auc: jax.Array, *, threshold: float, max_steps: int
) -> Curriculum:
    """Appends one AUC and raises T when the full window's mean reaches the threshold.

    Args:
      curriculum: the state before the step.
      auc: [] float32 in [0, 1], AUC of f(x)[y], real against contrastive.
      threshold: `auc_threshold` of the paper's tables, in [0, 1].
      max_steps: T_max; T never exceeds it.

    Returns:
      The state after the step.
    """
    length = curriculum.window.shape[0]
    window = curriculum.window.at[curriculum.count % length].set(auc)
    count = curriculum.count + 1
    below = curriculum.num_steps < max_steps
    grow = below & (count >= length) & (window.mean() >= threshold)
    return Curriculum(
        num_steps=curriculum.num_steps + grow.astype(jnp.int32),
        window=window,
        count=jnp.where(grow, 0, count),
    )
