# SPDX-License-Identifier: Apache-2.0
import base64
import html.parser
import pathlib

import pytest
from conftest import CLASSES, tiny_config

from synister_jax import evaluate, report, train
from synister_jax.command import UserError


class Page(html.parser.HTMLParser):
    """Pictures, table rows and anything that a page would load from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.pictures: list[bytes] = []
        self.rows = 0
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.rows += tag == "tr"
        source = attributes.get("src") or attributes.get("href")
        if source and source.startswith("data:image/png;base64,"):
            self.pictures.append(base64.b64decode(source.partition(",")[2]))
        elif source or tag in ("script", "link"):
            self.loaded.append(tag)


def test_page_of_a_run_and_its_predictions(
    tmp_path: pathlib.Path, shards_folder: pathlib.Path
) -> None:
    config = tiny_config()
    config.shards = str(shards_folder)
    train.train(config, tmp_path)
    evaluate.evaluate(tmp_path, "test", [3, 6])
    test_folder = tmp_path / "evaluation" / "test"
    table = test_folder / "step-6" / "predictions.feather"
    text = report.render(tmp_path, table)
    page = Page(text)
    # Curves, two confusion matrices, a contact sheet.
    assert len(page.pictures) == 4
    assert all(p.startswith(b"\x89PNG") for p in page.pictures)
    assert page.loaded == []  # self-contained
    assert page.rows > 20
    for name in CLASSES:
        assert name in text
    assert "720575940600000017" in text  # a neuron of the test part, not rounded


def test_neither_run_nor_predictions(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="give --workdir, --predictions or both"):
        report.render(None, None)
    (tmp_path / "p.feather").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot read predictions"):
        report.render(None, tmp_path / "p.feather")
