"""Expansion of `~` in paths given by users, in one place.

A shell expands it at the start of a word, but not in `--out=~/x`, `NAME=~/x`, `hf:~/x`, nor in a config file.
"""

import os
import re

from secondcast.storage_schemas.errors import SettingsError

# At the beginning, or after the name of a cache or run, or after the prefix of a data set.
_HOME = re.compile(r"((?:[^/~=:]+=|hf:)?)(~[^/]*)(.*)", re.DOTALL)


def expand_home(place: str) -> str:
    """Expand `~` and `~user` in a path; return any other text unchanged. SettingsError for an unknown user."""
    found = _HOME.fullmatch(place)
    if found is None:
        return place
    before, home, rest = found.groups()
    folder = os.path.expanduser(home)  # noqa: PTH111  # pathlib's raises RuntimeError for an unknown user
    if folder.startswith("~"):
        user = home.removeprefix("~")
        why = f"there is no user {user!r} on this machine" if user else "the home folder of this user is unknown"
        raise SettingsError(
            f"{place!r} has {home}, and {why}: give the full path, or put ./ before a name that has a ~"
        )
    return f"{before}{folder}{rest}"
