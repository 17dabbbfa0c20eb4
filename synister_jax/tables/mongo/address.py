# SPDX-License-Identifier: Apache-2.0
"""Where a MongoDB is: its URI, or the original system's ini file, and what to show.

Nothing here talks to a server. What may be shown is what `redact` leaves.
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
    """A MongoDB URI without user, password and options; anything else as it is."""
    if not uri.startswith(SCHEMES):
        return uri
    parts = _URI.fullmatch(uri)
    if parts is None:  # then nobody knows where the password ends
        return "mongodb://…/"
    return f"{parts['scheme']}{parts['hosts']}/{parts['database'] or ''}"


def resolve(target: str, credentials: str | None = None) -> str:
    """The URI of a database, checked as far as that goes without asking a server.

    Args:
      target: mongodb://[user:password@]host[:port]/DB[?options], or a database name.
      credentials: with a name, the original system's ini file: section `[Credentials]`
        with host, and port, user and password where needed.

    Raises:
      UserError: says what is wrong; the message never holds user or password.
    """
    if not target.startswith(SCHEMES):
        _check_name(target, "--mongo is neither mongodb://host/DB nor a database name")
        if credentials is None:
            raise UserError(
                f"--mongo={target} is a database name; give --credentials=INI with its "
                f"host as well, or mongodb://host/{target}"
            )
        return _from_ini(pathlib.Path(credentials), target)
    if credentials is not None:
        raise UserError("give --mongo=mongodb://… or --credentials, not both")
    if _URI.fullmatch(target) is None:
        raise UserError(
            "a MongoDB URI is mongodb://[user:password@]host[:port]/DB[?options]; in "
            "user and password, special characters are written as %40 for @ and so on"
        )
    complaint = f"{redact(target)} does not end with a database name"
    _check_name(database_name(target), complaint)
    return target


def _check_name(name: str, complaint: str) -> None:
    if not name or set(name) & set('/\\. "$\0*<>:|?@'):
        raise UserError(f'{complaint} (not empty, none of /\\."$*<>:|?@ and blanks)')


def _from_ini(path: pathlib.Path, database: str) -> str:
    # A % in a password is no interpolation.
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(path.read_text(encoding="utf-8-sig"))
        section = parser["Credentials"]
        host = section["host"]
        port = section.getint("port", 27017)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from None
    except (configparser.Error, KeyError, ValueError) as error:
        # The text of the error may be a line of the file.
        raise UserError(
            f"{path} needs a section [Credentials] with host, and port as a number; "
            f"user and password where the server wants them ({type(error).__name__})"
        ) from None
    user, password = section.get("user"), section.get("password")
    if not user and not password:
        return resolve(f"mongodb://{host}:{port}/{database}")
    if not user or not password:
        raise UserError(f"{path} has only one of user and password; give both or none")
    quoted = f"{urllib.parse.quote_plus(user)}:{urllib.parse.quote_plus(password)}"
    # The original logs in without naming a database: that is the server's `admin`.
    return resolve(f"mongodb://{quoted}@{host}:{port}/{database}?authSource=admin")


def database_name(uri: str) -> str:
    return urllib.parse.unquote(_parts(uri)["database"] or "")


def options(uri: str) -> dict[str, str]:
    """Options by name in lower case, as written."""
    written = re.split("[&;]", _parts(uri)["options"] or "")
    split = (option.partition("=") for option in written)
    return {name.lower(): value for name, _, value in split}


def secrets(uri: str) -> list[str]:
    """Password and values of options, as written and as meant."""
    _, _, password = (_parts(uri)["user"] or "").partition(":")
    written = [password, *options(uri).values()]
    return [*filter(None, [*written, *map(urllib.parse.unquote_plus, written)])]


def _parts(uri: str) -> re.Match[str]:
    parts = _URI.fullmatch(uri)
    assert parts is not None  # `resolve` refuses a URI that is none
    return parts
