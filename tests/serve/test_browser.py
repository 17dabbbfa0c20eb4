# SPDX-License-Identifier: Apache-2.0
"""Tests of the service's page in a real browser, with a real server and worker."""

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import feather

from synister_jax.tables import synapses
from tests.helpers import commands, html_pages, serving

pytestmark = pytest.mark.long

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is absent")
expect = sync_api.expect

NEURON = 720_575_940_600_000_000  # small_data has this id and the next 17
EVIL = '<img src=x onerror="document.title=1">'
FAULTY = "id,skid,x,y,z\n1,5,100,200,abc\n2,5,,,\n3,x5,160,160,160\n"
MENDED = "id,skid,x,y,z\n1,5,100,200,300\n2,5,,,\n3,5,160,160,160\n"
WIDE, TELEPHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
# A small request may take 60 s; Playwright wants milliseconds.
SECONDS = 60_000


class Site:
    """A server of one small model, and two tokens."""

    def __init__(
        self,
        folder: pathlib.Path,
        run: pathlib.Path,
        volume: pathlib.Path,
        table: pa.Table,
    ) -> None:
        self.run, self.volume = run, volume
        path = folder / "synapses.feather"
        synapses.write(synapses.conform(table, "table"), path)
        self.models = serving.write_models(
            folder, workdir=str(run), volume=str(volume), synapses=str(path)
        )
        self.flags = ["--batch_size=1"]  # slow, so that tests see the progress
        self.server = serving.Command(self.models, *self.flags)
        self.url, self.token = self.server.url, self.server.token
        self.other = self.command("synister_jax.serve", "--add_token=other").strip()

    def command(self, module: str, *flags: str) -> str:
        """Runs a command of the package, and returns what it prints."""
        if module == "synister_jax.serve":
            flags = (f"--models={self.models}", *flags)
            return commands.run("-m", module, *flags, check=True).stdout
        # The workers of the server also have one device.
        return subprocess.run(
            [sys.executable, "-m", module, *flags],
            env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    def again(self) -> None:
        """Starts the server again at the same address, after it has ended."""
        port = self.url.rpartition(":")[2]
        self.server = serving.Command(self.models, *self.flags, f"--port={port}")

    def path(self, job_id: str, name: str) -> pathlib.Path:
        return self.models / "service" / "jobs" / job_id / name


@pytest.fixture(scope="module")
def site(
    tmp_path_factory: pytest.TempPathFactory,
    trained_run: pathlib.Path,
    volume_path: pathlib.Path,
    synapse_table: pa.Table,
) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    site = Site(folder, trained_run, volume_path, synapse_table)
    yield site
    assert site.server.stop() == 0


@pytest.fixture(scope="module")
def cookies(browser: "sync_api.Browser", site: Site) -> "sync_api.StorageState":
    """The cookies of one login for all tests, as logins per minute are limited."""
    with browser.new_context() as context:
        sign_in(context.new_page(), site, site.token)
        return context.storage_state()


@contextlib.contextmanager
def opened(
    browser: "sync_api.Browser", site: Site, **options: Any
) -> Iterator["sync_api.Page"]:
    """A page that must log no error and send no request to another server."""
    with browser.new_context(viewport=WIDE, **options) as context:
        page = context.new_page()
        said: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        yield page
        # Chromium itself logs this when an answer is missing or is not 2xx.
        own = re.compile("Failed to load resource: ")
        assert [text for text in said if not own.match(text)] == []
        allowed = (f"{site.url}/", "blob:", "data:")
        assert [url for url in asked if not url.startswith(allowed)] == []


@pytest.fixture
def anyone(browser: "sync_api.Browser", site: Site) -> Iterator["sync_api.Page"]:
    """The page of a visitor who has not signed in."""
    with opened(browser, site) as page:
        yield page


@pytest.fixture
def page(
    browser: "sync_api.Browser", site: Site, cookies: "sync_api.StorageState"
) -> Iterator["sync_api.Page"]:
    """The page of a user who has signed in."""
    with opened(browser, site, storage_state=cookies) as page:
        page.goto(f"{site.url}/")
        expect(page.locator("#source option").first).to_be_attached()
        yield page


def sign_in(page: "sync_api.Page", site: Site, token: str) -> "sync_api.Page":
    """Signs in with a link like the one that the server prints."""
    page.goto(f"{site.url}/#token={token}")
    expect(page.locator("#view-new")).to_be_visible()
    expect(page.locator("#model")).not_to_contain_text("starting", timeout=SECONDS)
    return page


def submit(page: "sync_api.Page", text: str, name: str = "") -> str:
    """Submits a job, whose view then opens, and returns its id."""
    page.locator("#menu a").first.click()
    file = {"name": "rows.csv", "mimeType": "text/csv", "buffer": text.encode()}
    page.locator("#chosen").set_input_files(file)
    page.locator("#name").fill(name)
    page.locator("#start:enabled").click()
    page.wait_for_url(re.compile("#job="))
    return page.url.rpartition("=")[2]


def finish(page: "sync_api.Page") -> None:
    expect(page.locator("#answer")).to_be_visible(timeout=SECONDS)
    expect(page.locator("#synapses tbody tr").first).to_be_visible()


def positions(count: int, seed: int) -> str:
    """Returns a table of positions with the ids 0, 1, …, from 40 neurons."""
    xyz = np.random.default_rng(seed).integers(0, (640, 640, 960), (count, 3))
    lines = (f"{n},{n % 40},{x},{y},{z}" for n, (x, y, z) in enumerate(xyz))
    return "id,skid,x,y,z\n" + "\n".join(lines) + "\n"


def test_token_leaves_the_address_and_the_session_stays(
    anyone: "sync_api.Page", site: Site
) -> None:
    page = sign_in(anyone, site, site.token)
    assert page.url == f"{site.url}/"
    assert page.evaluate("document.cookie") == ""  # scripts cannot read the cookie
    page.reload()
    expect(page.locator("#view-new")).to_be_visible()
    page.locator("#leave").click()
    expect(page.locator("#view-signin")).to_be_visible()
    expect(page.locator("#said")).to_have_text("You are signed out.")
    page.goto(f"{site.url}/#jobs")
    expect(page.locator("#view-signin")).to_be_visible()
    expect(page.locator("#menu")).to_be_hidden()


def test_signing_in_by_hand(anyone: "sync_api.Page", site: Site) -> None:
    anyone.goto(f"{site.url}/#jobs")
    token = anyone.get_by_label("Token")
    expect(token).to_be_focused()
    token.fill("nonsense")
    token.press("Enter")
    expect(anyone.locator("#signin-problem")).to_contain_text("no such token")
    token.fill(site.token)
    token.press("Enter")
    expect(anyone.locator("#view-jobs")).to_be_visible()  # the requested view


def test_from_a_faulty_file_to_what_request_writes(
    page: "sync_api.Page", site: Site, tmp_path: pathlib.Path
) -> None:
    start, problems = page.locator("#start"), page.locator("#problems tbody tr")
    expect(start).to_be_disabled()
    file = {"name": "mine.csv", "mimeType": "text/csv", "buffer": FAULTY.encode()}
    page.locator("#chosen").set_input_files(file)
    expect(page.locator("#verdict")).to_contain_text("2 errors and 1 warning")
    shown = [row.split("\t")[:2] for row in problems.all_inner_texts()]
    assert shown[:2] == [["2", "z"], ["4", "skid"]]
    expect(start).to_be_disabled()
    with page.expect_download() as download:
        page.get_by_role("button", name="Save this list").click()
    saved = pathlib.Path(download.value.path()).read_bytes().decode()
    assert saved.startswith('"kind","line","column","message"\r\n"error","2","z","')
    page.get_by_role("button", name="go to line 4").click()
    selected = "t => t.value.slice(t.selectionStart, t.selectionEnd)"
    assert page.locator("#text").evaluate(selected) == "3,x5,160,160,160"
    page.locator("#text").fill(MENDED)
    expect(start).to_be_enabled()
    expect(page.locator("#sizes")).to_contain_text("3rows1neuron")
    start.click()
    page.wait_for_url(re.compile("#job="))
    job_id = page.url.rpartition("=")[2]
    finish(page)
    expect(page.locator("#job-name")).to_have_text("mine.csv")
    expect(page.locator("#statuses")).to_contain_text("1bad position")
    expect(page.locator("#neurons tbody tr")).to_have_count(1)
    expect(page.locator("#synapses tbody tr")).to_have_count(3)

    (tmp_path / "mended.csv").write_text(MENDED)
    site.command(
        "synister_jax.request",
        *(f"--positions={tmp_path}/mended.csv", "--source=none", "--batch_size=1"),
        *(f"--workdir={site.run}", f"--volume={site.volume}"),
        f"--output={tmp_path}/own",
    )
    for name, link in (("predictions.csv", "CSV"), ("predictions.feather", "Feather")):
        with page.expect_download() as download:
            page.get_by_role("link", name=link, exact=True).click()
        got = pathlib.Path(download.value.path()).read_bytes()
        assert got == site.path(job_id, name).read_bytes()
        assert got == (tmp_path / "own" / name).read_bytes()
    with page.expect_popup() as popup:
        page.get_by_role("link", name="Report").click()
    expect(popup.value.locator("h1").first).to_be_visible()
    link = page.get_by_role("link", name="Neuroglancer")
    assert link.get_attribute("href").startswith("https://neuroglancer-demo")
    assert link.get_attribute("rel") == "noopener noreferrer"


def test_neurons_are_found_searched_and_led_from(page: "sync_api.Page") -> None:
    ids = [NEURON + n for n in range(18)]
    text = "\n".join(map(str, [*ids, 99, ids[0]]))
    page.locator("#text").fill(text)
    expect(page.locator("#verdict")).to_contain_text("1 warning")
    page.locator("#start:enabled").click()
    finish(page)
    expect(page.locator("#remarks")).to_contain_text("1 neuron unknown to the source")
    neurons, rows = page.locator("#neurons"), page.locator("#neurons tbody tr")
    expect(neurons.locator("output")).to_have_text("1 to 18 of 18 neurons")
    first = rows.first.locator(".stack")
    assert re.match(r"(GABA|ACh|DA) \d", first.get_attribute("aria-label"))
    neurons.get_by_label("Find a neuron").fill(str(ids[3]))
    expect(rows).to_have_count(1)
    page.get_by_role("button", name=f"synapses of neuron {ids[3]}").click()
    synapses_ = page.locator("#synapses")
    expect(synapses_.get_by_label("Neuron id")).to_have_value(str(ids[3]))
    expect(synapses_.locator("output")).to_have_text("1 to 5 of 5 synapses")
    synapses_.get_by_label("Neuron id").fill("")
    expect(synapses_.locator("output")).to_have_text("1 to 25 of 90 synapses")
    synapses_.get_by_role("button", name="Next").click()
    expect(synapses_.locator("output")).to_have_text("26 to 50 of 90 synapses")
    synapses_.get_by_label("Called").select_option("none")
    expect(synapses_.locator("output")).to_have_text("no synapse")
    synapses_.get_by_label("Called").select_option("")
    synapses_.get_by_label("Neuron id").fill("x")
    expect(synapses_.locator("output")).to_contain_text("neuron")  # says why


def test_the_same_again_is_the_same_request(page: "sync_api.Page") -> None:
    first = submit(page, "x,y,z\n160,160,200\n")
    finish(page)
    expect(page.locator("#neurons")).to_be_hidden()  # the answer has none
    assert submit(page, "x;y;z\n160;160;200\n") == first
    expect(page.locator("#said")).to_contain_text("asked for the same before")
    page.locator("#menu a").first.click()
    page.get_by_label("Compute again").check()
    page.locator("#text").fill("x,y,z\n160,160,200\n")
    page.locator("#start:enabled").click()
    page.wait_for_url(re.compile(f"#job=(?!{first})"))


def test_cancelled_and_deleted(page: "sync_api.Page") -> None:
    submit(page, positions(5_000, 1), "long")
    expect(page.locator("#stage")).to_have_text("predicting", timeout=SECONDS)
    bar = page.get_by_role("progressbar", name="predicting")
    expect(bar).to_be_visible()
    expect(page.locator("#pace")).to_have_text(
        re.compile(r"of 5,000 · \d+ % · .* per second"), timeout=SECONDS
    )
    expect(page.locator("#spoken")).to_contain_text("running")
    assert page.title().endswith("Neurotransmitter requests")
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#job-state")).to_have_text("cancelled")
    expect(bar).to_be_hidden()
    page.locator("#menu a").last.click()
    row = page.locator("#jobs tr", has_text="long")
    expect(row).to_contain_text("cancelled")
    page.once("dialog", lambda dialog: dialog.accept())
    row.get_by_role("button", name="delete long").click()
    expect(page.locator("#said")).to_have_text("The request is deleted.")
    expect(row).to_have_count(0)


def test_others_see_nothing_of_it(
    page: "sync_api.Page", browser: "sync_api.Browser", site: Site
) -> None:
    job_id = submit(page, "x,y,z\n100,100,200\n", "secret")
    finish(page)
    with browser.new_context() as context:
        other = sign_in(context.new_page(), site, site.other)
        other.goto(f"{site.url}/#jobs")
        expect(other.locator("#no-jobs")).to_be_visible()
        other.goto(f"{site.url}/#job={job_id}")
        expect(other.get_by_role("heading", name="Not found")).to_be_focused()
        assert "secret" not in other.content()
        for path in ("", "/neurons", "/synapses", "/predictions.csv", "/report.html"):
            answer = context.request.get(f"{site.url}/api/jobs/{job_id}{path}")
            assert answer.status == 404


def test_texts_are_texts(page: "sync_api.Page") -> None:
    page.locator("#text").fill(f"x,y,z\n{EVIL},1,2\n")
    expect(page.locator("#problems")).to_contain_text("<img src=x")
    submit(page, "x,y,z\n1,1,1\n", EVIL)
    expect(page.locator("#job-name")).to_have_text(EVIL)
    page.locator("#menu a").last.click()
    expect(page.locator("#jobs")).to_contain_text(EVIL)
    assert page.locator("main img").count() == 0


@pytest.mark.parametrize("content", [b"\xff\xfe1\x00", b"1\n" * 200_000])
def test_files_that_are_not_shown_are_checked(
    page: "sync_api.Page", content: bytes
) -> None:
    file = {"name": "all.txt", "mimeType": "text/plain", "buffer": content}
    page.locator("#chosen").set_input_files(file)
    expect(page.locator("#file")).to_contain_text("all.txt")
    expect(page.locator("#text")).to_be_hidden()
    expect(page.locator("#verdict")).to_contain_text(re.compile("error|warning"))
    page.get_by_role("button", name="Remove").click()
    expect(page.locator("#text")).to_be_focused()
    expect(page.locator("#verdict")).to_contain_text("as soon as you give rows")


def test_start_waits_for_the_model(page: "sync_api.Page", site: Site) -> None:
    found = page.request.get(f"{site.url}/api/models").json()
    opening = [model | {"ready": False} for model in found]
    answers = [opening]
    page.route("**/api/models", lambda route: route.fulfill(json=answers[-1]))
    page.locator("#menu a").first.click()
    expect(page.locator("#model")).to_contain_text("starting")
    page.locator("#text").fill("x,y,z\n160,160,280\n")
    verdict, start = page.locator("#verdict"), page.locator("#start")
    expect(verdict).to_have_text(
        "No error. The model is being opened; you can start in a moment."
    )
    expect(start).to_be_disabled()
    answers.append(found)
    expect(start).to_be_enabled()
    expect(verdict).to_have_text("No error. You can start the request.")
    # The server has restarted, and the page does not know this.
    refusal = {"detail": "model small is being opened"}
    page.route(
        "**/api/jobs?*", lambda route: route.fulfill(status=503, json=refusal), times=1
    )
    answers.append(opening)
    start.click()
    expect(verdict).to_contain_text("is being opened")
    expect(start).to_be_disabled()
    answers.append(found)
    expect(start).to_be_enabled()
    start.click()
    finish(page)


def test_dropped_file(page: "sync_api.Page") -> None:
    transfer = page.evaluate_handle(
        """() => {
            const transfer = new DataTransfer();
            transfer.items.add(new File(["skid\\n5\\n"], "dropped.csv"));
            return transfer;
        }"""
    )
    page.locator("#drop").dispatch_event("dragover", {"dataTransfer": transfer})
    expect(page.locator("#drop")).to_have_class("over")
    page.locator("#drop").dispatch_event("drop", {"dataTransfer": transfer})
    expect(page.locator("#text")).to_have_value("skid\n5\n")
    expect(page.locator("#name")).to_have_value("dropped.csv")
    expect(page.locator("#start")).to_be_enabled()


def test_keyboard_alone(page: "sync_api.Page") -> None:
    page.on("filechooser", lambda _: None)  # no real dialog may open
    page.locator("#text").focus()
    page.keyboard.type("x,y,z\n160,160,240\n")
    page.keyboard.press("Tab")
    expect(page.locator("#choose")).to_be_focused()
    with page.expect_file_chooser():
        page.keyboard.press("Enter")
    outline = "x => getComputedStyle(x).outlineStyle"
    assert page.locator("#choose").evaluate(outline) == "solid"
    expect(page.locator("#start")).to_be_enabled()
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "start":
            break
    page.keyboard.press("Enter")
    finish(page)
    expect(page.locator("#job-name")).to_be_focused()
    page.go_back()
    expect(page.locator("#view-new h1")).to_be_focused()
    page.go_forward()
    expect(page.locator("#job-name")).to_be_focused()


def test_server_away_and_back(page: "sync_api.Page") -> None:
    submit(page, positions(30_000, 2))  # takes longer than the page is offline
    expect(page.locator("#stage")).to_have_text("predicting", timeout=SECONDS)
    page.context.set_offline(True)
    expect(page.get_by_role("alert").filter(has_text="does not answer")).to_be_visible()
    page.context.set_offline(False)
    expect(page.locator("#away")).to_be_hidden(timeout=15_000)
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#job-state")).to_have_text("cancelled")


def test_session_that_has_ended(page: "sync_api.Page", site: Site) -> None:
    page.context.clear_cookies()
    page.locator("#menu a").last.click()
    expect(page.locator("#said")).to_contain_text("Sign in again")
    page.get_by_label("Token").fill(site.token)
    page.keyboard.press("Enter")
    expect(page.locator("#view-jobs")).to_be_visible()


def _views(page: "sync_api.Page") -> Iterator[str]:
    """Opens one view after another, all with content, and yields their names."""
    page.locator("#menu a").first.click()
    page.locator("details summary").first.click()
    page.locator("#text").fill(FAULTY)
    expect(page.locator("#problems tbody tr").first).to_be_visible()
    yield "errors"
    page.locator("#text").fill(MENDED)
    expect(page.locator("#start")).to_be_enabled()
    yield "checked"
    page.locator("#start").click()
    finish(page)
    yield "answer"
    page.locator("#menu a").last.click()
    expect(page.locator("#jobs tr").first).to_be_visible()
    yield "jobs"
    submit(page, positions(3_000, 3))
    expect(page.locator("#pace")).not_to_be_empty(timeout=SECONDS)
    yield "progress"
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#job-state")).to_have_text("cancelled")
    yield "cancelled"
    page.locator("#leave").click()
    expect(page.locator("#view-signin")).to_be_visible()
    yield "signin"


def test_every_view_is_for_everyone(anyone: "sync_api.Page", site: Site) -> None:
    """Checks contrast (WCAG 2, AA), width on a phone, size of buttons, and names."""
    page = sign_in(anyone, site, site.token)
    for view in _views(page):
        assert page.evaluate(_UNNAMED) == [], view
        page.set_viewport_size(TELEPHONE)
        wide = "document.documentElement.scrollWidth <= 390"
        assert page.evaluate(wide), view
        assert page.evaluate(_SMALL) == [], view
        page.set_viewport_size(WIDE)
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate(html_pages.CONTRAST) == [], (view, scheme)


_UNNAMED = """() => {
    const ids = [...document.querySelectorAll("[id]")].map((x) => x.id);
    const twice = ids.filter((id, place) => ids.indexOf(id) !== place);
    const fields = [...document.querySelectorAll("input, select, textarea, button")];
    const unnamed = fields.filter((x) => x.checkVisibility() &&
        !x.labels?.length && !x.ariaLabel && !x.textContent.trim());
    const titles = [...document.querySelectorAll("h1")];
    const shown = titles.filter((x) => x.checkVisibility()).length;
    const titled = shown === 1 ? [] : ["not one title"];
    return [...twice, ...unnamed.map((x) => x.outerHTML), ...titled];
}"""
_SMALL = """() => [...document.querySelectorAll("a, button, input, select, summary")]
    .filter((x) => x.checkVisibility() && x.type !== "checkbox" && !x.closest("p.note"))
    .filter((x) => !x.matches(".skip") && x.getBoundingClientRect().height < 43.5)
    .map((x) => x.outerHTML)"""


@pytest.mark.slow
def test_killed_in_mid_job_the_page_and_the_job_go_on(
    page: "sync_api.Page", site: Site
) -> None:
    text = positions(4_000, 4)
    job_id = submit(page, text)
    parts = site.path(job_id, "parts")
    serving.wait_for(lambda: any(parts.glob("*.feather")), 90)
    assert site.server.stop(signal.SIGKILL) == -signal.SIGKILL
    expect(page.get_by_role("alert").filter(has_text="does not answer")).to_be_visible()
    site.again()
    expect(page.locator("#away")).to_be_hidden(timeout=40_000)
    expect(page.locator("#answer")).to_be_visible(timeout=120_000)
    expect(page.locator("#synapses output")).to_have_text("1 to 25 of 4,000 synapses")
    with page.expect_download() as download:
        page.get_by_role("link", name="Feather", exact=True).click()
    table = feather.read_table(download.value.path(), memory_map=False)
    assert table["synapse_id"].to_pylist() == list(range(4_000))
    page.locator("#menu a").last.click()
    expect(page.locator(f'#jobs a[href="#job={job_id}"]')).to_have_count(1)
