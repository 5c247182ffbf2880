"""Names of files and classes in a form that can be written and drawn."""

import hashlib
import os
import re
import unicodedata

from atebm_jax.errors import UserError

# File systems take 255 bytes; endings need some of them.
_LONGEST = 128


def printable(name: str) -> str:
    r"""A file's name in characters that can be written and drawn everywhere.

    Bytes that are not UTF-8 become `\xNN` (Python keeps them as surrogates, which text
    files and fonts do not take), control characters become `\n` and the like.
    """
    return "".join(c if c.isprintable() else _escaped(c) for c in name)


def of_class(name: str) -> str:
    """A class's name as it is compared: as of `printable`, its accents composed.

    macOS writes "é" as a letter and an accent, other systems as one letter.
    """
    return printable(unicodedata.normalize("NFC", name))


def writable(text: str) -> str:
    """A text with its surrogates escaped as by `printable`; line breaks stay."""
    return _SURROGATES.sub(lambda match: _escaped(match[0]), text)


# UTF-8 has none of these. Python keeps the bytes of a name that are not UTF-8 as some
# of them: 0xDC00 plus the byte.
_SURROGATES = re.compile("[\ud800-\udfff]")
_FIRST_BYTE, _LAST_BYTE = 0xDC80, 0xDCFF


def _escaped(character: str) -> str:
    code = ord(character)
    if _FIRST_BYTE <= code <= _LAST_BYTE:
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def check_utf8(what: str, path: str | os.PathLike) -> None:
    """Refuses a path that is not UTF-8.

    The libraries for checkpoints, records and compiled programs could not open it.
    `what` is the kind of path, for the message: "workdir".

    Raises:
      UserError: a part of it is not UTF-8.
    """
    if _SURROGATES.search(os.fspath(path)):
        raise UserError(
            f"{what} {printable(os.fspath(path))} has bytes in its name that are no "
            "UTF-8, and the libraries that read and write there cannot open it: rename "
            "the folder, or give a link to it with another name."
        )


def for_files(name: str) -> str:
    """A name of at most 128 bytes, to which endings can be appended.

    A longer one is cut, and a hash of the whole is appended.
    """
    name = printable(name)
    encoded = name.encode()
    if len(encoded) <= _LONGEST:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:12]
    return f"{encoded[: _LONGEST - 13].decode(errors='ignore')}-{digest}"
