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
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from atebm_jax import ascent, constraints, data, drawing, pictures, recipes, trained
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
# JEM's noise on images in [0, 1], and the step size that belongs to it.
_SGLD, _SGLD_STEP = "sgld(noise=0.005)", 0.25
SAMPLERS = tuple({"sgld": _SGLD}.get(name, name) for name in ascent.RULES)
# Rules whose next step depends on the image alone: they go on from where they are.
_WITHOUT_MEMORY = ("pgd", "sign")
#: Labels of edits: the class that the network predicts; no class, by E(x).
GUESS, ANY = "guess", "any"
# A request looks at two images, and a program always works on a whole batch.
_BATCH_SIZE = 2
_EXAMPLES, _MEASURED = 24, 256
_PYTHON = """import atebm_jax, numpy as np
from PIL import Image
model = atebm_jax.load({!r})
image = np.asarray(Image.open("image.png")).reshape(model.image_shape)
"""


class Answer(NamedTuple):
    """What a tab shows, and what made it."""

    images: dict[str, np.ndarray]  #: file name without its ending -> [H, W, C] uint8
    #: for JSON; "again" is the command, or Python, that makes the same
    settings: dict[str, Any]
    classes: Mapping[str, dict[str, float]] = {}  #: title -> class name -> probability
    says: str = ""  #: a sentence
    figure: bytes | None = None  #: PNG file of a diagram
    captions: Sequence[str] = ()  #: of the images, in their order

    def archive(self) -> bytes:
        """A ZIP file of images and settings."""
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as file:
            for name, image in self.images.items():
                file.writestr(f"{name}.png", pictures.png(image))
            file.writestr("settings.json", json.dumps(self.settings, indent=2))
        return stream.getvalue()


class Answers:
    """A model that is ready to answer: its programs are compiled.

    Images are [H, W, C] uint8. Every method raises `UserError` for values out of their
    range, whatever page or program sends them.

    Attributes:
      model, plain: the network, and one to compare it with or None.
      examples, captions: [N, H, W, C], and what they are.
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
        self.workdir, self.model = workdir, Model(loaded, _BATCH_SIZE)
        self.config = loaded.config
        self.names = data.classes.names_of(loaded.class_names, loaded.num_classes)
        self.plain = None if plain is None else Model(trained.load(plain), _BATCH_SIZE)
        _check_alike(self.model, self.plain or self.model)
        self._about = records.described(loaded, workdir)
        self._cached = lru_cache(maxsize=8)(self._edited)
        self._compile(console)
        every = np.resize(np.arange(len(self.names)), 2 * drawing.CHUNK)
        drawn = self.model.sample(every)
        noise = np.random.default_rng(0).random((_MEASURED, *self.model.image_shape))
        sets = {"noise": noise.astype(np.float32), "samples": drawn}
        images, captions = _levels(drawn), [f"sample: {self.names[k]}" for k in every]
        try:
            images, captions = self._test_images(loaded, source, data_dir)
            sets = {"test images": images} | sets
        except UserError as error:
            if source is not None:
                raise
            say(console, f"examples are samples, as the test set is not here: {error}")
        self.examples, self.captions = images[:_EXAMPLES], captions[:_EXAMPLES]
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
        tasks: dict[str, Any] = {"inpaint": {"hole": hole}, "denoise": {"place": 1}}
        for label in (0, ANY):
            for task, more in tasks.items():
                name = f"{task}, {'any class' if label == ANY else 'a class'}"
                calls[name] = partial(self.edit, task, image, label, 1, **more)
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
            shape = self.model.image_shape
            return inputs.read_file(Path(path), shape, self.config, resize=True)
        except UserError as error:
            # Of an upload's path, its owner knows the name alone.
            raise UserError(str(error).replace(path, Path(path).name)) from error

    def predicted(self, image: np.ndarray) -> dict[str, float]:
        """Class name -> probability."""
        return self._named(self.model.classify(image)[0])

    def step_size(self, sampler: str) -> float:
        """The config's step size in the unit of a sampler; of SGLD that of JEM."""
        own = float(self.config.evaluate.samples.step_size)
        a_pixel = own / self.examples[0].size ** 0.5
        units = {"sign": round(a_pixel, 6), _SGLD: _SGLD_STEP}
        return units.get(sampler, own)

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
        step_size = _checked("step size", step_size, 0, 1e6, float)
        check_choice("sampler", sampler, SAMPLERS)
        every = range(len(self.names)) if label is None else [self._class(label)]
        labels = np.resize(every, count)
        how = {"step_size": step_size, "seed": seed, "sampler": sampler}
        given: dict[str, Any] = {}
        given |= {} if label is None else {"classes": self._word(label)}
        given |= {"count": count, "num_steps": steps, **how, "quantise": "nearest"}
        words = [self._word(k).replace(":", "") for k in labels]
        files = [f"{number:02d}_{word}" for number, word in enumerate(words)]
        captions = [self.names[k] for k in labels]
        settings = self._settings("sample", given, "")
        images, done = None, 0
        for end in _ends(steps, sampler):
            if sampler in _WITHOUT_MEMORY:
                images = self._drawn(labels, end - done, seeds=images, **how)
            else:
                images = self._drawn(labels, end, **how)
            done = end
            shown = dict(zip(files, _levels(images), strict=True))
            says = f"step {end} of {steps}"
            yield Answer(shown, settings, says=says, captions=captions)

    def edit(
        self,
        task: str,
        image: np.ndarray,
        label: int | str,
        steps: int,
        place: float = 0.0,
        sigma: float = 0.1,
        seed: int = 0,
        hole: np.ndarray | None = None,
    ) -> Answer:
        """Explains, denoises or inpaints, with the confidences along the way.

        Args:
          task: "explain", "denoise" or "inpaint".
          image: to be edited; to "denoise", noise is added first.
          label: a class; of edits also `GUESS` or `ANY`.
          steps: of the descent.
          place: of the slider, a radius of `RADII` or a strength of `STRENGTHS`.
          sigma, seed: of the noise, pixels of a [0, 1] image.
          hole: [H, W] bool, to be painted anew.
        """
        steps = _checked("steps", steps, 0, MOST_EDIT_STEPS)
        if task == "explain" or label not in (GUESS, ANY):
            label = self._class(label)
        row, more, mask = 0, {}, b""
        given: dict[str, Any] = {"target": self._word(label)}
        if task == "explain":
            row = _position("radius", place, RADII)
            given["radius"] = RADII[row]
        elif task == "denoise":
            row = _position("strength", place, STRENGTHS)
            sigma = _checked("noise", sigma, 0.01, 1, float)
            recipes.check_seed(seed)
            noise = np.random.default_rng(seed).normal(0, sigma, image.shape)
            more = {"before noise": image}
            image = _levels(np.clip(image / 255 + noise, 0, 1))
            given |= {"task": task, "sigma": sigma, "strength": STRENGTHS[row]}
        elif hole is not None:
            more = {"mask": 255 * hole[..., None].astype(np.uint8)}
            mask = more["mask"].tobytes()
            given |= {"task": task, "mask": "mask.png"}
        edited = self._cached(task, image.tobytes(), label, steps, sigma, mask)
        one = jax.tree.map(lambda rows: rows[row], edited)
        images = {"original": image, "start": _levels(one.start)}
        images |= {"result": _levels(one.images), **more}
        images["difference"] = pictures.difference(one.images - one.start)
        names, path = self.names, one.path
        curves = {f"p({names[one.originals]})": path.original_confidence}
        curves |= {f"p({names[one.targets]})": path.target_confidence}
        command = "explain" if task == "explain" else "edit"
        given = given | {"num_steps": steps}
        settings = self._settings(task, given, f"{command} original.png")
        settings["results"] = records.of_edit(one, names)
        before, after = self.model.classify(np.stack([one.start, one.images]))
        classes = {"before": self._named(before), "after": self._named(after)}
        return Answer(
            images, settings, classes, figure=pictures.way(curves, path.energy)
        )

    def _edited(
        self,
        task: str,
        image: bytes,
        label: int | str,
        steps: int,
        sigma: float,
        mask: bytes,
    ) -> Edited:
        """The results of all positions of a task's slider."""
        x = np.frombuffer(image, np.uint8).reshape(self.model.image_shape)
        if task == "explain":
            where: Any = constraints.ball(np.stack([x] * len(RADII)), RADII)
        elif task == "denoise":
            balls = [constraints.denoise(x, sigma, strength=s) for s in STRENGTHS]
            where = jax.tree.map(lambda *parts: np.concatenate(parts), *balls)
        else:
            hole = np.frombuffer(mask, np.uint8).reshape(x.shape[:2])
            where = constraints.inpaint(x, hole)
        labels = None if label == ANY else label
        return self.model.edit(where, labels, num_steps=steps)

    @property
    def most_attack(self) -> float:
        """The largest radius of an attack: four times that of the evaluation."""
        return 4 * float(self.config.evaluate.attack.epsilon)

    def attack(self, image: np.ndarray, radius: float) -> Answer:
        """Attacks the class that each network predicts; radius 0 leaves the image."""
        radius = _checked("radius", radius, 0, self.most_attack, float)
        own = self.config.evaluate.attack
        how: dict[str, Any] = {"norm": "linf" if own.norm == "linf" else "l2"}
        how["epsilon"] = radius
        # As many steps from the centre to the edge as in the evaluation.
        how |= {"step_size": float(own.step_size) * radius / own.epsilon}
        start = constraints.as_images(image)
        images, classes = {"image": image}, {}
        for model, which in ((self.model, ""), (self.plain, " (plain)")):
            if model is None:
                continue
            before = after = model.classify(start)[0]
            end = start
            if radius > 0:
                end = model.attack(start, int(before.argmax()), **how)
                after = model.classify(end)[0]
            classes[f"before{which}"] = self._named(before)
            classes[f"after{which}"] = self._named(after)
            images[f"attacked{which}"] = _levels(end[0])
            images[f"difference{which}"] = pictures.difference(end[0] - start[0])
        given = ", ".join(f"{name}={value!r}" for name, value in how.items())
        call = f"model.attack(image, model.classify(image).argmax(-1), {given})"
        return Answer(images, self._settings("attack", how, "", call), classes)

    def energy(self, image: np.ndarray) -> Answer:
        """Where an image lies among others."""
        here = float(self.model.energy(image)[0])
        shares = [
            f"{(energies > here).mean():.0%} of {name}"
            for name, energies in self.energies.items()
        ]
        settings = self._settings("energy", {"energy": here}, "", "model.energy(image)")
        says = f"E(x) = {here:.2f}: likelier than {', '.join(shares)}."
        figure = pictures.energies(self.energies, here)
        return Answer({"image": image}, settings, says=says, figure=figure)

    # What the answers share.

    def _drawn(self, labels: Any, steps: int, **how: Any) -> np.ndarray:
        return self.model.sample(np.asarray(labels), num_steps=steps, **how)

    def _settings(
        self, tab: str, given: Mapping[str, Any], words: str, call: str = ""
    ) -> dict[str, Any]:
        """Settings for JSON, with what makes the same again.

        Args:
          tab, given: what was asked.
          words: of the command of `atebm_jax.sample`, before its flags.
          call: where there is none, of the model, in Python.
        """
        flags = {**given, "workdir": self.workdir, "out": "again"}
        parts = [f"--{name}={value}" for name, value in flags.items()]
        again = ["python", "-m", "atebm_jax.sample", *words.split(), *parts]
        code = f"{_PYTHON.format(self.workdir)}{call}" if call else shlex.join(again)
        return {"tab": tab, **given, **self._about, "again": code}

    def _named(self, probabilities: np.ndarray) -> dict[str, float]:
        return dict(zip(self.names, probabilities.tolist(), strict=True))

    def _class(self, label: Any) -> int:
        return _checked("class", label, 0, len(self.names) - 1)

    def _word(self, label: int | str) -> str:
        """A class as the commands take it."""
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
    for what in ("image_shape", "num_classes", "class_names"):
        own, other = getattr(model, what), getattr(plain, what)
        if own != other and None not in (own, other):
            raise UserError(
                f"{what} is {other} of --plain and {own} of --workdir: give a network "
                "for the same images and classes."
            )
