# SPDX-License-Identifier: Apache-2.0
"""Renders self-contained HTML pages from the templates, style and script here."""

import base64
import hashlib
import importlib.resources
import re
from collections.abc import Mapping
from typing import Any

import jinja2

import synister_jax

# Characters without width, and characters that reverse the text order (category Cf of
# Unicode). With such a character a name could look like another name.
_INVISIBLE = re.compile(r"[\u00ad\u061c\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]")


def render(template: str, content: Mapping[str, Any]) -> str:
    """Returns the page that a template makes of `content`, with style and script.

    Args:
      template: the file name of a template in this folder.
      content: the values that the template uses.
    """
    script = _text("script.js")
    digest = hashlib.sha256(script.encode()).digest()
    common = {
        "version": synister_jax.__version__,
        "style": _text("style.css"),
        "script": script,
        # Names in tables can contain anything, so only the page's own script may run.
        "script_hash": f"sha256-{base64.b64encode(digest).decode()}",
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("synister_jax.pages", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    compact = {"separators": (",", ":"), "allow_nan": False}
    environment.policies["json.dumps_kwargs"] = compact
    environment.filters["whole"] = lambda value: f"{value:,}"
    environment.filters["share"] = _share
    environment.filters["decimal"] = lambda x: "–" if x is None else f"{x:.3f}"
    return environment.get_template(template).render(common, **content)


def _visible(value: Any) -> Any:
    """Returns text with invisible characters as ‹U+…›, and other values unchanged."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return _INVISIBLE.sub(lambda found: f"‹U+{ord(found[0]):04X}›", value)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _text(name: str) -> str:
    folder = importlib.resources.files("synister_jax.pages")
    return (folder / name).read_text(encoding="utf-8")
