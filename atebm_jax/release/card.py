"""The model card of a release: its README.md, as model hubs show it."""

import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from atebm_jax import archs, release_format
from atebm_jax.evaluate import report as reports
from atebm_jax.names import printable
from atebm_jax.trained import Trained

_TAGS: tuple[str, ...] = ("jax", "flax", "image-classification", "energy-based-model")
_TAGS += ("adversarial-robustness", "image-generation")
# Metrics whose figures stand in the header, where hubs look for them.
_HEADLINES = ("accuracy", "pgd", "autoattack", "generation")
_PAPER = "[Dual Adversarial Training](https://arxiv.org/abs/2510.13872)"


def text(
    loaded: Trained,
    report: Mapping[str, Any] | None,
    *,
    name: str,
    license_name: str,
    command: str | None,
    dtype: str,
    programs: bool,
) -> str:
    """The card: header, how to load, figures with their protocol, training, licence.

    Args:
      loaded: the model.
      report: of its evaluation, whose plots lie in `evaluation/`; None for no figures.
      name, license_name: its title, and the licence as hubs abbreviate it.
      command: what trained the weights; None where nobody says.
      dtype, programs: of the weights, and whether there are programs for JAX alone.
    """
    name = printable(name)
    parts = [
        _header(report, name, license_name),
        f"# {name}\n\n{_about(loaded, dtype)}",
        _use(loaded),
        *([_alone(loaded, np.dtype(dtype).itemsize)] if programs else []),
        *([reports.markdown(report, level=2, folder="evaluation/")] if report else []),
        _training(loaded, command),
        _classes(loaded),
        f"## Licence\n\n{license_name}; the text is in `LICENSE`.\n",
    ]
    return "\n".join(parts)


def _header(report: Mapping[str, Any] | None, name: str, license_name: str) -> str:
    """The YAML header; every value is JSON, which YAML reads."""
    fields: dict[str, Any] = {
        "license": license_name.lower(),
        "library_name": "atebm_jax",
        "pipeline_tag": "image-classification",
        "tags": _TAGS,
    }
    results = [] if report is None else _results(report)
    if results:
        fields["model-index"] = [{"name": name, "results": results}]
    lines = (f"{k}: {json.dumps(v, ensure_ascii=False)}" for k, v in fields.items())
    return "\n".join(["---", *lines, "---", ""])


def _results(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The headline figures, one result a metric, as hubs have them."""
    source = printable(str(report["data"]["test"]["source"]))
    results = []
    for metric in _HEADLINES:
        figures = report["metrics"].get(metric, {}).get("figures", {})
        finite = {k: x["value"] for k, x in figures.items() if _is_finite(x["value"])}
        listed = [
            {"type": figure, "name": f"{metric}: {figure}", "value": value}
            for figure, value in finite.items()
        ]
        if listed:
            task = {"type": "image-classification"}
            data = {"type": "image", "name": source, "split": "test"}
            results.append({"task": task, "dataset": data, "metrics": listed})
    return results


def _is_finite(value: Any) -> bool:
    return isinstance(value, float | int) and math.isfinite(value)


def _about(loaded: Trained, dtype: str) -> str:
    size = sum(np.size(x) for x in jax.tree.leaves(loaded.variables.get("params", {})))
    shape = " x ".join(map(str, loaded.image_shape))
    meta = loaded.meta
    return (
        "One network that classifies, resists attacks and draws images: its logits "
        "f(x) are read\n"
        "as the energies E(x, y) = -f(x)[y] and E(x) = -logsumexp f(x).\n"
        f"The method is {_PAPER}.\n\n"
        f"- Network: `{archs.describe(loaded.config.model)}`, {size:,} parameters, "
        "normalisation inside.\n"
        f"- Images: {shape}, values in [0, 1]. Classes: {loaded.num_classes}.\n"
        f"- Weights: averaged, {dtype}, of {printable(meta['stage'])} step "
        f"{meta['step']}, T = {meta['T']};\n  SHA-256 `{loaded.fingerprint}`.\n"
    )


def _use(loaded: Trained) -> str:
    labels = list(range(min(loaded.num_classes, 3)))
    return f"""## Use

With the package `atebm_jax`, from this folder or from a hub:

```python
import atebm_jax

model = atebm_jax.load("FOLDER")  # or "hf:OWNER/NAME"
images = model.sample({labels})
model.classify(images).argmax(-1), model.energy(images)
```

`--workdir=FOLDER` works in every command that reads a model, and
`--config.init_from=FOLDER` starts training from it.
Nothing in this folder is code that loading it would run.
"""


def _alone(loaded: Trained, size: int) -> str:
    """How to run the programs; the block runs as it stands, in the folder."""
    height, width, channels = loaded.image_shape
    samples = loaded.config.evaluate.samples
    labels = [k % loaded.num_classes for k in range(4)]
    images = f"(4, {height}, {width}, {channels})"
    start = f"images = np.random.default_rng(0).random({images}, np.float32)"
    if loaded.gaussian is not None:
        start = f"""means, factors = arrays["seeds/means"], arrays["seeds/factors"]
means, factors = (x[labels % len(means)] for x in (means, factors))
z = np.random.default_rng(0).standard_normal(factors.shape[:2], np.float32)
images = means + np.einsum("br,brhwc->bhwc", z, factors)
images = np.clip(jax.image.resize(images, {images}, "cubic"), 0, 1)"""
    return f"""## Use without the package

`programs/` has logits, energy and the sampler as programs of `jax.export`, for batches
of any size on CPUs, GPUs and TPUs. They need `pip install jax flatbuffers` and nothing
else:

```python
import json

import jax
import jax.export
import numpy as np

with open("{release_format.WEIGHTS}", "rb") as file:
    about = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    content = file.read()
about.pop("__metadata__", None)
arrays = {{}}
for name, x in about.items():
    stored = np.frombuffer(content[slice(*x["data_offsets"])], "<f{size}")
    arrays[name] = stored.astype(np.float32).reshape(x["shape"])
weights = {{name: x for name, x in arrays.items() if not name.startswith("seeds/")}}
kind = "cpu" if jax.default_backend() == "cpu" else "accelerator"


def program(name):
    with open(f"programs/{{kind}}/{{name}}.jaxexport", "rb") as file:
        return jax.jit(jax.export.deserialize(bytearray(file.read())).call)


labels = np.array({labels}, np.int32)  # -1 draws from all classes, by E(x)
{start}
settings = np.uint32(0), np.float32({samples.step_size}), np.int32({samples.num_steps})
images = program("sample")(weights, images, labels, *settings)  # seed, step size, steps
logits = program("logits")(weights, images)  # E(x, y) is -logits[:, y]
energies = program("energy")(weights, images)  # E(x)
```
"""


def _training(loaded: Trained, command: str | None) -> str:
    config = loaded.config
    data = config.data.train or "not known here: the weights were imported"
    seeds = (
        config.data.seeds
        if loaded.gaussian is None
        else (f"{config.data.seeds}, which {release_format.WEIGHTS} holds")
    )
    made = f"- Command: `{printable(command.replace('`', ''))}`\n" if command else ""
    return f"""## Training

{made}- Data: {printable(data)}. Seeds of the contrastive images: {printable(seeds)}.
- Every setting is in `{release_format.CONFIG}` under `config`.
"""


def _classes(loaded: Trained) -> str:
    if loaded.class_names is None:
        return "## Classes\n\nThe checkpoint does not name them.\n"
    names = (
        f"{k}. `{name.replace('`', '')}`" for k, name in enumerate(loaded.class_names)
    )
    return "\n".join(["## Classes", "", *names, ""])
