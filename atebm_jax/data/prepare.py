"""Makes a prepared data set.

    python -m atebm_jax.data.prepare --from=folder:PATH --to=DIR

Images are decoded once, their shorter side scaled down to `--size`, and stored as JPEG
in shards of ArrayRecord. A stopped run goes on with its finished shards, from the same
images. Exit codes: 0 finished; 2 a mistake, said in one sentence.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import io
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from array_record.python import array_record_module
from PIL import Image
from rich.console import Console

from atebm_jax import storage
from atebm_jax.command_line import fail, quiet_libraries
from atebm_jax.data import content, decoding, openimages, prepared
from atebm_jax.data.sources import FolderSource, Source, open_source
from atebm_jax.errors import UserError
from atebm_jax.local_path import local
from atebm_jax.names import check_utf8
from atebm_jax.progress import track
from atebm_jax.workdir_lock import FILE as LOCK
from atebm_jax.workdir_lock import held

# Of this command alone: several may be imported side by side.
_FLAGS = flags.FlagValues()
_FROM = flags.DEFINE_string(
    "from",
    None,
    "folder:PATH, tfds:NAME:SPLIT, or openimages:FOLDER of images.",
    flag_values=_FLAGS,
)
_TO = flags.DEFINE_string(
    "to", None, "Folder for the prepared set.", flag_values=_FLAGS
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", "", "Where TFDS data sets lie.", flag_values=_FLAGS
)
_SIZE = flags.DEFINE_integer(
    "size", 292, "Shorter side; smaller images stay.", flag_values=_FLAGS
)
_QUALITY = flags.DEFINE_integer(
    "quality", 95, "Of the JPEGs, 1 to 100.", flag_values=_FLAGS
)
_SHARD_SIZE = flags.DEFINE_integer(
    "shard_size", 2048, "Images of a shard.", flag_values=_FLAGS
)
_WORKERS = flags.DEFINE_integer(
    "num_workers",
    0,
    "Processes; 0 for one a core.",
    lower_bound=0,
    flag_values=_FLAGS,
)
_MAX_BAD = flags.DEFINE_integer(
    "max_bad_images",
    100,
    "Unreadable images that are passed over.",
    lower_bound=0,
    flag_values=_FLAGS,
)
_COUNT = flags.DEFINE_integer(
    "count",
    0,
    "Only so many, drawn at random; 0 for all.",
    lower_bound=0,
    flag_values=_FLAGS,
)
_SEED = flags.DEFINE_integer(
    "seed", 0, "Of that draw.", lower_bound=0, flag_values=_FLAGS
)
_CHECK = flags.DEFINE_bool(
    "check", False, "Only verify the set in --to.", flag_values=_FLAGS
)
_LABELS = flags.DEFINE_string(
    "labels", None, "Open Images: CSV of image labels.", flag_values=_FLAGS
)
_DESCRIPTIONS = flags.DEFINE_string(
    "class_descriptions", None, "Open Images: CSV of label names.", flag_values=_FLAGS
)
_CLASSES = flags.DEFINE_string(
    "imagenet_classes",
    None,
    "Open Images: ImageNet's class names, a class a line.",
    flag_values=_FLAGS,
)
_HIERARCHY = flags.DEFINE_string(
    "hierarchy", None, "Open Images: label hierarchy.", flag_values=_FLAGS
)


def prepare(
    source: Source,
    to: str | Path,
    *,
    size: int = 292,
    quality: int = 95,
    shard_size: int = 2048,
    num_workers: int = 1,
    max_bad_images: int = 100,
    indices: np.ndarray | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Writes a prepared set, or goes on with one that was begun with these settings.

    Args:
      source: the images.
      to: folder; made if it is not there.
      size: pixels of the shorter side; images are never enlarged.
      quality: of the JPEGs.
      shard_size: images of a shard.
      num_workers: processes.
      max_bad_images: unreadable images that are passed over and listed.
      indices: only these images of the source, in this order.
      console: for the progress bar.

    Returns:
      The index, as in `index.json`.

    Raises:
      UserError: the folder holds another set, another command writes there, or it
        cannot be written; settings do not fit, the images are not those that the set
        was begun from, or too many cannot be read.
    """
    if size < 1 or shard_size < 1 or not 1 <= quality <= 100:
        raise UserError(
            f"size is {size}, shard_size {shard_size} and quality {quality}: the first "
            "two must be positive, the third 1 to 100."
        )
    chosen = np.arange(len(source)) if indices is None else np.asarray(indices)
    if not len(chosen):
        raise UserError(f"{source.spec}: no images are left to prepare.")
    settings = {
        "format": prepared.FORMAT,
        "source": source.spec,
        "num_source_images": len(chosen),
        "selection": hashlib.sha256(chosen.astype("<i8").tobytes()).hexdigest(),
        "class_names": list(source.class_names) if source.class_names else None,
        "size": size,
        "quality": quality,
        "shard_size": shard_size,
        "data": content.describe(source),
    }
    root = Path(local("--to", to))
    check_utf8("--to", root)
    then = "with its finished shards"
    with held(root, "--to"), storage.told_plainly(root, "prepared set", then):
        _claim(root, settings)
        for leftover in root.glob(".*.tmp"):  # of a command that was killed
            leftover.unlink(missing_ok=True)
        jobs = _jobs(source, chosen, root, settings)
        shown = console or Console(stderr=True)
        shards = _run(jobs, num_workers, max_bad_images, shown)
        return _finish(root, settings, shards)


def _jobs(
    source: Source, chosen: np.ndarray, root: Path, settings: dict[str, Any]
) -> list[Callable[[], dict[str, Any]]]:
    """One for each shard; they travel to other processes."""
    length = settings["shard_size"]
    parts = [chosen[i : i + length] for i in range(0, len(chosen), length)]
    return [
        functools.partial(
            _shard,
            source,
            part,
            root,
            prepared.shard_name(i, len(parts)),
            settings["size"],
            settings["quality"],
        )
        for i, part in enumerate(parts)
    ]


def _finish(
    root: Path, settings: dict[str, Any], shards: list[dict[str, Any]]
) -> dict[str, Any]:
    """Writes the index, which makes a data set of the shards; returns it."""
    bad = [name for shard in shards for name in shard.pop("bad")]
    index = settings | {
        "shards": shards,
        "num_images": sum(shard["num_images"] for shard in shards),
        "num_bad_images": len(bad),
    }
    storage.replace_text(root / "bad_images.txt", "".join(f"{name}\n" for name in bad))
    storage.write_json(root / prepared.INDEX, index)
    check(root)
    return index


def check(root: str | Path) -> int:
    """Compares every shard with the index: number of records and SHA-256.

    Returns:
      The number of images.

    Raises:
      UserError: names the shard that differs.
    """
    root = Path(local("--to", root))
    index = prepared.read_index(root)
    for number, shard in enumerate(index["shards"]):
        path = root / prepared.shard_name(number, len(index["shards"]))
        same = path.exists() and _sha256(path) == shard["sha256"]
        if same:
            reader = array_record_module.ArrayRecordReader(str(path))
            same = reader.num_records() == shard["num_images"]
            reader.close()
        if not same:
            raise UserError(
                f"{path} is missing or not as it was written: delete it with its .json "
                "and run the same command again."
            )
    return index["num_images"]


def _claim(root: Path, settings: dict[str, Any]) -> None:
    """Begins a set, or goes on with one from the same images with the same settings."""
    path = root / "settings.json"
    try:
        if path.exists():
            before = json.loads(path.read_text())
            _check_same(root, before if isinstance(before, dict) else {}, settings)
            if "data" in before:
                return
        elif any(not entry.name.startswith(_OWN) for entry in root.iterdir()):
            raise UserError(f"{root} is not empty: give another --to.")
        storage.write_json(path, settings)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{root} cannot be written: {error}.") from error


# Seconds between two looks of a worker at its command.
_LOOK_EVERY = 0.2
# What a command that ended before its first file, or its lock, leaves in a folder.
_OWN = (LOCK, ".settings.json.")


# What a setting is called for people, where it is not as the flag.
_SHOWN = {"selection": "which of the images (a digest)"}


def _check_same(root: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuses to mix shards of two sets of images, or of two settings."""
    spec = now["source"]
    if before.get("source") == spec:
        since, remedy = f"{root} was begun", "give another --to"
        content.check(spec, before.get("data"), now["data"], since=since, remedy=remedy)
    changed = [
        f"{_SHOWN.get(name, name)}: {_short(before.get(name))} then, "
        f"{_short(value)} now"
        for name, value in now.items()
        if name != "data" and before.get(name) != value
    ]
    if changed:
        raise UserError(
            f"{root} was begun from other images or with other settings "
            f"({'; '.join(changed)}): give the same ones, or another --to."
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:50]}..."


def _run(
    jobs: Sequence[Callable[[], dict[str, Any]]],
    num_workers: int,
    max_bad_images: int,
    console: Console,
) -> list[dict[str, Any]]:
    results: dict[int, dict[str, Any]] = {}
    with contextlib.closing(_finished(jobs, num_workers)) as finished:
        for number, result in track(finished, "shards", console, len(jobs)):
            results[number] = result
            bad = [name for r in results.values() for name in r["bad"]]
            if len(bad) > max_bad_images:
                raise UserError(
                    f"{len(bad)} images cannot be read, {bad[0]} for one, and "
                    f"--max_bad_images is {max_bad_images}: mend them, or allow more."
                )
    return [results[i] for i in range(len(jobs))]


def _finished(
    jobs: Sequence[Callable[[], dict[str, Any]]], num_workers: int
) -> Generator[tuple[int, dict[str, Any]], None, None]:
    """Number and description of each shard, as soon as it is written."""
    if num_workers == 1:
        yield from enumerate(job() for job in jobs)
        return
    # Not forked: what a thread of the writer or reader of records holds locked in that
    # moment stays locked in the child, which then waits for ever.
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        num_workers or os.cpu_count(),
        mp_context=spawn,
        initializer=_begin_worker,
        initargs=(os.getpid(),),
    ) as pool:
        waiting = {pool.submit(job): i for i, job in enumerate(jobs)}
        try:
            for future in concurrent.futures.as_completed(waiting):
                yield waiting[future], future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _begin_worker(command: int) -> None:
    """Leaves Ctrl-C to the command, a process number; ends once that has been killed.

    Then another command may write the same shard already, which does no harm: each
    writes into a file of its own, and the shard that takes its place is the same.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "setitimer"):  # Windows
        return

    # The number is given, as the command may be gone before its worker has begun.
    def look(number: int, frame: Any) -> None:
        if os.getppid() != command:
            os._exit(1)

    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, _LOOK_EVERY, _LOOK_EVERY)


def _shard(
    source: Source, indices: np.ndarray, root: Path, name: str, size: int, quality: int
) -> dict[str, Any]:
    """Writes one shard, unless it is there already; its description."""
    description = root / f"{name}.json"
    if description.exists():
        return json.loads(description.read_text())
    with storage.replacing(root / name, shared=True) as temporary:
        result = _written(source, indices, temporary, size, quality)
    # Last, because it says that the shard is whole.
    storage.write_json(description, result)
    return result


def _written(
    source: Source, indices: np.ndarray, path: Path, size: int, quality: int
) -> dict[str, Any]:
    """Writes the records of a shard; its description."""
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    written, bad = 0, []
    for index in indices.tolist():
        try:
            example = source[index]
            record = prepared.pack(
                resized(example["image"], size, quality), example["label"]
            )
        except content.UNREADABLE as error:
            bad.append(f"{source.describe(index)}: {error}")
            continue
        writer.write(record)
        written += 1
    writer.close()
    return {"num_images": written, "sha256": _sha256(path), "bad": bad}


def resized(image: bytes | np.ndarray, size: int, quality: int) -> bytes:
    """JPEG of an image with its shorter side scaled down to `size`, antialiased.

    A JPEG that is not larger stays byte for byte what it is.

    Raises:
      ValueError: it cannot be decoded.
    """
    pixels = decoding.decode(image, 3)
    height, width = pixels.shape[:2]
    shorter = min(height, width)
    is_jpeg = isinstance(image, bytes) and image[:3] == b"\xff\xd8\xff"
    if shorter <= size and is_jpeg and isinstance(image, bytes):
        return image
    picture = Image.fromarray(pixels)
    if shorter > size:
        shape = (round(width * size / shorter), round(height * size / shorter))
        picture = picture.resize(shape, Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=quality, subsampling=0)
    return stream.getvalue()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open(to: str) -> tuple[Source, np.ndarray | None]:
    """The source of the flags, and which of its images."""
    kind, _, folder = str(_FROM.value).partition(":")
    source: Source
    if kind != "openimages":
        source = open_source(str(_FROM.value), _DATA_DIR.value)
        candidates = np.arange(len(source))
    else:
        needed = {
            "labels": _LABELS.value,
            "class_descriptions": _DESCRIPTIONS.value,
            "imagenet_classes": _CLASSES.value,
        }
        missing = [f"--{name}" for name, value in needed.items() if not value]
        if missing:
            raise UserError(f"openimages needs {' and '.join(missing)} too.")
        images = FolderSource(folder)
        decisions = Path(local("--to", to).rstrip(os.sep) + ".labels.csv")
        with storage.writing(decisions, "Make room or give another --to."):
            decisions.parent.mkdir(parents=True, exist_ok=True)
            allowed = openimages.select(
                str(_LABELS.value),
                str(_DESCRIPTIONS.value),
                str(_CLASSES.value),
                _HIERARCHY.value,
                decisions,
            )
        names = [Path(images.path(i)).stem for i in range(len(images))]
        source = images
        candidates = np.flatnonzero([name in allowed for name in names])
        print(
            f"{len(candidates)} of {len(source)} images overlap no class; the decision "
            f"on every label is in {decisions}."
        )
    if not _COUNT.value:
        return source, candidates
    if _COUNT.value > len(candidates):
        raise UserError(
            f"--count is {_COUNT.value} and there are {len(candidates)} images: give "
            "less."
        )
    rng = np.random.default_rng(_SEED.value)
    return source, rng.choice(candidates, _COUNT.value, replace=False)


def main(argv: Sequence[str]) -> None:
    """Prepares or checks the set that the flags describe."""
    del argv
    to = str(_TO.value)
    quiet_libraries()
    try:
        check_utf8("--to", to)
        if _CHECK.value:
            print(f"{check(to)} images, every shard as it was written.")
            return
        source, indices = _open(to)
        index = prepare(
            source,
            to,
            size=_SIZE.value,
            quality=_QUALITY.value,
            shard_size=_SHARD_SIZE.value,
            num_workers=_WORKERS.value,
            max_bad_images=_MAX_BAD.value,
            indices=indices,
        )
    except UserError as error:
        fail(error)
    bad = index["num_bad_images"]
    print(
        f"{index['num_images']} images in {len(index['shards'])} shards, {bad} "
        f"unreadable{' (bad_images.txt)' if bad else ''}; use it as prepared:{to}"
    )


def _parse(argv: list[str]) -> list[str]:
    if any(argument.startswith("--help") for argument in argv):
        print(__doc__, _FLAGS.get_help(), sep="\n")
        sys.exit(0)
    try:
        rest = _FLAGS(argv)
        if len(rest) > 1:
            raise UserError(f"unexpected argument {rest[1]!r}: flags begin with --.")
        if not _TO.value:
            raise UserError("--to is missing: give a folder for the prepared set.")
        if not _FROM.value and not _CHECK.value:
            raise UserError("--from is missing: give folder:PATH, say.")
        return rest
    except (UserError, flags.Error) as error:
        fail(error)


if __name__ == "__main__":
    # Libraries ask absl's own flags, which have nothing to parse here.
    flags.FLAGS(sys.argv[:1])
    main(_parse(sys.argv))
