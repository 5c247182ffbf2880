"""Makes a prepared data set.

    python -m atebm_jax.data.prepare --from=folder:PATH --to=DIR

Images are decoded once, their shorter side scaled down to `--size`, and stored as JPEG
in shards of ArrayRecord. A stopped run goes on with its finished shards, from the same
images. Exit codes: 0 finished; 2 a mistake, said in one sentence; 130 or 143 stopped by
a signal.
"""

import argparse
import concurrent.futures
import functools
import hashlib
import io
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module
from PIL import Image
from rich.console import Console

from atebm_jax import data, storage, workdir_lock
from atebm_jax.command_line import Parser, quiet_libraries, run
from atebm_jax.data import content, decoding, openimages, prepared
from atebm_jax.data.examples import too_many_bad
from atebm_jax.data.folder import check_outside
from atebm_jax.data.pipeline import end_with_main_process
from atebm_jax.errors import UserError, shortened
from atebm_jax.local_path import local
from atebm_jax.names import check_utf8
from atebm_jax.progress import track

SIZE, QUALITY, SHARD_SIZE, MAX_BAD_IMAGES = 292, 95, 2048, 100

# Names of what a command may leave that ended before its first shard.
_OWN = (workdir_lock.FILE, ".settings.json.")

_JPEG, _LONGEST_JPEG = b"\xff\xd8\xff", 65500


def prepare(
    source: data.Source,
    to: str | Path,
    *,
    size: int = SIZE,
    quality: int = QUALITY,
    shard_size: int = SHARD_SIZE,
    num_workers: int = 1,
    max_bad_images: int = MAX_BAD_IMAGES,
    indices: np.ndarray | None = None,
) -> dict[str, Any]:
    """Writes a prepared set, or goes on with one that was begun with these settings.

    Args:
      source, to: the images, and a folder, which is made if it is not there.
      size: pixels of the shorter side; images are never enlarged.
      quality, shard_size: of the JPEGs, and images of a shard.
      num_workers: processes; 0 for one a core.
      max_bad_images: unreadable images that are passed over and listed.
      indices: only these images of the source, in this order.

    Returns:
      The index, as in `index.json`.

    Raises:
      UserError: the folder holds another set, another command writes there, or it
        cannot be written; settings do not fit, the images are not those that the set
        was begun from, or too many cannot be read.
    """
    if size < 1 or shard_size < 1 or not 1 <= quality <= 100 or num_workers < 0:
        raise UserError(
            f"size is {size}, shard_size {shard_size}, quality {quality} and "
            f"num_workers {num_workers}: the first two must be positive, the third 1 "
            "to 100, the last 0 or more."
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
    parts = [chosen[i : i + shard_size] for i in range(0, len(chosen), shard_size)]
    root = _local(to)
    paths = prepared.shard_paths(root, len(parts))
    jobs = [  # they travel to other processes
        functools.partial(_shard, source, part, path, size, quality)
        for part, path in zip(parts, paths, strict=True)
    ]
    told = storage.told_plainly(root, "prepared set", "with its finished shards")
    with workdir_lock.held(root, "--to"), told:
        _claim(root, settings)
        for leftover in root.glob(".*.tmp"):  # of a command that was killed
            leftover.unlink(missing_ok=True)
        return _finish(root, settings, _run(jobs, num_workers, max_bad_images))


def _local(to: str | Path) -> Path:
    """The folder of `--to`, checked: the record library opens UTF-8 paths only."""
    root = Path(local("--to", to))
    check_utf8("--to", root)
    return root


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


def check(to: str | Path) -> int:
    """Compares every shard of a prepared set with the index.

    Returns:
      The number of images.

    Raises:
      UserError: names the shard whose number of records or SHA-256 differs.
    """
    root = _local(to)
    index = prepared.read_index(root)
    shards = index["shards"]
    for path, shard in zip(prepared.shard_paths(root, len(shards)), shards):
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


def _check_same(root: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuses to mix shards of two sets of images, or of two settings."""
    spec = now["source"]
    if before.get("source") == spec:
        since, remedy = f"{root} was begun", "give another --to"
        content.check(spec, before.get("data"), now["data"], since=since, remedy=remedy)
    shown = {"selection": "which of the images (a digest)"}
    changed = [
        f"{shown.get(name, name)}: {shortened(before.get(name))} then, "
        f"{shortened(value)} now"
        for name, value in now.items()
        if name != "data" and before.get(name) != value
    ]
    if changed:
        raise UserError(
            f"{root} was begun from other images or with other settings "
            f"({'; '.join(changed)}): give the same ones, or another --to."
        )


def _run(
    jobs: Sequence[Callable[[], dict[str, Any]]], num_workers: int, max_bad_images: int
) -> list[dict[str, Any]]:
    """Writes the shards, with a progress bar; returns their descriptions in order."""
    bad: list[str] = []
    with _workers(num_workers) as pool:
        futures = [pool.submit(job) for job in jobs]
        finished = concurrent.futures.as_completed(futures)
        try:
            for future in track(finished, "shards", Console(stderr=True), len(jobs)):
                bad += future.result()["bad"]
                if len(bad) > max_bad_images:
                    raise too_many_bad(bad, max_bad_images)
        except BrokenProcessPool as error:
            raise UserError(
                "a process that decoded images was ended from outside, most likely for "
                "want of memory: give the same command again, with fewer --num_workers."
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [future.result() for future in futures]


def _workers(number: int) -> concurrent.futures.Executor:
    """One thread of this process, or `number` processes; 0 for one per core."""
    if number == 1:
        return concurrent.futures.ThreadPoolExecutor(1)
    # Not forked: if a thread of the record library holds a lock at that moment, the
    # lock stays locked in the child for ever.
    return concurrent.futures.ProcessPoolExecutor(
        number or os.cpu_count(),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin_worker,
    )


def _begin_worker() -> None:
    """Leaves Ctrl-C to the command, and ends once the command has been killed.

    Another command may write the same shard by then. This does no harm: each writes its
    own temporary file, and both files are the same.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_main_process()


def _shard(
    source: data.Source, indices: np.ndarray, path: Path, size: int, quality: int
) -> dict[str, Any]:
    """Writes one shard, unless it is there already; returns its description."""
    description = path.with_name(f"{path.name}.json")
    if description.exists():
        return json.loads(description.read_text())
    written, bad = 0, []
    with storage.replacing(path, shared=True) as temporary:
        writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
        for index in indices.tolist():
            try:
                example = source[index]
                image = resized(example["image"], size, quality)
            except content.UNREADABLE as error:
                bad.append(f"{source.describe(index)}: {error}")
                continue
            writer.write(prepared.pack(image, example["label"]))
            written += 1
        writer.close()
        sha256 = _sha256(temporary)
    result = {"num_images": written, "sha256": sha256, "bad": bad}
    # Last, because it says that the shard is whole.
    storage.write_json(description, result)
    return result


def resized(image: bytes | np.ndarray, size: int, quality: int) -> bytes:
    """JPEG of an image with its shorter side scaled down to `size`, antialiased.

    A JPEG that is not larger stays byte for byte what it is.

    Raises:
      ValueError: it cannot be decoded.
    """
    pixels = decoding.decode(image, 3)
    height, width = pixels.shape[:2]
    shorter = min(height, width)
    if shorter <= size and isinstance(image, bytes) and image.startswith(_JPEG):
        return image
    picture = Image.fromarray(pixels)
    if shorter > size:
        shape = (round(width * size / shorter), round(height * size / shorter))
        picture = picture.resize(shape, Image.Resampling.BICUBIC)
    if max(picture.size) > _LONGEST_JPEG:
        raise ValueError(
            f"it has {width} x {height} pixels, more than a JPEG can have on a side"
        )
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=quality, subsampling=0)
    return stream.getvalue()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- The command ----------------------------------------------------------------------


def _parser() -> Parser:
    parser = Parser(
        prog="python -m atebm_jax.data.prepare",
        description="Resizes images once and writes them in shards for fast reading. A "
        "stopped command goes on with its finished shards.",
        allow_abbrev=False,
    )
    add, number = parser.add_argument, functools.partial(parser.add_argument, type=int)
    add("--from", dest="source", help="folder:PATH, tfds:NAME:SPLIT, openimages:FOLDER")
    add("--to", required=True, help="folder for the prepared set")
    add("--data_dir", default="", help="where TFDS data sets lie")
    number("--size", default=SIZE, help="shorter side, default %(default)s")
    number("--quality", default=QUALITY, help="of JPEGs, default %(default)s")
    number("--shard_size", default=SHARD_SIZE, help="images, default %(default)s")
    number("--num_workers", default=0, help="processes; default one a core")
    bad_help = "unreadable images that are passed over, default %(default)s"
    number("--max_bad_images", default=MAX_BAD_IMAGES, help=bad_help)
    number("--count", default=0, help="only so many, drawn at random")
    number("--seed", default=0, help="of that draw")
    add("--check", action="store_true", help="only verify the set in --to")
    add("--labels", help="Open Images: CSV of image labels")
    add("--class_descriptions", help="Open Images: CSV of label names")
    add("--imagenet_classes", help="Open Images: ImageNet's classes, one a line")
    add("--hierarchy", help="Open Images: label hierarchy")
    return parser


def _selected(flags: argparse.Namespace) -> tuple[data.Source, np.ndarray]:
    """The source that the flags name, and the indices of the chosen images."""
    kind, _, folder = flags.source.partition(":")
    if kind == "openimages":
        source, candidates = _open_images(folder, flags)
    else:
        source = data.open_source(flags.source, flags.data_dir)
        candidates = np.arange(len(source))
    if not 0 <= flags.count <= len(candidates) or flags.seed < 0:
        raise UserError(
            f"--count is {flags.count} and --seed {flags.seed}, and there are "
            f"{len(candidates)} images: give a count of 0 (all) to that, and a seed of "
            "0 or more."
        )
    if flags.count:
        rng = np.random.default_rng(flags.seed)
        candidates = rng.choice(candidates, flags.count, replace=False)
    return source, candidates


def _open_images(
    folder: str, flags: argparse.Namespace
) -> tuple[data.Source, np.ndarray]:
    """Open Images in a folder, and the indices of those that overlap no class."""
    needed = ("labels", "class_descriptions", "imagenet_classes")
    missing = [f"--{name}" for name in needed if not getattr(flags, name)]
    if missing:
        raise UserError(f"openimages needs {' and '.join(missing)} too.")
    source = data.FolderSource(folder)
    decisions = Path(f"{_local(flags.to)}.labels.csv")
    with storage.writing(decisions, "Make room or give another --to."):
        decisions.parent.mkdir(parents=True, exist_ok=True)
        allowed = openimages.select(
            flags.labels,
            flags.class_descriptions,
            flags.imagenet_classes,
            flags.hierarchy,
            decisions,
        )
    names = [Path(source.path(i)).stem for i in range(len(source))]
    candidates = np.flatnonzero([name in allowed for name in names])
    print(
        f"{len(candidates)} of {len(source)} images overlap no class; the decision on "
        f"every label is in {decisions}."
    )
    return source, candidates


def main(arguments: Sequence[str]) -> None:
    """Prepares or checks the set that the flags describe.

    Raises:
      UserError: a flag, the images or the folder cannot be used.
    """
    flags = _parser().parse_args(arguments)
    if flags.check:
        return print(f"{check(flags.to)} images, every shard as it was written.")
    if not flags.source:
        raise UserError("--from is missing: give folder:PATH, say.")
    kind, _, folder = flags.source.partition(":")
    if folder and kind in ("folder", "openimages"):
        check_outside("--to", _local(flags.to), folder)
    source, indices = _selected(flags)
    names = ("size", "quality", "shard_size", "num_workers", "max_bad_images")
    settings = {name: vars(flags)[name] for name in names}
    index = prepare(source, flags.to, indices=indices, **settings)
    bad = index["num_bad_images"]
    print(
        f"{index['num_images']} images in {len(index['shards'])} shards, {bad} "
        f"unreadable{' (bad_images.txt)' if bad else ''}; use it as prepared:{flags.to}"
    )


if __name__ == "__main__":
    quiet_libraries()
    run(main, stopped="the same command goes on")
