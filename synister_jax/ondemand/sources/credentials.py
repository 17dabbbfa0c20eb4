# SPDX-License-Identifier: Apache-2.0
"""Reads the servers and credentials of the sources.

A setting is taken from the first of these places that has it:

1. an environment variable,
2. the section of the ini file that has the name of the source,
3. the section `[Credentials]` of the ini file.

The original's files have only the last section. `catmaid_credentials.ini` has user,
password and token. `neuprint_credentials.ini` has server, dataset and token. As in the
original, the value `None` in an ini file means that the setting is not given.
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
    # Environment variables. The first variable that is set is used.
    variables: tuple[str, ...]
    default: str = ""


# Other programs read some of these variables, too. pymaid and catpy read
# CATMAID_API_TOKEN, CATMAID_HTTP_USER and CATMAID_HTTP_PASSWORD. neuprint-python reads
# its own variables. The default of CATMAID's server comes from funkelab's
# synistereq. The default data sets are the newest ones in support/llms-txt of
# neuPrintHTTP. The address of the transform service comes from fafbseg-py
# (spine/base.py), and its scale 4 from synistereq.
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
    """The settings of a source. Their text (`repr`) never shows a value."""

    source: str
    values: Mapping[str, str] = dataclasses.field(repr=False)
    # For the source `none`: the table in which neurons are looked up.
    synapses: str | None = None

    def __getitem__(self, name: str) -> str:
        return self.values[name]

    def shown(self) -> dict[str, str]:
        """Returns the public settings on which an answer depends, as the data set."""
        shown = {n: redact(v) for n, v in self.values.items() if n in _SHOWN}
        if self.synapses is not None:
            path = pathlib.Path(self.synapses)
            shown["synapses"] = redact(path.name)
            if path.is_file():  # tells apart tables of the same name
                about = path.stat()
                shown["table"] = f"{about.st_size} bytes, {about.st_mtime_ns} ns"
        return shown

    def where(self, name: str) -> str:
        """Returns a text for messages that says how to give a setting."""
        variable = _KNOWN[self.source][name].variables[0]
        return f"{variable} (or {name} in section [{self.source}] of --credentials)"


def read(
    source: str,
    ini: str | os.PathLike[str] | None,
    environment: Mapping[str, str],
    synapses: str | os.PathLike[str] | None,
) -> SourceSettings:
    """Returns the settings of a source.

    Args:
      source: the name of the source, which must exist.
      ini: the ini file, or None.
      environment: the environment variables.
      synapses: for the source `none`, the synapse table in which neurons are looked up.

    Raises:
      UserError: the ini file cannot be read, is not an ini file, or has a setting that
        the source does not have, or the token is not valid.
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
    """Returns the token. The JSON document of neuPrint's page is accepted, too."""
    text = settings["token"]
    try:
        text = json.loads(text)["token"] if text.startswith("{") else text.strip('"')
        usable = re.fullmatch(r"[\x21-\x7e]+", text) is not None
    except (ValueError, KeyError, TypeError):
        usable = False
    if not usable:
        raise UserError(
            f"the token of {settings.source} is not valid: the token has blanks or "
            f"unusual characters; give the token again as {settings.where('token')}"
        )
    return text


def _sections(
    source: str, ini: str | os.PathLike[str] | None
) -> list[Mapping[str, str]]:
    """Returns the sections for the source. Earlier sections take precedence."""
    if ini is None:
        return []
    parser = configparser.ConfigParser(interpolation=None)
    try:
        with open(ini, encoding="utf-8-sig") as file:
            parser.read_file(file)
    except OSError as error:
        raise UserError(f"cannot read {ini}: {error.strerror}") from None
    except (configparser.Error, UnicodeDecodeError):
        # The reason is left out, because it quotes a line that can hold a password.
        raise UserError(
            f"{ini} is not an ini file; write [{source}] and lines such as token = …"
        ) from None
    if not {*_KNOWN, _SHARED} & {*parser.sections()}:
        raise UserError(
            f"{ini} has no section [{source}] and no section [{_SHARED}]; add one"
        )
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
