"""Networks whose features and classes score generated images."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from atebm_jax import sharding, trained
from atebm_jax.convert import scorers
from atebm_jax.data import relabel
from atebm_jax.errors import UserError
from atebm_jax.evaluate.context import Context, Extractor
from atebm_jax.models import efficientnet_lite, inception

#: What --feature_extractor and --judge call the network that others trained on ImageNet
#: and a package brings along.
EFFICIENTNET_LITE0 = "efficientnet_lite0"
# WordNet's names of ImageNet's classes, whose order is that of the networks' outputs.
_WORDNET = re.compile(r"n\d{8}")


def of(context: Context) -> Extractor:
    """The extractor that the options ask for, its weights on every device.

    A `UserError` if it is not there, or takes other images.
    """
    extractor = _chosen(context)
    placed = sharding.put_replicated(extractor.variables, context.mesh)
    return extractor._replace(variables=placed)


def _chosen(context: Context) -> Extractor:
    chosen, path = context.options.feature_extractor, context.options.inception_weights
    chosen = chosen or ("inception" if path else "model")
    if path and chosen != "inception":
        raise UserError(
            f"--inception_weights is given and --feature_extractor is {chosen}: leave "
            "one of the two out."
        )
    if chosen == "inception":
        if not path:
            raise UserError(
                "--feature_extractor=inception needs --inception_weights=PATH "
                f"({scorers.INCEPTION}, see docs/inception.md)."
            )
        return from_inception(path)
    if chosen == EFFICIENTNET_LITE0:
        return from_efficientnet_lite0(context.sources["test"].class_names)
    if chosen == "model":
        number = context.config.model.num_classes
        return from_model("model", context.model, context.variables, number)
    loaded = trained.load(chosen)
    if loaded.image_shape != context.image_shape:
        raise UserError(
            f"--feature_extractor={chosen} takes images {loaded.image_shape} and this "
            f"model {context.image_shape}: its features would be of other images."
        )
    made = from_model("network", loaded.model, loaded.variables, loaded.num_classes)
    described = made.description | {"classes": "others: no agreement"}
    others = made._replace(outputs=None, description=described)
    if loaded.num_classes != context.config.model.num_classes:
        return others
    own, what = loaded.class_names, "the network of the features"
    try:
        return by_name(made, own, context.class_names, what)
    except UserError:
        return others


def by_name(
    network: Extractor,
    own: Sequence[str] | None,
    names: Sequence[str] | None,
    what: str,
) -> Extractor:
    """With its output for each of the model's classes, `names`, found by `own` names.

    By place, which the description says, where either names none.

    Raises:
      UserError: `what` has other classes.
    """
    if own is None or names is None:
        described = network.description | {"classes": "compared by place"}
        return network._replace(description=described)
    order = relabel.same_order(own, names, what)
    return network if order is None else network._replace(outputs=np.asarray(order))


def from_model(name: str, model: Any, variables: Any, num_classes: int) -> Extractor:
    """A classifier's own pooled features and logits."""

    def apply(variables: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        features = model.apply(variables, images, features=True)
        return features, model.apply(variables, images)

    sha256 = trained.fingerprint(variables)
    described = {"network": name, "weights_sha256": sha256}
    outputs = np.arange(num_classes)
    return Extractor(name, sha256, variables, apply, described, outputs=outputs)


def from_inception(path: str) -> Extractor:
    """Inception-v3 with weights from a file; grey images become grey RGB ones.

    Raises:
      UserError: as of `convert.scorers.read_inception`.
    """
    variables, sha256 = scorers.read_inception(path)
    network = inception.InceptionV3()

    def run(variables: Any, inputs: jax.Array) -> inception.Outputs:
        outputs = network.apply(variables, inputs)
        assert isinstance(outputs, inception.Outputs)
        return outputs

    def apply(variables: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        outputs = run(variables, inception.resized(_coloured(images)))
        return outputs.features, outputs.unbiased_logits

    return Extractor(
        name="inception",
        fingerprint=trained.fingerprint(variables),
        variables=variables,
        apply=apply,
        apply_inputs=lambda variables, inputs: run(variables, inputs).unbiased_logits,
        description={
            "network": "Inception-v3 (2015-12-05)",
            **_file(sha256, scorers.INCEPTION_SHA256),
        },
    )


def from_efficientnet_lite0(names: Sequence[str] | None = None) -> Extractor:
    """EfficientNet-Lite0 with the weights that the package of the extra `features` has.

    Args:
      names: of the evaluated model's classes.

    Raises:
      UserError: as of `convert.scorers.read_efficientnet_lite0`.
    """
    variables, sha256 = scorers.read_efficientnet_lite0()
    network = efficientnet_lite.EfficientNetLite0()

    def apply(variables: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Rounding to bfloat16 or TF32 would change the third digit of scores.
        with jax.default_matmul_precision("float32"):
            inputs = efficientnet_lite.inputs(_coloured(images))
            outputs = network.apply(variables, inputs)
        assert isinstance(outputs, efficientnet_lite.Outputs)
        return outputs.features, outputs.logits

    return Extractor(
        name=EFFICIENTNET_LITE0,
        fingerprint=trained.fingerprint(variables),
        variables=variables,
        apply=apply,
        description={
            "network": "EfficientNet-Lite0, trained on ImageNet (scores are no FID)",
            **_file(sha256, scorers.LITE0_SHA256),
        },
        outputs=imagenet_outputs(names),
    )


def _file(sha256: str, published: str) -> dict[str, str]:
    """Which weights a network has, for the report."""
    told = "yes" if sha256 == published else "no: compare the source"
    return {"file_sha256": sha256, "is_the_published_file": told}


def imagenet_outputs(names: Sequence[str] | None) -> np.ndarray | None:
    """For each class a network's output, [K] int; None if these are not ImageNet's.

    Args:
      names: of K classes. ImageNet's are 1,000 of WordNet's ("n01440764"), and outputs
        are in their order.
    """
    known = sorted({name for name in names or () if _WORDNET.fullmatch(name)})
    if names is None or not len(known) == len(names) == efficientnet_lite.NUM_CLASSES:
        return None
    place = {name: output for output, name in enumerate(known)}
    return np.asarray([place[name] for name in names])


def _coloured(images: jax.Array) -> jax.Array:
    """Grey images [B, H, W, 1] as grey RGB ones."""
    return jnp.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


def score_inputs(images: np.ndarray) -> np.ndarray:
    """Inputs of Inception for its score, as the reference protocol makes them.

    Bytes are resized by Pillow (bilinear, with antialiasing) and become
    (u8 - 128) / 128. The Frechet distance resizes by `models.inception.resized`.

    Args:
      images: [B, H, W, C] uint8, C 1 or 3.

    Returns:
      [B, 299, 299, 3] float32.
    """
    side, bilinear = (inception.SIZE, inception.SIZE), Image.Resampling.BILINEAR
    pictures = (Image.fromarray(image.squeeze()).convert("RGB") for image in images)
    levels = np.stack([np.asarray(p.resize(side, bilinear)) for p in pictures])
    return (levels.astype(np.float32) - 128) / 128
