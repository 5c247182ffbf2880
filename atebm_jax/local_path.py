"""Paths as users give them: local ones, whose letters are no pattern, and buckets."""

import glob
import os
import re
from collections.abc import Iterator

from etils import epath

from atebm_jax.errors import UserError

#: What the names of trained models begin with, which are no paths: of one on a hub,
#: "hf:OWNER/NAME", and of one that is part of the package, "zoo:digits".
HUB, ZOO = "hf:", "zoo:"


class LocalPath(type(epath.Path())):  # type: ignore[misc]
    """A path of `epath` whose `glob` does not read its own name as a pattern.

    The `glob` of epath takes brackets, stars and question marks of the path for a
    pattern too. Below a folder named "[lab]" Orbax would not find the files that it has
    just written. What Orbax derives from this path is of this class again.
    """

    def glob(self, pattern: str) -> Iterator[epath.Path]:
        """Files of any kind below this folder that match the pattern."""
        found = glob.iglob(os.path.join(glob.escape(os.fspath(self)), pattern))
        return (type(self)(name) for name in found)


def absolute(path: str | os.PathLike) -> epath.Path:
    """An absolute path, or one of a cloud (gs://...); ~ is the home.

    Raises:
      UserError: a cloud that is not known, or the name of a trained model.
    """
    _check_no_name(path)
    if in_bucket(path):
        try:
            return epath.Path(path)
        except KeyError as error:
            raise UserError(
                f"{path} is of no kind of storage that is known here: give a folder, "
                "or one in a bucket, gs://BUCKET/FOLDER."
            ) from error
    return LocalPath(path).expanduser().absolute()


def in_bucket(path: str | os.PathLike) -> bool:
    """Whether files there are objects of a bucket (gs://, s3://)."""
    return "://" in os.fspath(path)


def is_name(path: str | os.PathLike) -> bool:
    """Whether this is the name of a trained model, and not the path of a folder."""
    return os.fspath(path).startswith((HUB, ZOO))


def beside(path: str) -> str:
    """The folder for results that go beside a checkpoint by default.

    It is the path itself, and for a name, which is no place to write in, a folder like
    `zoo_NAME` or `hf_OWNER_NAME` in the one that the command runs in.
    """
    return re.sub("[:/]", "_", path) if is_name(path) else path


def _check_no_name(path: str | os.PathLike) -> None:
    if is_name(path):
        raise UserError(
            f"{os.fspath(path)} is the name of a trained model, where nothing is "
            "written and no training goes on: give a folder of your own; "
            f"--config.init_from={os.fspath(path)} starts a job from its weights."
        )


def local(flag: str, path: str | os.PathLike) -> str:
    """A path on a disk, for what can be written nowhere else; `~` is the home.

    Raises:
      UserError: it is in a cloud (a folder "gs:" would be made instead), the name of
        a trained model, or empty (it would mean the folder that the command runs in).
    """
    given = os.fspath(path)
    _check_no_name(given)
    if in_bucket(given):
        raise UserError(
            f"{flag}={given} is in a cloud: give a local path, then copy what is there."
        )
    if not given:
        raise UserError(f"{flag} is empty: give a path.")
    return os.path.expanduser(given)


def real(path: str | os.PathLike) -> LocalPath:
    """The path with its links followed; `~` is the home."""
    return LocalPath(os.path.realpath(os.path.expanduser(os.fspath(path))))


def is_device(path: str | os.PathLike) -> bool:
    """Whether a pipe, `/dev/stdout` or the like is there: it must not be replaced."""
    return os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path))
