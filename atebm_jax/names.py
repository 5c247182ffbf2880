"""Names of files and classes, as they may be written and drawn."""

import hashlib
import os
import re
import unicodedata

from atebm_jax.errors import UserError

# File systems take 255 bytes; what is added to a name needs some of them.
_LONGEST = 128


def printable(name: str) -> str:
    r"""A name of a file in letters that can be written and drawn everywhere.

    Bytes that are no UTF-8 become `\xNN` (Python holds them as surrogates, which no
    text file and no font takes), control characters `\n` and the like.
    """
    return "".join(c if c.isprintable() else _escaped(c) for c in name)


def of_class(name: str) -> str:
    """A name of a class as it is compared: as of `printable`, its accents composed.

    macOS writes "é" as a letter and an accent, most others as one letter; both look
    alike, and mean one class.
    """
    return printable(unicodedata.normalize("NFC", name))


def writable(text: str) -> str:
    """A text of several lines that every file and stream takes.

    Only what has no UTF-8 is escaped, as of `printable`.
    """
    return _SURROGATES.sub(lambda match: _escaped(match[0]), text)


# What Python holds a byte of a name as that is no UTF-8, and what else has none.
_SURROGATES = re.compile("[\ud800-\udfff]")
_FIRST_BYTE, _LAST_BYTE = 0xDC80, 0xDCFF


def _escaped(character: str) -> str:
    code = ord(character)
    if _FIRST_BYTE <= code <= _LAST_BYTE:
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def check_utf8(what: str, path: str | os.PathLike) -> None:
    """Refuses a path that libraries in other languages cannot open.

    Those that read and write checkpoints, records and compiled programs take a path as
    a text, and Python's own way to hold other bytes is none to them.

    Args:
      what: it is, for the message: "workdir".
      path: as the user gave it.

    Raises:
      UserError: a part of it is no UTF-8.
    """
    if _SURROGATES.search(os.fspath(path)):
        raise UserError(
            f"{what} {printable(os.fspath(path))} has bytes in its name that are no "
            "UTF-8, and the libraries that read and write there cannot open it: rename "
            "the folder, or give a link to it with another name."
        )


def for_files(name: str) -> str:
    """A name to begin the names of other files with: of at most 128 bytes.

    A longer one is cut, and the hash of the whole keeps it apart from others.
    """
    name = printable(name)
    encoded = name.encode()
    if len(encoded) <= _LONGEST:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:12]
    return f"{encoded[: _LONGEST - 13].decode(errors='ignore')}-{digest}"
