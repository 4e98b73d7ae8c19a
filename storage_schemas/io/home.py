"""The user's home folder in places that people give: the one place where `~` is expanded.

A shell expands it in a word of its own. It does not in `--out=~/x`, `NAME=~/x`, `hf:~/x`, nor in a settings file.
"""

import os
import re

from secondcast.storage_schemas.errors import SettingsError

# At the beginning, or behind the name of a cache or run, or behind the mark of a data set.
_HOME = re.compile(r"((?:[^/~=:]+=|hf:)?)(~[^/]*)(.*)", re.DOTALL)


def expand_home(place: str) -> str:
    """A place with `~` and `~user` expanded; any other text is given back. SettingsError for an unknown user."""
    found = _HOME.fullmatch(place)
    if found is None:
        return place
    before, home, rest = found.groups()
    folder = os.path.expanduser(home)  # noqa: PTH111  # pathlib's raises RuntimeError for an unknown user
    if folder.startswith("~"):
        user = home.removeprefix("~")
        why = f"there is no user {user!r} on this machine" if user else "the home folder of this user is not known"
        raise SettingsError(f"{place!r} has {home}, and {why}: give the whole path, or put ./ before a name with ~")
    return f"{before}{folder}{rest}"
