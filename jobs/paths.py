"""Folders that every library opens, whatever their names hold.

Engines, JVM options and the URIs of databases each give a meaning to some letters of a path, and
undo each other's quoting: Sail finds no Delta log below a folder with a space or an `é` in its name.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from feature_store.errors import SpecError

_PLAIN = re.compile(r"[A-Za-z0-9/._+=,:-]*")
_NO_DELTA = re.compile(
    r"[\[\]\\^|\x00-\x1f]|%[0-9A-Fa-f]{2}"
)  # deltalake follows links, and quotes these wrongly
_LINKS = Path("/tmp")  # not TMPDIR: parent and child processes have to find the same link
_LINK = re.compile(rf"{_LINKS}/headwater-\d+/[0-9a-f]{{12}}\b")


def plain(path: Path) -> Path:
    """`path`, or where its name has other than plain letters, a link to it whose name has not.

    Raises:
        SpecError: `path`, or the link, cannot be made.
    """
    if _PLAIN.fullmatch(str(path)):
        return path
    folder = _LINKS / f"headwater-{os.getuid()}"
    link = folder / hashlib.sha256(os.fsencode(path)).hexdigest()[:12]
    try:
        path.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            raise PermissionError(f"{folder} belongs to somebody else")
        if not (link.is_symlink() and os.readlink(link) == str(path)):
            new = folder / f"{link.name}.{os.getpid()}"
            new.unlink(missing_ok=True)
            new.symlink_to(path)
            new.replace(link)  # whole or not at all: many processes may come here at once
    except OSError as error:
        raise SpecError(
            f"folder is {str(path)!r}: it, or the link {link} to it, cannot be made ({error}); "
            "choose a path of letters, digits, dots, hyphens and underscores"
        ) from error
    return link


def own(text: str) -> str:
    """`text` for people: where it names a link that `plain` made, the path that the link stands for."""
    return _LINK.sub(lambda found: _target(found[0]), text)


def _target(link: str) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return link


def check_delta(setting: str, path: Path) -> None:
    """Refuse a folder in which no Delta table can be opened.

    Raises:
        SpecError: its path has such a letter.
    """
    found = _NO_DELTA.search(str(path))
    if found:
        raise SpecError(
            f"{setting} is {str(path)!r}: Delta tables cannot be opened where a path holds "
            f"{found[0]!r}; set {setting} to one without"
        )
