# SPDX-License-Identifier: Apache-2.0
"""Servers and credentials of the sources, from the environment or an ini file.

The environment comes first, then the ini's section of the source's name, then its
`[Credentials]` section, which is all that the original's files have
(`catmaid_credentials.ini`: user, password, token; `neuprint_credentials.ini`: server,
dataset, token). A `None` in such a file is nothing, as there.
"""

import configparser
import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Mapping

from synister_jax.base.errors import UserError, redact


@dataclasses.dataclass(frozen=True)
class _Setting:
    variables: tuple[str, ...]  # of the environment, the first one that is set
    default: str = ""


# Other programmes read some of these variables too: pymaid and catpy CATMAID_API_TOKEN,
# CATMAID_HTTP_USER and CATMAID_HTTP_PASSWORD, neuprint-python its own. CATMAID's server
# is that of funkelab's synistereq; the data sets are the newest that neuPrintHTTP's
# support/llms-txt lists; the address of the transform service is fafbseg-py's
# (spine/base.py), its scale 4 synistereq's.
_CATMAID = {
    "url": _Setting(
        ("CATMAID_URL",),
        "https://neuropil.janelia.org/tracing/fafb/v14/",
    ),
    "project": _Setting(("CATMAID_PROJECT",), "1"),
    "token": _Setting(("CATMAID_TOKEN", "CATMAID_API_TOKEN")),
    "user": _Setting(("CATMAID_HTTP_USER",)),
    "password": _Setting(("CATMAID_HTTP_PASSWORD",)),
}
_FLYWIRE = {
    "url": _Setting(("CAVE_SERVER",), "https://global.daf-apis.com"),
    "datastack": _Setting(("CAVE_DATASTACK",), "flywire_fafb_public"),
    "materialization": _Setting(("CAVE_MATERIALIZATION",), "783"),
    "table": _Setting(("CAVE_TABLE",), "synapses_nt_v1"),
    "token": _Setting(("CAVE_TOKEN",)),
    "transform": _Setting(
        ("FLYWIRE_TRANSFORM_URL",),
        "https://services.itanna.io/app/transform-service"
        "/transform/dataset/flywire_v1/s/4/values",
    ),
}


def _neuprint(dataset: str) -> dict[str, _Setting]:
    return {
        "server": _Setting(("NEUPRINT_SERVER",), "neuprint.janelia.org"),
        "dataset": _Setting(("NEUPRINT_DATASET",), dataset),
        "token": _Setting(("NEUPRINT_APPLICATION_CREDENTIALS",)),
    }


_KNOWN: Mapping[str, Mapping[str, _Setting]] = {
    "fafb-catmaid": _CATMAID,
    "fafb-flywire": _FLYWIRE,
    "hemibrain": _neuprint("hemibrain:v1.2.1"),
    "malevnc": _neuprint("manc:v1.2.3"),
    "none": {},
}
_SHARED = "Credentials"
_SHOWN = (
    *("url", "project", "server", "dataset"),
    *("datastack", "materialization", "table", "transform"),
)


@dataclasses.dataclass(frozen=True)
class SourceSettings:
    """What a source is asked with. Its text never shows a value."""

    source: str
    values: Mapping[str, str] = dataclasses.field(repr=False)
    # For the source `none`: the table in which neurons are looked up.
    synapses: str | None = None

    def __getitem__(self, name: str) -> str:
        return self.values[name]

    def shown(self) -> dict[str, str]:
        """What an answer depends on and everybody may see, as the data set."""
        shown = {n: redact(v) for n, v in self.values.items() if n in _SHOWN}
        if self.synapses is not None:
            path = pathlib.Path(self.synapses)
            shown["synapses"] = redact(path.name)
            if path.is_file():  # another one of that name is another table
                about = path.stat()
                shown["table"] = f"{about.st_size} bytes, {about.st_mtime_ns} ns"
        return shown

    def where(self, name: str) -> str:
        """How to give a setting, for messages."""
        variable = _KNOWN[self.source][name].variables[0]
        return f"{variable} (or {name} in section [{self.source}] of --credentials)"


def read(
    source: str,
    ini: str | os.PathLike[str] | None,
    environment: Mapping[str, str],
    synapses: str | os.PathLike[str] | None,
) -> SourceSettings:
    """The settings of a source that is known.

    Raises:
      UserError: the ini is absent, is none, or has a name that the source does not.
    """
    sections = _sections(source, ini)
    values = {}
    for name, setting in _KNOWN[source].items():
        given = [environment.get(variable, "") for variable in setting.variables]
        given += [section.get(name, "") for section in sections]
        values[name] = next(filter(None, map(str.strip, given)), setting.default)
    table = None if synapses is None else str(synapses)
    settings = SourceSettings(source, values, table)
    if values.get("token"):
        values["token"] = _token(settings)
    return settings


def _token(settings: SourceSettings) -> str:
    """Alone, where the JSON document around it was given, as neuPrint's page shows."""
    text = settings["token"]
    try:
        text = json.loads(text)["token"] if text.startswith("{") else text.strip('"')
        usable = re.fullmatch(r"[\x21-\x7e]+", text) is not None
    except (ValueError, KeyError, TypeError):
        usable = False
    if not usable:
        raise UserError(
            f"the token of {settings.source} is none: it has blanks or unusual "
            f"characters; give it anew as {settings.where('token')}"
        )
    return text


def _sections(
    source: str, ini: str | os.PathLike[str] | None
) -> list[Mapping[str, str]]:
    """Those that count for the source, the first one most."""
    if ini is None:
        return []
    parser = configparser.ConfigParser(interpolation=None)
    try:
        with open(ini, encoding="utf-8-sig") as file:
            parser.read_file(file)
    except OSError as error:
        raise UserError(f"cannot read {ini}: {error.strerror}") from None
    except (configparser.Error, UnicodeDecodeError):
        # The reason would quote the line, which may hold a password.
        raise UserError(
            f"{ini} is no ini file: write [{source}] and lines such as token = …"
        ) from None
    if not {*_KNOWN, _SHARED} & {*parser.sections()}:
        raise UserError(f"{ini} has no section [{source}], and no [{_SHARED}]; add one")
    if parser.has_section(source):
        for name in parser[source]:
            if name not in _KNOWN[source]:
                raise UserError(
                    f"{ini}: [{source}] has no setting {name!r}; it has "
                    f"{', '.join(_KNOWN[source]) or 'none'}"
                )
    return [
        {name: "" if value == "None" else value for name, value in parser[part].items()}
        for part in (source, _SHARED)
        if parser.has_section(part)
    ]
