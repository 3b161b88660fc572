"""What a bundle says of the machine that it was made on: names of files, not where they lay."""

from __future__ import annotations

import re

_FOLDERS = re.compile(r"""(?:(?<=[\s('"])|^)(?:~|\.{1,2})?/(?:[^\s:;,'"()]+/)*(?=[^\s/])""")


def named(text: str) -> str:
    """Sentences with each path in them cut to its last name: `/data/me/a.npz has` becomes `a.npz has`.

    A folder with a space in its name is cut from there on alone.
    """
    return _FOLDERS.sub("", text)
