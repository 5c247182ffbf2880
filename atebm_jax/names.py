"""Names of files and classes, as they may be written and drawn."""

import hashlib

# File systems take 255 bytes; what is added to a name needs some of them.
_LONGEST = 128


def printable(name: str) -> str:
    r"""A name of a file in letters that can be written and drawn everywhere.

    Bytes that are no UTF-8 become `\xNN` (Python holds them as surrogates, which no
    text file and no font takes), control characters `\n` and the like.
    """
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text
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
