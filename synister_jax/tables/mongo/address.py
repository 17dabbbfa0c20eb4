# SPDX-License-Identifier: Apache-2.0
"""The address of a MongoDB database: a URI, or the ini file of the original system.

This module does not talk to a server. A message may show only the URI that `redact`
returns, because the full URI can hold a password.
"""

import configparser
import pathlib
import re
import urllib.parse

from synister_jax.base.errors import UserError

SCHEMES = ("mongodb:", "mongodb+srv:")
_HOST = r"(?:\[[0-9A-Fa-f:.]+\]|[^@/?:,\[\]\s]+)(?::\d+)?"
_URI = re.compile(
    r"(?P<scheme>mongodb(?:\+srv)?://)(?:(?P<user>[^@/?\s]*)@)?"
    rf"(?P<hosts>{_HOST}(?:,{_HOST})*)"
    r"(?:/(?P<database>[^@/?\s]*))?(?:\?(?P<options>[^@\s]*))?"
)


def redact(uri: str) -> str:
    """Returns a MongoDB URI without user, password and options.

    Any other text is returned unchanged.
    """
    if not uri.startswith(SCHEMES):
        return uri
    parts = _URI.fullmatch(uri)
    if parts is None:  # it is unknown where the password ends
        return "mongodb://…/"
    return f"{parts['scheme']}{parts['hosts']}/{parts['database'] or ''}"


def resolve(target: str, credentials: str | None = None) -> str:
    """Returns the URI of a database, checked without asking a server.

    Args:
      target: mongodb://[user:password@]host[:port]/DB[?options], or a database name.
      credentials: the ini file of the original system, if `target` is a database name.
        Its section `[Credentials]` has host, and port, user and password if the server
        needs them.

    Raises:
      UserError: the URI, the name or the ini file is not usable. The message never
        shows the user or the password.
    """
    if not target.startswith(SCHEMES):
        _check_name(target, "--mongo is neither mongodb://host/DB nor a database name")
        if credentials is None:
            raise UserError(
                f"--mongo={target} is a database name; give --credentials=INI with the "
                f"host of the database, too, or give --mongo=mongodb://host/{target}"
            )
        return _from_ini(pathlib.Path(credentials), target)
    if credentials is not None:
        raise UserError("give --mongo=mongodb://… or --credentials, not both")
    if _URI.fullmatch(target) is None:
        raise UserError(
            "the address of the database is not usable: a MongoDB URI is "
            "mongodb://[user:password@]host[:port]/DB[?options]; in user and password, "
            "write special characters as %40 for @ and so on"
        )
    complaint = f"{redact(target)} does not end with a database name"
    _check_name(database_name(target), complaint)
    return target


def _check_name(name: str, complaint: str) -> None:
    if not name or set(name) & set('/\\. "$\0*<>:|?@'):
        raise UserError(f'{complaint} (a name has no blanks and none of /\\."$*<>:|?@)')


def _from_ini(path: pathlib.Path, database: str) -> str:
    # Without interpolation, a password may contain %.
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(path.read_text(encoding="utf-8-sig"))
        section = parser["Credentials"]
        host = section["host"]
        port = section.getint("port", 27017)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from None
    except (configparser.Error, KeyError, ValueError) as error:
        # The message leaves out the text of the error, which may quote the password.
        raise UserError(
            f"{path} needs a section [Credentials] with host and, if the server needs "
            f"them, port (a number), user and password ({type(error).__name__})"
        ) from None
    user, password = section.get("user"), section.get("password")
    if not user and not password:
        return resolve(f"mongodb://{host}:{port}/{database}")
    if not user or not password:
        raise UserError(f"{path} has only one of user and password; give both or none")
    quoted = f"{urllib.parse.quote_plus(user)}:{urllib.parse.quote_plus(password)}"
    # The original logs in without a database name, which means the database `admin`.
    return resolve(f"mongodb://{quoted}@{host}:{port}/{database}?authSource=admin")


def database_name(uri: str) -> str:
    """Returns the name of the database in a URI, or an empty text."""
    return urllib.parse.unquote(_parts(uri)["database"] or "")


def options(uri: str) -> dict[str, str]:
    """Returns the options of a URI: names in lower case, and values as written."""
    written = re.split("[&;]", _parts(uri)["options"] or "")
    split = (option.partition("=") for option in written)
    return {name.lower(): value for name, _, value in split}


def secrets(uri: str) -> list[str]:
    """Returns the password and the values of the options, as written and decoded."""
    _, _, password = (_parts(uri)["user"] or "").partition(":")
    written = [password, *options(uri).values()]
    return [*filter(None, [*written, *map(urllib.parse.unquote_plus, written)])]


def _parts(uri: str) -> re.Match[str]:
    parts = _URI.fullmatch(uri)
    assert parts is not None  # `resolve` has refused all other texts
    return parts
