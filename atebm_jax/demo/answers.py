"""What the tabs of the page answer: pictures, classes, and how to make them again.

Nothing here knows the browser. A slider answers fast because one call of the model
makes the results of all its positions: a program edits a whole chunk of images anyway.
"""

import io
import json
import re
import shlex
import time
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from atebm_jax import constraints, data, drawing, pictures, recipes, trained
from atebm_jax.api import Model
from atebm_jax.editing import Edited
from atebm_jax.errors import UserError, check_choice
from atebm_jax.progress import say
from atebm_jax.sample import inputs, records

#: Most images and steps of a request; the record of an edit has room for so many steps.
MOST_IMAGES, MOST_STEPS, MOST_EDIT_STEPS = drawing.CHUNK, 200, 64
#: Positions of the sliders of Explain (L2 pixels) and of denoising (shares).
RADII = np.arange(1, drawing.CHUNK + 1) / 4
STRENGTHS = np.arange(1, drawing.CHUNK + 1) / 20
SAMPLERS = ("pgd", "momentum", "adam", "sgld(noise=0.005)", "sign")
# Rules whose next step depends on the image alone: they go on from where they are.
_WITHOUT_MEMORY = ("pgd", "sign")
#: Labels of edits: the class that the network predicts; no class, by E(x).
GUESS, ANY = "guess", "any"
# A request looks at two images, and a program always works on a whole batch.
_BATCH_SIZE = 4
_EXAMPLES, _MEASURED = 24, 256


class Answer(NamedTuple):
    """What a tab shows, and what made it.

    Attributes:
      images: file name without its ending -> [H, W, C] uint8.
      settings: for JSON.
      code: the command, or Python, that makes the same of the images.
      classes: title -> class name -> probability.
      says: a sentence.
      figure: PNG file of a diagram.
    """

    images: dict[str, np.ndarray]
    settings: dict[str, Any]
    code: str
    classes: Mapping[str, dict[str, float]] = {}
    says: str = ""
    figure: bytes | None = None

    def archive(self) -> bytes:
        """A ZIP file of images and settings."""
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as file:
            for name, image in self.images.items():
                file.writestr(f"{name}.png", pictures.png(image))
            settings = self.settings | {"code": self.code}
            file.writestr("settings.json", json.dumps(settings, indent=2))
        return stream.getvalue()


class Answers:
    """A model that is ready to answer: its programs are compiled.

    Images are [H, W, C] uint8. Every method raises `UserError` for values out of their
    range, whatever page or program sends them.

    Attributes:
      model: the network; plain: one to compare with, or None.
      examples: [N, H, W, C]; captions: what they are.
      energies: name of a set -> E(x) of its images.
    """

    def __init__(
        self,
        workdir: str,
        console: Console,
        *,
        plain: str | None = None,
        source: str | None = None,
        data_dir: str = "",
    ):
        """Loads, compiles every program and measures energies.

        Args:
          workdir: as of `atebm_jax.load`.
          console: is told how far it is.
          plain: workdir of a network for the same images and classes.
          source: data set of the examples; default the config's test set, or samples
            where that is not here.
          data_dir: where TFDS data sets lie.

        Raises:
          UserError: something cannot be loaded, or the networks do not fit together.
        """
        loaded = trained.load(workdir)
        self.model = Model(loaded, _BATCH_SIZE)
        self.plain = None if plain is None else Model(trained.load(plain), _BATCH_SIZE)
        if self.plain is not None:
            _check_alike(self.model, self.plain)
        self.names, self.config = self.model.class_names, self.model.config
        self._workdir = workdir
        self._about = records.described(loaded, workdir)
        self._cached = lru_cache(maxsize=8)(self._edited)
        self._compile(console)
        every = np.resize(np.arange(len(self.names)), 2 * drawing.CHUNK)
        drawn = self.model.sample(every)
        noise = np.random.default_rng(0).random((_MEASURED, *self.model.image_shape))
        sets = {"noise": noise.astype(np.float32), "samples": drawn}
        self.examples = _levels(drawn)[:_EXAMPLES]
        self.captions = [f"sample: {self.names[k]}" for k in every[:_EXAMPLES]]
        try:
            images, captions = self._test_images(loaded, source, data_dir)
            self.examples, self.captions = images[:_EXAMPLES], captions[:_EXAMPLES]
            sets = {"test images": images} | sets
        except UserError as error:
            if source is not None:
                raise
            say(console, f"examples are samples, as the test set is not here: {error}")
        self.energies = {name: self.model.energy(x) for name, x in sets.items()}

    def _test_images(
        self, loaded: trained.Trained, source: str | None, data_dir: str
    ) -> tuple[np.ndarray, list[str]]:
        """Images [N, H, W, C] uint8 of a data set, and their classes."""
        spec = source or self.config.data.test
        length = len(data.open_source(spec, data_dir or self.config.data.data_dir))
        index = f"0:{min(length, _MEASURED)}"
        asked = {"images": [spec], "index": index, "data_dir": data_dir}
        found = inputs.pictures(Namespace(**asked, classes_by_place=False), loaded)
        captions = [p.origin if p.label is None else self.names[p.label] for p in found]
        return np.stack([p.read(self.model.image_shape) for p in found]), captions

    def _compile(self, console: Console) -> None:
        """Asks everything once."""
        image = np.full(self.model.image_shape, 128, np.uint8)
        hole = np.ones(image.shape[:2], bool)
        calls: dict[str, Callable[[], Any]] = {
            f"sampler {name}": partial(self._drawn, [0], 1, sampler=name)
            for name in SAMPLERS
        }
        for label in (0, ANY):
            one = "any class" if label == ANY else "a class"
            calls[f"denoise, {one}"] = partial(self.denoise, image, label, 0.1, 1, 0, 1)
            calls[f"inpaint, {one}"] = partial(self.inpaint, image, hole, label, 1)
        calls["attack"] = partial(self.attack, image, self.most_attack / 4)
        for number, (name, call) in enumerate(calls.items(), 1):
            begun = time.monotonic()
            call()
            took = f"{time.monotonic() - begun:.1f} s"
            say(console, f"compiled {number} of {len(calls)}: {name} ({took})")
        self._cached.cache_clear()

    def read(self, path: str) -> np.ndarray:
        """The image of a file, scaled and cut to the network's size."""
        try:
            return inputs.read_file(
                Path(path), self.model.image_shape, self.config, resize=True
            )
        except UserError as error:
            # Of the upload's path only the name means something to its owner.
            raise UserError(str(error).replace(path, Path(path).name)) from error

    def predicted(self, image: np.ndarray) -> dict[str, float]:
        """Class name -> probability."""
        return self._named(self.model.classify(image)[0])

    # What the tabs ask.

    def sample(
        self,
        label: int | None,
        count: int,
        seed: int,
        steps: int,
        step_size: float,
        sampler: str,
    ) -> Iterator[Answer]:
        """Samples after more and more steps.

        Args:
          label: a class; None for all classes in turn.
          count, seed, steps, step_size, sampler: as of `Model.sample`.
        """
        count = _checked("images", count, 1, MOST_IMAGES)
        steps = _checked("steps", steps, 0, MOST_STEPS)
        check_choice("sampler", sampler, SAMPLERS)
        every = range(len(self.names)) if label is None else [self._class(label)]
        labels = np.resize(every, count)
        how = {"step_size": step_size, "seed": seed, "sampler": sampler}
        flags = {} if label is None else {"classes": self._word(label)}
        flags |= {"count": count, "num_steps": steps, **how, "quantise": "nearest"}
        images, done = None, 0
        for end in _ends(steps, sampler):
            if sampler in _WITHOUT_MEMORY:
                images = self._drawn(labels, end - done, seeds=images, **how)
            else:
                images = self._drawn(labels, end, **how)
            done = end
            files = [f"{n:02d}_{self._word(k)}" for n, k in enumerate(labels)]
            yield Answer(
                dict(zip(files, _levels(images), strict=True)),
                self._described("sample", flags),
                self._command("", flags),
                says=f"step {end} of {steps}",
            )

    def explain(
        self, image: np.ndarray, target: int, radius: float, steps: int
    ) -> Answer:
        """A counterfactual in the L2 ball of one of `RADII`."""
        row = _position("radius", radius, RADII)
        flags = {"target": self._word(self._class(target)), "radius": RADII[row]}
        return self._edit("explain", image, target, steps, flags, row=row)

    def denoise(
        self,
        image: np.ndarray,
        label: int | str,
        sigma: float,
        strength: float,
        seed: int,
        steps: int,
    ) -> Answer:
        """Adds noise, and removes it with one of `STRENGTHS`.

        Args:
          label: a class, `GUESS` or `ANY`.
          sigma: of the noise, pixels of a [0, 1] image.
        """
        sigma = _checked("noise", sigma, 0.01, 1, float)
        row = _position("strength", strength, STRENGTHS)
        recipes.check_seed(seed)
        noise = np.random.default_rng(seed).normal(0, sigma, image.shape)
        noisy = _levels(np.clip(image / 255 + noise, 0, 1))
        flags = {"sigma": sigma, "strength": STRENGTHS[row]}
        more = {"before noise": image}
        return self._edit("denoise", noisy, label, steps, flags, row=row, more=more)

    def inpaint(
        self, image: np.ndarray, hole: np.ndarray, label: int | str, steps: int
    ) -> Answer:
        """Repaints a hole, [H, W] bool."""
        more = {"mask": 255 * hole[..., None].astype(np.uint8)}
        flags = {"mask": "mask.png"}
        return self._edit("inpaint", image, label, steps, flags, more=more)

    @property
    def most_attack(self) -> float:
        """The largest radius of an attack: four times that of the evaluation."""
        return 4 * float(self.config.evaluate.attack.epsilon)

    def attack(self, image: np.ndarray, radius: float) -> Answer:
        """Attacks the class that each network predicts; radius 0 leaves the image."""
        radius = _checked("radius", radius, 0, self.most_attack, float)
        settings = self.config.evaluate.attack
        how = {"norm": "linf" if settings.norm == "linf" else "l2", "epsilon": radius}
        # As many steps from the centre to the edge as in the evaluation.
        how |= {"step_size": float(settings.step_size) * radius / settings.epsilon}
        how |= {"num_steps": settings.num_steps}
        images, classes = {"image": image}, {}
        for model, which in ((self.model, ""), (self.plain, " (plain)")):
            if model is None:
                continue
            start = end = constraints.as_images(image)
            before = model.classify(start)[0]
            if radius > 0:
                end = model.attack(start, int(before.argmax()), **how)
            classes[f"before{which}"] = self._named(before)
            classes[f"after{which}"] = self._named(model.classify(end)[0])
            images[f"attacked{which}"] = _levels(end[0])
            images[f"difference{which}"] = pictures.difference(end[0] - start[0])
        given = ", ".join(f"{name}={value!r}" for name, value in how.items())
        call = f"model.attack(image, model.classify(image).argmax(-1), {given})"
        settings = self._described("attack", how)
        return Answer(images, settings, self._python(call), classes)

    def energy(self, image: np.ndarray) -> Answer:
        """Where an image lies among others."""
        here = float(self.model.energy(image)[0])
        shares = [
            f"{(energies > here).mean():.0%} of {name}"
            for name, energies in self.energies.items()
        ]
        return Answer(
            {"image": image},
            self._described("energy", {"energy": here}),
            self._python("model.energy(image)"),
            says=f"E(x) = {here:.2f}: likelier than {', '.join(shares)}.",
            figure=pictures.energies(self.energies, here),
        )

    # What the answers share.

    def _drawn(self, labels: Any, steps: int, **how: Any) -> np.ndarray:
        return self.model.sample(np.asarray(labels), num_steps=steps, **how)

    def _edit(
        self,
        task: str,
        image: np.ndarray,
        label: int | str,
        steps: int,
        flags: dict[str, Any],
        *,
        row: int = 0,
        more: Mapping[str, np.ndarray] = {},
    ) -> Answer:
        """One result of a task; `more` are images for the visitor."""
        steps = _checked("steps", steps, 0, MOST_EDIT_STEPS)
        if label not in (GUESS, ANY):
            label = self._class(label)
        hole = more["mask"].tobytes() if task == "inpaint" else None
        noise = flags.get("sigma")
        edited = self._cached(task, image.tobytes(), label, steps, hole, noise)
        one = jax.tree.map(lambda rows: rows[row], edited)
        start = {} if task == "explain" else {"start": _levels(one.start)}
        images = {"original": image, **start, "result": _levels(one.images)}
        images["difference"] = pictures.difference(one.images - one.start)
        names, path = self.names, one.path
        curves = {f"p({names[one.originals]})": path.original_confidence}
        curves |= {f"p({names[one.targets]})": path.target_confidence}
        command = "explain" if task == "explain" else "edit"
        if command == "edit":
            flags = {"task": task, **flags, "target": self._word(label)}
        flags |= {"num_steps": steps}
        before, after = self.model.classify(np.stack([one.start, one.images]))
        results = {"results": records.of_edit(one, names)}
        return Answer(
            images | dict(more),
            self._described(task, flags | results),
            self._command(f"{command} original.png", flags),
            {"before": self._named(before), "after": self._named(after)},
            figure=pictures.way(curves, path.energy),
        )

    def _edited(
        self,
        task: str,
        image: bytes,
        label: int | str,
        steps: int,
        hole: bytes | None,
        sigma: float | None,
    ) -> Edited:
        """The results of all positions of a task's slider."""
        x = np.frombuffer(image, np.uint8).reshape(self.model.image_shape)
        if task == "explain":
            where: Any = constraints.ball(np.stack([x] * len(RADII)), RADII)
        elif task == "denoise":
            balls = [constraints.denoise(x, sigma, strength=s) for s in STRENGTHS]
            where = jax.tree.map(lambda *parts: np.concatenate(parts), *balls)
        else:
            mask = np.frombuffer(hole, np.uint8).reshape(x.shape[:2])
            where = constraints.inpaint(x, mask)
        labels = None if label == ANY else label
        return self.model.edit(where, labels, num_steps=steps)

    def _command(self, words: str, flags: Mapping[str, Any]) -> str:
        given = {**flags, "workdir": self._workdir, "out": "again"}
        parts = [f"--{name}={value}" for name, value in given.items()]
        return shlex.join(["python", "-m", "atebm_jax.sample", *words.split(), *parts])

    def _python(self, call: str) -> str:
        return (
            "import atebm_jax, numpy as np\nfrom PIL import Image\n"
            f"model = atebm_jax.load({self._workdir!r})\n"
            'image = np.asarray(Image.open("image.png")).reshape(model.image_shape)\n'
            f"{call}"
        )

    def _described(self, task: str, given: Mapping[str, Any]) -> dict[str, Any]:
        return {"tab": task, **given, **self._about}

    def _named(self, probabilities: np.ndarray) -> dict[str, float]:
        return dict(zip(self.names, probabilities.tolist(), strict=True))

    def _class(self, label: Any) -> int:
        return _checked("class", label, 0, len(self.names) - 1)

    def _word(self, label: int | str) -> str:
        """A class as the commands take it, and file names."""
        if isinstance(label, str):
            return label
        name = self.names[label]
        plain = name == str(label) or re.fullmatch(r"[a-z]\w*", name)
        return name if plain and self.names.count(name) == 1 else f"place:{label}"


def _ends(steps: int, sampler: str) -> list[int]:
    """Numbers of steps at which samples are shown.

    Rules with a memory begin anew each time, for the last images to be those of one
    run: these are shown less often.
    """
    if sampler in _WITHOUT_MEMORY:
        return [*range(0, steps, max(1, steps // 10)), steps]
    return sorted({0, steps // 8, steps // 3, steps})


def _levels(images: np.ndarray) -> np.ndarray:
    return np.asarray(recipes.QUANTISE["nearest"](images))


def _checked(name: str, value: Any, low: float, high: float, kind: Any = int) -> Any:
    """A number in its range."""
    if not isinstance(value, int | float) or not low <= value <= high:
        raise UserError(f"{name} is {value!r}: expected {low:g} to {high:g}.")
    if kind(value) != value:
        raise UserError(f"{name} is {value!r}: expected a whole number.")
    return kind(value)


def _position(name: str, value: Any, places: np.ndarray) -> int:
    """The nearest position of a slider."""
    _checked(name, value, places[0], places[-1], float)
    return int(np.abs(places - value).argmin())


def _check_alike(model: Model, plain: Model) -> None:
    for what in ("image_shape", "class_names"):
        own, other = getattr(model, what), getattr(plain, what)
        if own != other:
            raise UserError(
                f"{what} is {other} of --plain and {own} of --workdir: give a network "
                "for the same images and classes."
            )
