"""Swin transformer (Liu et al., 2021) with 4x4 patches.

Attention is inside square windows of patches. In every second block the windows are
shifted by half their side, so that neighbouring windows meet. Positions enter as a bias
of the attention, which a table holds for each offset between two patches of a window.
The windows and tables have the size that the weights were trained with: images must fit
them. There is no dropout and no stochastic depth: nothing depends on `train`. The sum
of the residual branches is float32 also where the branches compute in bfloat16.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from atebm_jax.errors import UserError, check_choice
from atebm_jax.models import family
from atebm_jax.models.layers import (
    INIT,
    AttendFn,
    Dense,
    LayerNorm,
    at_least_float32,
    check_sides,
    gelu,
    layer_norm,
    mlp,
    prepared,
    self_attention,
    sparsified,
)
from atebm_jax.models.stem import PatchStem

# Blocks of each of the four stages, and channels and attention heads of the first one:
# each stage has twice those of the one before.
SIZES: dict[str, tuple[tuple[int, ...], int, int]] = {
    "tiny": ((2, 2, 6, 2), 96, 3),
    "small": ((2, 2, 18, 2), 96, 3),
    "base": ((2, 2, 18, 2), 128, 4),
    "large": ((2, 2, 18, 2), 192, 6),
}

PATCH = 4

# Three times a stage merges 2x2 patches of the one before.
_MERGED = 8

# Added to the attention between patches that only the shift brought together.
_MASKED = -100.0


def window_sides(window: int, position_grid: int) -> tuple[int, ...]:
    """Side of the windows of each stage, in its patches.

    Args:
      window: side of the windows where the grid of patches is larger.
      position_grid: side of the first stage's grid, a multiple of 8.
    """
    return tuple(min(window, position_grid >> stage) for stage in range(4))


def offsets(side: int) -> np.ndarray:
    """Rows of the table for each pair of patches in a window: [side^2, side^2] int.

    The table has a row for each vertical and horizontal offset, (2 side - 1)^2 in all.
    """
    rows, columns = np.divmod(np.arange(side**2), side)
    down = rows[:, None] - rows[None] + side - 1
    right = columns[:, None] - columns[None] + side - 1
    return down * (2 * side - 1) + right


def windows(x: Any, side: int) -> Any:
    """[B, H, W, C] -> [B, windows, side^2, C]; the sides of x are multiples of side."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // side, side, width // side, side, channels)
    return x.swapaxes(2, 3).reshape(batch, -1, side**2, channels)


def from_windows(x: jax.Array, side: int, height: int, width: int) -> jax.Array:
    """The inverse of `windows`: [B, windows, side^2, C] -> [B, height, width, C]."""
    shape = (x.shape[0], height // side, width // side, side, side, x.shape[-1])
    return x.reshape(shape).swapaxes(2, 3).reshape(x.shape[0], height, width, -1)


def mask(height: int, width: int, side: int, shift: tuple[int, int]) -> np.ndarray:
    """What is added to attention in shifted windows: [windows, side^2, side^2].

    The shift moves the first rows and columns to the end. Patches in one window that
    are no neighbours in the image do not attend to each other.
    """

    rows, columns = (
        np.arange(length) >= length - moved
        for length, moved in zip((height, width), shift, strict=True)
    )
    regions = 2 * rows[:, None] + columns[None]
    regions = windows(regions[None, :, :, None], side)[0, :, :, 0]
    return np.where(regions[:, :, None] == regions[:, None], 0.0, _MASKED)


class Block(nn.Module):
    """Norm and attention in windows, then norm and two dense layers, each added.

    Attributes:
      heads: attention heads.
      side: of the windows.
      shifted: shifts the windows by half their side, where the grid is larger.
      epsilon: of the norms.
      sparse: whether `MeanSparse` follows the attention and both dense layers.
    """

    heads: int
    side: int
    shifted: bool
    epsilon: float
    dtype: Any
    sparse: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        height, width = x.shape[1:3]
        by = self.side // 2 if self.shifted else 0
        down, right = (by if n > self.side else 0 for n in (height, width))
        attend = self._attend(height, width, (down, right))
        y = layer_norm(x, "norm1", self.epsilon)
        y = jnp.roll(y, (-down, -right), axis=(1, 2))
        y = self_attention(windows(y, self.side), self.heads, self.dtype, attend)
        y = from_windows(y, self.side, height, width)
        x = sparsified(x + jnp.roll(y, (down, right), axis=(1, 2)), "sparse1", self)
        active = lambda y: gelu(sparsified(y, "inner_sparse1", self))
        norm = LayerNorm(self.epsilon, name="norm2")
        y = mlp(x, self.dtype, norm, activation=active)
        return sparsified(x + sparsified(y, "inner_sparse2", self), "sparse2", self)

    def _attend(self, height: int, width: int, shift: tuple[int, int]) -> AttendFn:
        """Attention in windows, with the bias for positions and what a shift hides."""
        shape = ((2 * self.side - 1) ** 2, self.heads)

        def biases() -> jax.Array:
            table = self.param("relative_position_bias_table", INIT, shape)
            bias = table[offsets(self.side)].transpose(2, 0, 1)[None]
            if not any(shift):
                return bias
            hidden = jnp.asarray(mask(height, width, self.side, shift), table.dtype)
            return (bias + hidden[:, None])[:, None]

        bias = prepared(self, biases)
        if bias.ndim != 4 + any(shift):
            raise ValueError("the network was made ready for images of another size")

        def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            # By windows: all images of a batch have the same biases.
            axes = (1, 1, 1, 0 if any(shift) else None)
            mapped = jax.vmap(jax.nn.dot_product_attention, in_axes=axes, out_axes=1)
            return mapped(query, key, value, bias)

        return attend


class Merge(nn.Module):
    """2x2 patches become one with twice the channels, between two stages."""

    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
        # The patches of the left column come first, from top to bottom.
        x = x.transpose(0, 1, 3, 4, 2, 5)
        x = x.reshape(batch, height // 2, width // 2, 4 * channels)
        dense = Dense(
            2 * channels,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=INIT,
            name="reduction",
        )
        return at_least_float32(dense(layer_norm(x, "norm", self.epsilon)))


class Swin(family.Network):
    """Images [B, H, W, C] float in [0, 1] to logits [B, num_classes] float32.

    Attributes:
      size: a key of `SIZES`.
      sides: of the windows of each stage, as of `window_sides`.
      norm_epsilon: of all norms.
      sparse: as of `Block`.
    """

    size: str
    sides: Sequence[int] = (7, 7, 7, 7)
    norm_epsilon: float = 1e-5
    sparse: bool = False

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool = False, features: bool = False
    ) -> jax.Array:
        """Logits, or the pooled features [B, channels] before them.

        Raises:
          UserError: a side that does not fit the windows.
        """
        del train
        windows_of = f"windows of {', '.join(map(str, self.sides))} patches"
        what = f"a Swin transformer with {windows_of}"
        check_sides(images, side_unit(self.sides), what)
        block = nn.remat(Block) if self.remat else Block
        blocks, channels, heads = SIZES[self.size]
        common: dict[str, Any] = {"epsilon": self.norm_epsilon, "dtype": self.dtype}
        x = self.normalised(images)
        x = at_least_float32(
            PatchStem(channels, PATCH, norm=True, name="stem", **common)(x)
        )
        for stage, num_blocks in enumerate(blocks):
            x = Merge(name=f"merge{stage}", **common)(x) if stage else x
            for index in range(num_blocks):
                x = block(
                    heads=heads << stage,
                    side=self.sides[stage],
                    shifted=index % 2 == 1,
                    sparse=self.sparse,
                    name=f"stage{stage}_{index}",
                    **common,
                )(x)
        x = layer_norm(x, "norm", self.norm_epsilon).mean(axis=(1, 2))
        fc = Dense(self.num_classes, kernel_init=INIT, name="fc")
        return x if features else fc(x)


def side_unit(sides: Sequence[int]) -> int:
    """Sides of images that fit all windows are multiples of so many pixels."""
    return math.lcm(*(PATCH * side << stage for stage, side in enumerate(sides)))


def build(config: ml_collections.ConfigDict) -> Swin:
    """Builds a Swin transformer from `config.model`.

    Raises:
      UserError: unknown size, a grid that cannot be merged, an empty window, or an
        epsilon out of range.
    """
    check_choice("model.size", config.size, SIZES, of=" of a Swin transformer")
    grid = config.position_grid
    if grid < _MERGED or grid % _MERGED:
        raise UserError(
            f"model.position_grid is {grid}: a Swin transformer has a multiple of "
            f"{_MERGED} patches a side, 56 for images of 224 pixels."
        )
    if config.window < 1:
        raise UserError(
            f"model.window is {config.window}: windows have at least one patch a side."
        )
    if not 0 < config.norm_epsilon < 1:
        raise UserError(
            f"model.norm_epsilon is {config.norm_epsilon}: it must be in (0, 1), 1e-5 "
            "for most Swin transformers."
        )
    sides = window_sides(config.window, grid)
    fields = family.network_fields(config, "size", "norm_epsilon")
    return Swin(sides=sides, **fields)


# Epsilon of the norms in the networks of MIMIR.
_MIMIRS = 1e-6

# An array of integers that older files keep beside each table.
_INDEX = "relative_position_index"


def _fields(shapes: family.Shapes) -> dict[str, Any]:
    """The epsilon is in no array: windows of 14 are MIMIR's, those of 7 anybody's."""
    template = "layers.{}.blocks.{{}}.mlp.fc1.weight"
    blocks = tuple(family.count(shapes, template.format(stage)) for stage in range(4))
    stem = shapes.get("patch_embed.proj.weight", ())
    found: dict[str, Any] = {"norm_epsilon": 1e-5}
    for size, (counts, channels, _) in SIZES.items():
        if counts == blocks and stem[:1] == (channels,) and stem[2:] == (PATCH, PATCH):
            found["size"] = size
    name = "layers.{}.blocks.0.attn.relative_position_bias_table"
    rows = [shapes.get(name.format(stage), (0,))[0] for stage in range(4)]
    sides = tuple((math.isqrt(count) + 1) // 2 for count in rows)
    if all(sides) and window_sides(sides[0], _MERGED * sides[3]) == sides:
        found |= {"window": sides[0], "position_grid": _MERGED * sides[3]}
        found["norm_epsilon"] = _MIMIRS if sides[0] == 14 else 1e-5
    return found


def _unused(shapes: family.Shapes) -> tuple[set[str], str]:
    """What older files keep and the sizes of windows and images determine."""
    ends = (f".{_INDEX}", ".attn_mask")
    kept = {name for name in shapes if name.endswith(ends)}
    return kept, "of masks and indices, which are computed here"


def _settle(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Names of older files, in which patches are merged at the end of a stage."""
    if "layers.0.downsample.reduction.weight" not in arrays:
        return dict(arrays)

    def settled(name: str) -> str:
        parts = name.split(".")
        if parts[0] == "layers" and parts[2:3] == ["downsample"]:
            parts[1] = str(int(parts[1]) + 1) if parts[1].isdecimal() else parts[1]
        return ".".join(parts)

    return {settled(name): array for name, array in arrays.items()}


def _aliases() -> Iterator[tuple[str, str]]:
    # The authors, and timm before version 0.9.
    yield "head.{leaf}", "head.fc.{leaf}"
    # torchvision: stem, stage, merging, stage, ... in one sequence.
    yield "features.0.0.{leaf}", "patch_embed.proj.{leaf}"
    yield "features.0.2.{leaf}", "patch_embed.norm.{leaf}"
    table = "attn.relative_position_bias_table"
    for s in range(4):
        theirs, ours = f"features.{2 * s + 1}.{{b}}", f"layers.{s}.blocks.{{b}}"
        yield f"{theirs}.norm{{k}}.{{leaf}}", f"{ours}.norm{{k}}.{{leaf}}"
        yield f"{theirs}.{table}", f"{ours}.{table}"
        yield f"{theirs}.attn.{_INDEX}", f"{ours}.attn.{_INDEX}"
        for part in ("qkv", "proj"):
            yield f"{theirs}.attn.{part}.{{leaf}}", f"{ours}.attn.{part}.{{leaf}}"
        yield f"{theirs}.mlp.0.{{leaf}}", f"{ours}.mlp.fc1.{{leaf}}"
        yield f"{theirs}.mlp.3.{{leaf}}", f"{ours}.mlp.fc2.{{leaf}}"
        for part in ("norm", "reduction"):
            ours = f"layers.{s}.downsample.{part}.{{leaf}}"
            yield f"features.{2 * s}.{part}.{{leaf}}", ours


def _arch(size: str, window: int = 7, norm_epsilon: float = 1e-5) -> dict[str, Any]:
    sizes = {"size": size, "window": window, "position_grid": 56}
    sizes |= {"norm_epsilon": norm_epsilon, "num_classes": 1000}
    normal: Mapping[str, tuple[float, ...]] = family.IMAGENET
    if norm_epsilon == _MIMIRS:
        normal = family.AS_THEY_ARE
    return {**sizes, **normal}


def _usual(model: family.ModelFields) -> Mapping[str, tuple[float, ...]] | None:
    """MIMIR's networks see pixels as they are; its Swin-B looks like any other."""
    if model["norm_epsilon"] == _MIMIRS:
        return family.AS_THEY_ARE
    asked = (model["size"], model["window"]) == ("base", 7)
    return None if asked else family.IMAGENET


FAMILY = family.Family(
    build=build,
    sized_by=("size", "window", "norm_epsilon"),
    fields={
        # "tiny", "small", "base" or "large".
        "size": "base",
        # Side of the windows, in patches.
        "window": 7,
        # Side of the grid of patches that the windows are laid out for: 56 for images
        # of 224 pixels.
        "position_grid": 14,
        # Of the norms: 1e-5, or 1e-6 for the networks of MIMIR.
        "norm_epsilon": 1e-5,
    },
    archs={f"swin_{size[0]}": _arch(size) for size in SIZES}
    # Xu et al., 2024 (MIMIR).
    | {
        "swin_b_mimir": _arch("base", norm_epsilon=_MIMIRS),
        "swin_l_mimir": _arch("large", window=14, norm_epsilon=_MIMIRS),
    },
    activation="gelu",
    compiled_share=0.67,
    # The names of timm since version 0.9.
    torch=family.TorchNames(
        rules=(
            ("patch_embed.proj", "stem/proj"),
            ("patch_embed.norm", "stem/norm"),
            ("layers.{s}.downsample.norm", "merge{s}/norm"),
            ("layers.{s}.downsample.reduction", "merge{s}/reduction"),
            ("layers.{s}.blocks.{b}.attn", "stage{s}_{b}"),
            ("layers.{s}.blocks.{b}.norm{k}", "stage{s}_{b}/norm{k}"),
            ("layers.{s}.blocks.{b}.attn.qkv", "stage{s}_{b}/qkv"),
            ("layers.{s}.blocks.{b}.attn.proj", "stage{s}_{b}/proj"),
            ("layers.{s}.blocks.{b}.mlp.fc{k}", "stage{s}_{b}/fc{k}"),
            ("norm", "norm"),
            ("head.fc", "fc"),
        ),
        published="the authors, timm, torchvision; Liu2023 and MIMIR of RobustBench",
        mark="layers.0.blocks.0.attn.relative_position_bias_table",
        first=("patch_embed.proj.weight",),
        fields=_fields,
        unsaid=lambda fields: {"norm_epsilon": "--arch gives another"},
        side=lambda model: side_unit(
            window_sides(model["window"], model["position_grid"])
        ),
        usual=_usual,
        who="--normalization=imagenet (the authors, timm, torchvision, Liu2023) or "
        "--arch=swin_b_mimir (MIMIR, on pixels as they are)",
        aliases=tuple(_aliases()),
        settle=_settle,
        bare={"relative_position_bias_table": 2},
        unused=_unused,
        look_alikes={
            "a Swin V2": r".*\.attn\.(logit_scale|cpb_mlp\..*)",
            "a Swin with absolute positions": "absolute_pos_embed",
        },
    ),
)
