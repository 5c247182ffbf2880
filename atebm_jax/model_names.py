"""Trained models by name: `hf:OWNER/NAME` on a hub, `zoo:NAME` in this package.

A name stands wherever a checkpoint is read. Everywhere else `local_path` refuses it.
"""

import os
import re
from collections.abc import Callable

from etils import epath

from atebm_jax.errors import UserError, check_choice
from atebm_jax.local_path import HUB, ZOO, LocalPath
from atebm_jax.names import printable
from atebm_jax.release_format import CONFIG, WEIGHTS
from atebm_jax.storage import reached

_HUB = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?", re.ASCII)
_SHIPPED = LocalPath(__file__).parent / "zoo"


def located(path: str | os.PathLike) -> epath.Path:
    """The folder that a name or a path means; for a name it is fetched if need be.

    Raises:
      UserError: nothing has that name, or it cannot be reached.
    """
    given = os.fspath(path)
    for kind, find in _FOUND_BY.items():
        if given.startswith(kind):
            return find(given.removeprefix(kind))
    return reached(path)


def shipped() -> list[str]:
    """The models that are part of the package, without `zoo:`."""
    return sorted(path.parent.name for path in _SHIPPED.glob(f"*/{CONFIG}"))


def _in_package(name: str) -> epath.Path:
    check_choice("model of the zoo", name, shipped())
    return _SHIPPED / name


def _on_hub(name: str) -> epath.Path:
    """The folder of a release on the Hugging Face hub, `OWNER/NAME[@REVISION]`.

    Its two files come from the hub or, without network, from the hub's own cache.
    """
    match = _HUB.fullmatch(name)
    if match is None:
        raise UserError(
            f"hf:{printable(name)} is no name of a release: write hf:OWNER/NAME, or "
            "hf:OWNER/NAME@REVISION."
        )
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise UserError(
            f"hf:{name} needs the package huggingface_hub: pip install "
            "'atebm_jax[hub]'."
        ) from error
    repository, revision = match.groups()
    try:
        file = huggingface_hub.hf_hub_download(repository, CONFIG, revision=revision)
        # The weights of the same commit, also where another one comes in between.
        commit = os.path.basename(os.path.dirname(file))
        file = huggingface_hub.hf_hub_download(repository, WEIGHTS, revision=commit)
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"hf:{name} cannot be reached and is not in this machine's cache: check "
            "the network (and that HF_HUB_OFFLINE is not set), or copy the release "
            "here and give its folder."
        ) from error
    except errors.EntryNotFoundError as error:
        raise UserError(
            f"hf:{name} is no release of atebm_jax: it has no {CONFIG} beside a "
            f"{WEIGHTS}."
        ) from error
    # Also what its HTTP library raises where a connection breaks, which is no OSError.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"hf:{name} cannot be fetched ({printable(reason)}): check owner, name and "
            "revision; a private one needs HF_TOKEN."
        ) from error
    return epath.Path(os.path.dirname(file))


# What a name begins with, and what finds its folder.
_FOUND_BY: dict[str, Callable[[str], epath.Path]] = {HUB: _on_hub, ZOO: _in_package}
