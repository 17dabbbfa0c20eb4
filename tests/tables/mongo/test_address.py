# SPDX-License-Identifier: Apache-2.0
import pathlib
import re
import urllib.parse

import pytest
from pymongo import uri_parser

from synister_jax.base.errors import UserError
from synister_jax.tables import reading
from synister_jax.tables.mongo import (
    address,
    databases,
)

PASSWORD = "p@ss:/w?rd%"


def test_credentials_of_the_original(tmp_path: pathlib.Path) -> None:
    ini = tmp_path / "db_credentials.ini"
    ini.write_text(
        f"[Credentials]\nuser = me@home\npassword = {PASSWORD}\n"
        "host = 127.0.0.1\nport = 9\n"
    )
    uri = address.resolve("synister_v3", str(ini))
    parsed = uri_parser.parse_uri(uri)
    assert parsed["username"] == "me@home" and parsed["password"] == PASSWORD
    assert parsed["nodelist"] == [("127.0.0.1", 9)]
    assert parsed["database"] == "synister_v3"
    assert parsed["options"]["authSource"] == "admin"
    assert address.redact(uri) == "mongodb://127.0.0.1:9/synister_v3"
    with pytest.raises(UserError) as refused:
        reading.load(f"{uri}&serverSelectionTimeoutMS=200")
    assert str(refused.value) == (
        "database synister_v3: cannot reach MongoDB at 127.0.0.1:9 within 0.2 s; "
        "is it running?"
    )
    ini.write_text("[Credentials]\nhost = db.org\n")
    assert address.resolve("d", str(ini)) == "mongodb://db.org:27017/d"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("password = secret", "MissingSectionHeaderError"),
        ("[Credentials]\nsecret\n", "ParsingError"),
        ("[Credentials]\nuser = secret\n", r"needs .* with host.*KeyError"),
        ("[Credentials]\nhost = h\nport = secret", "ValueError"),
        ("[Credentials]\nhost = h\nuser = secret", "only one of user and password"),
        ("[Credentials]\nhost = a secret", r"a MongoDB URI is mongodb://"),
    ],
)
def test_unusable_credentials(tmp_path: pathlib.Path, text: str, message: str) -> None:
    ini = tmp_path / "db_credentials.ini"
    ini.write_text(text)
    with pytest.raises(UserError, match=message) as refused:
        address.resolve("db", str(ini))
    assert "secret" not in str(refused.value)
    with pytest.raises(UserError, match="cannot read .*no.ini"):
        address.resolve("db", str(tmp_path / "no.ini"))


QUOTED = urllib.parse.quote_plus(PASSWORD)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("mongodb://me:secret@h", "mongodb://h/ does not end with a database name"),
        ("mongodb://me:secret@h/", "does not end with a database name"),
        ("mongodb://me:secret@h/a.b", "does not end with a database name"),
        ("mongodb://me:secret@h/a%20b", "does not end with a database name"),
        ("mongodb://me:sec@ret@h/db", "a MongoDB URI is"),
        ("mongodb://me:sec/ret@h/db", "a MongoDB URI is"),
        ("mongodb://me:sec?ret@h/db", "a MongoDB URI is"),
        ("mongodb:/me:secret@h/db", "a MongoDB URI is"),
        ("mongo://me:secret@h/db", "neither mongodb://host/DB nor a database name"),
        ("me:secret@h", "neither mongodb://host/DB nor a database name"),
        ("mongodb://me:secret%@h/db", "mongodb://h/db with its options is not usable"),
        (
            "mongodb://h/db?tlsCertificateKeyFilePassword=secret&tls=so",
            "/db with its opt",
        ),
        ("mongodb://me:secret@h/db?tls=secret", "is not usable"),
        ("mongodb://me:secret@h/db?authSourc=here", "Unknown option: authsourc"),
        ("mongodb://me:secret@h:99999/db", "mongodb://h:99999/db .*Port must be"),
        (
            "mongodb+srv://me:secret@nowhere.invalid/db",
            r"mongodb\+srv://nowhere.invalid",
        ),
    ],
)
def test_a_malformed_uri_is_not_quoted(uri: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        with databases.connect(uri):
            pass
    shown = str(refused.value) + address.redact(uri) * uri.startswith("mongodb")
    assert not re.search("secret|sec[@/?]|ret@", shown)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        (f"mongodb://me:{QUOTED}@h:1,g:2/db?tls=true", "mongodb://h:1,g:2/db"),
        ("mongodb://[::1]:27017/db", "mongodb://[::1]:27017/db"),
        ("mongodb+srv://me:p@cluster.org/db", "mongodb+srv://cluster.org/db"),
        (f"mongodb://me:{PASSWORD}@h/db", "mongodb://…/"),
        ("data/mongodb.feather", "data/mongodb.feather"),
    ],
)
def test_redact(uri: str, shown: str) -> None:
    assert address.redact(uri) == shown
    assert address.redact(shown) == shown


def test_a_name_needs_credentials_and_a_uri_none() -> None:
    with pytest.raises(UserError, match="give --credentials=INI"):
        address.resolve("synister_v3")
    with pytest.raises(UserError, match="not both"):
        address.resolve("mongodb://h/db", "db_credentials.ini")
