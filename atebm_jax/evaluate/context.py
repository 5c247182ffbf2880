"""What every protocol of the evaluation is given, and how it runs over images."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from atebm_jax import data, models, sharding
from atebm_jax.errors import UserError
from atebm_jax.evaluate.options import Options
from atebm_jax.evaluate.store import Arrays, Store
from atebm_jax.progress import ShowFn
from atebm_jax.seeds import Gaussian


class Network(NamedTuple):
    """The network with its weights: images [B, H, W, C] to logits or features."""

    logits: models.LogitsFn
    features: models.LogitsFn


class Judge(NamedTuple):
    """An independent classifier.

    Attributes:
      apply: (variables, images [B, H, W, C] float32 in [0, 1]) -> logits [B, K].
      variables: its weights, on every device.
      fingerprint: SHA-256 of them.
    """

    apply: Callable[[Any, jax.Array], jax.Array]
    variables: Any
    fingerprint: str


# (network, images [B, H, W, C] float32 in [0, 1], labels [B], more) -> arrays
# [B, ...]; or what is compiled of it.
RowsFn = Callable[..., dict[str, jax.Array]]
# Images that tell one data set from another at every start.
_FINGERPRINT_IMAGES = 256


@dataclasses.dataclass(frozen=True)
class Context:
    """A model, its data, and where finished work is kept.

    Attributes:
      config: complete config of the checkpoint, its data and evaluation perhaps the
        caller's.
      model: the network.
      variables: its averaged weights, on every device.
      mesh: the devices.
      sources: "train", "eval", "test" and what `Options.ood` names.
      fingerprints: of the same, as of `source_fingerprint`.
      store: finished units.
      options: of the command line.
      show: progress.
      judge: an independent classifier, or None.
      gaussian: what seeds are drawn from; None where they are noise or read.
      notes: what the report says about the data.
    """

    config: ml_collections.ConfigDict
    model: nn.Module
    variables: Any
    mesh: Mesh
    sources: Mapping[str, data.Source]
    fingerprints: Mapping[str, str]
    store: Store
    options: Options
    show: ShowFn = lambda name, done, total: None
    judge: Judge | None = None
    gaussian: Gaussian | None = None
    notes: tuple[str, ...] = ()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return tuple(self.config.data.image_shape)

    def map_images(
        self,
        name: str,
        role: str,
        function: RowsFn,
        *rest: Any,
        only_first: Mapping[str, int] = MappingProxyType({}),
        **settings: Any,
    ) -> Arrays:
        """Applies a function to the images of a source, batch by batch.

        Finished batches are read from the store. The function is compiled once.

        Args:
          name: of the part, for progress and store.
          role: key of `sources`.
          function: network, images and labels to arrays of one row an image;
            unlabelled images have the label -1.
          rest: what the function takes after the labels, weights of another network.
          only_first: key -> number of rows that are kept, of arrays too large to be
            kept for every image.
          settings: everything else that decides the result.

        Returns:
          The arrays over all images that could be decoded, with "labels" [N].
        """
        compiled = self.compiled(function)
        return self.over_batches(
            name,
            role,
            self._store_of(name, role, only_first=dict(only_first), **settings),
            lambda batch: self.rows(compiled, batch, *rest),
            only_first,
        )

    def _store_of(self, name: str, role: str, **settings: Any) -> Store:
        return self.store.within(
            part=name,
            role=role,
            source=self.sources[role].spec,
            content=self.fingerprints[role],
            preprocess=self.preprocess(role),
            **settings,
        )

    def over_batches(
        self,
        name: str,
        role: str,
        store: Store,
        make: Callable[[Mapping[str, np.ndarray]], Arrays],
        only_first: Mapping[str, int] = MappingProxyType({}),
    ) -> Arrays:
        """Units that are stored, then those that are made of the batches after."""
        limit = self.limit(role)
        total = -(-limit // self.config.evaluate.batch_size)
        parts: list[Arrays] = []
        while len(parts) < total and (unit := store.load(f"{len(parts):06d}")):
            parts.append(unit)
        self.show(name, len(parts), total)
        if len(parts) < total:
            for batch in self.batches(role, limit, len(parts)):
                unit = make(batch)
                before = sum(len(part["labels"]) for part in parts)
                for key, number in only_first.items():
                    unit[key] = unit[key][: max(number - before, 0)]
                store.save(f"{len(parts):06d}", unit)
                parts.append(unit)
                self.show(name, len(parts), total)
        if not any(len(part["labels"]) for part in parts):
            raise UserError(
                f"{self.sources[role].spec}: none of {limit} images can be decoded."
            )
        return {key: np.concatenate([p[key] for p in parts]) for key in parts[0]}

    def limit(self, role: str) -> int:
        """How many images of a source are looked at."""
        size = len(self.sources[role])
        return min(self.options.num_examples or size, size)

    def compiled(self, function: RowsFn) -> RowsFn:
        """Compiles a `RowsFn`; what it takes beside the images comes after them."""

        def apply(
            variables: Any, batch: Mapping[str, jax.Array], *rest: Any
        ) -> dict[str, jax.Array]:
            images = batch["images"].astype(jnp.float32) / 255.0

            ready = models.prepare(self.model, variables, self.image_shape)

            def features(x: jax.Array) -> jax.Array:
                pooled = self.model.apply(ready, x, features=True)
                assert isinstance(pooled, jax.Array)
                return pooled

            network = Network(models.logits_fn(self.model, ready), features)
            rows = function(network, images, batch["labels"], *rest)
            return rows | {"labels": batch["labels"], "mask": batch["mask"]}

        return jax.jit(apply, out_shardings=sharding.replicated(self.mesh))

    def rows(
        self,
        compiled: RowsFn,
        batch: Mapping[str, Any],
        *rest: Any,
    ) -> Arrays:
        """What a compiled function makes of a batch's decoded images."""
        placed = sharding.put_batch(batch, self.mesh)
        rows = {
            k: np.asarray(v) for k, v in compiled(self.variables, placed, *rest).items()
        }
        mask = rows.pop("mask")
        return {key: value[mask] for key, value in rows.items()}

    def preprocess(self, role: str) -> str:
        """How images of a source come to the network's size."""
        return preprocess_of(self.config, role)

    def batches(self, role: str, limit: int, start: int) -> Iterator[dict[str, Any]]:
        """Batches of at most so many images spread over a source, from one on."""
        settings = self.config.data
        with data.eval_batches(
            self.sources[role],
            preprocess=self.preprocess(role),
            batch_size=self.config.evaluate.batch_size,
            image_shape=self.image_shape,
            limit=limit,
            start=start,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_threads=settings.num_threads,
            max_bad_images=settings.max_bad_images,
        ) as batches:
            yield from batches

    def images(self, role: str) -> tuple[np.ndarray, np.ndarray]:
        """Images of a source as the model sees them, in memory, and their labels.

        Returns:
          ([N, H, W, C] uint8, [N] int32), the same in every process.
        """
        return data.materialise(
            self.sources[role],
            self.preprocess(role),
            self.image_shape,
            self.limit(role),
            self.config.data.max_bad_images,
        )

    def digests(self, role: str) -> Arrays:
        """SHA-256 of every image, as the model sees it, with its label.

        Returns:
          {"digests" [N, 32] uint8, "labels" [N] int32}.
        """
        gather = jax.jit(lambda x: x, out_shardings=sharding.replicated(self.mesh))

        def digest(batch: Mapping[str, np.ndarray]) -> Arrays:
            mine = {"digests": image_digests(batch["images"], batch["labels"])}
            mine |= {key: batch[key] for key in ("labels", "mask")}
            rows = gather(sharding.put_batch(mine, self.mesh))
            host = {key: np.asarray(value) for key, value in rows.items()}
            mask = host.pop("mask")
            return {key: value[mask] for key, value in host.items()}

        name = f"fingerprint of {role}"
        return self.over_batches(name, role, self._store_of(name, role), digest)

    def describe_data(self, role: str) -> dict[str, Any]:
        """Which images a part saw: source, count, size, preprocessing and SHA-256."""
        rows = self.digests(role)
        return {
            "source": self.sources[role].spec,
            "num_images": len(rows["labels"]),
            "num_in_source": len(self.sources[role]),
            "image_shape": list(self.image_shape),
            "preprocess": self.preprocess(role),
            "sha256": hashlib.sha256(rows["digests"].tobytes()).hexdigest(),
        }


def preprocess_of(config: ml_collections.ConfigDict, role: str) -> str:
    """The operations for labelled images, or those for all others."""
    settings = config.data
    labelled = role in ("train", "eval", "test")
    return settings.preprocess if labelled else settings.preprocess_seeds


def image_digests(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """SHA-256 of each image [B, H, W, C] uint8 and label [B]: [B, 32] uint8."""
    hashes = [
        hashlib.sha256(image.tobytes() + np.int32(label).tobytes()).digest()
        for image, label in zip(images, labels, strict=True)
    ]
    return np.frombuffer(b"".join(hashes), np.uint8).reshape(len(images), 32)


def source_fingerprint(
    source: data.Source, preprocess: str, image_shape: tuple, max_bad_images: int
) -> str:
    """SHA-256 of some images spread over a source, and of `data.content`'s digest.

    Quick enough for every start: it tells another folder or version of the same name,
    and of a folder an image whose file is of another size.
    """
    images, labels = data.materialise(
        source, preprocess, image_shape, _FINGERPRINT_IMAGES, max_bad_images
    )
    digest = hashlib.sha256(str(len(source)).encode())
    digest.update(data.content.describe(source)["content"].encode())
    digest.update(image_digests(images, labels).tobytes())
    return digest.hexdigest()


def check_finite(what: str, *arrays: np.ndarray) -> None:
    """Refuses what no figure can be made of.

    Raises:
      UserError: some values are NaN or infinite.
    """
    if not all(np.isfinite(array).all() for array in arrays):
        raise UserError(
            f"some {what} are NaN or infinite: the network has diverged; choose "
            "another checkpoint."
        )


def figure(
    value: float, interval: tuple[float, float] | None = None, count: int | None = None
) -> dict[str, Any]:
    """One number of the report, with its 95 % interval and the number of images."""
    result: dict[str, Any] = {"value": float(value)}
    if interval is not None:
        result["interval_95"] = [float(bound) for bound in interval]
    if count is not None:
        result["count"] = int(count)
    return result
