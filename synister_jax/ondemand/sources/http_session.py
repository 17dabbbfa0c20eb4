# SPDX-License-Identifier: Apache-2.0
"""Asking a service over HTTP: retries, time-outs, bounded answers, errors in words.

urllib3 repeats a request whose connection fails or whose status says to come back, with
exponential back-off and jitter, or after as long as `Retry-After` says. Every request
here reads, POSTs too, so each may be repeated. No message holds a secret.
"""

import io
import json
import re
import time
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

import requests
import requests.adapters
import urllib3

from synister_jax.base.errors import UserError

CONNECT_SECONDS = 10.0
READ_SECONDS = 180.0  # neuPrint thinks for minutes over a large query
WHOLE_SECONDS = 900.0  # one answer, from its first byte to its last
MOST_BYTES = 256 << 20
RETRIES = urllib3.Retry(
    total=5,
    connect=3,
    read=2,
    status_forcelist=(429, 500, 502, 503, 504),
    allowed_methods=None,
    backoff_factor=0.5,
    backoff_jitter=0.5,
    backoff_max=60,
    retry_after_max=300,
    raise_on_status=False,
)
DETAIL = 200  # characters of what a service says about an error


class Session(requests.Session):
    """Answers that are usable, or `UserError`, whoever asks through it."""

    def __init__(self, service: str, credentials: str, secrets: Iterable[str]) -> None:
        """
        Args:
          service: its name, for messages.
          credentials: how to give them, for messages.
          secrets: what no message may hold.
        """
        self._service, self._credentials = service, credentials
        self._secrets = [secret for secret in secrets if secret]
        super().__init__()
        # Or an entry of ~/.netrc would take the place of a client's own header.
        self.auth = _as_it_is

    def mount(
        self, prefix: str | bytes, adapter: requests.adapters.BaseAdapter
    ) -> None:
        """A client's own adapter would not retry as ours does."""
        super().mount(prefix, requests.adapters.HTTPAdapter(max_retries=RETRIES))

    def send(
        self, request: requests.PreparedRequest, **options: Any
    ) -> requests.Response:
        """The whole answer, with a status below 300 and no web page."""
        # A redirect of a service leads to a login page, or would lose a POST's body.
        options |= {"stream": True, "allow_redirects": False}
        options["timeout"] = (CONNECT_SECONDS, READ_SECONDS)
        retries = RETRIES
        url = request.url or ""  # one that is prepared has it
        while True:
            try:
                response = super().send(request, **options)
                with response:
                    content = self._read(response)
                break
            except requests.RequestException as error:
                raise self.problem(url, _reason(error)) from None
            except urllib3.exceptions.HTTPError as error:
                try:
                    retries = retries.increment(
                        request.method, request.url, error=error
                    )
                except urllib3.exceptions.HTTPError:
                    why = "breaks off its answer again and again: try later"
                    raise self.problem(url, why) from None
                retries.sleep()
        response.raw = io.BytesIO(content)
        self._check(response, content)
        return response

    def json(self, method: str, url: str, **options: Any) -> Any:
        """The answer as JSON; options as of `requests.Session.request`."""
        try:
            response = self.request(method, url, **options)
        except requests.RequestException as error:  # an address that is none
            raise self.problem(url, _reason(error)) from None
        try:
            return json.loads(response.content)
        except (ValueError, RecursionError):
            raise self.broken(url, "what is not JSON") from None

    def broken(self, url: str, what: str) -> UserError:
        """For an answer of another shape than the documented one."""
        return self.problem(
            url, f"answers with {what}; rerun, and if that stays check the address"
        )

    def problem(self, url: str, why: str) -> UserError:
        """A UserError that names the service, without path and secrets."""
        try:
            host = urlsplit(url).netloc.rpartition("@")[2] or url
        except ValueError:
            host = "an address that is none"
        return UserError(self.redacted(f"{self._service} at {host} {why}"))

    def redacted(self, text: str) -> str:
        """Without secrets. Before it is cut: what is left of one would not be found."""
        for secret in self._secrets:
            text = text.replace(secret, "…")
        return text

    def _read(self, response: requests.Response) -> bytes:
        end = time.monotonic() + WHOLE_SECONDS
        pieces, size = [], 0
        # Not iter_content: that waits for a full piece, however slowly it fills.
        while piece := response.raw.read1(1 << 16, decode_content=True):
            pieces.append(piece)
            size += len(piece)
            if size > MOST_BYTES:
                why = f"answers with more than {MOST_BYTES >> 20} MiB; ask for less"
                raise self.problem(response.url, why)
            if time.monotonic() > end:
                why = f"takes more than {WHOLE_SECONDS:.0f} s for an answer; try later"
                raise self.problem(response.url, why)
        return b"".join(pieces)

    def _check(self, response: requests.Response, content: bytes) -> None:
        status = response.status_code
        kind = response.headers.get("Content-Type", "").lower()
        page = "html" in kind or content[:64].lstrip().lower().startswith(b"<")
        detail = "" if page else self._detail(content)
        if 300 <= status < 400:
            why = "sends elsewhere, perhaps to log in: check the address, and set "
            why += self._credentials
        elif status in (401, 403):
            why = f"refuses ({status}{detail}): set {self._credentials}"
        elif status == 404:
            why = f"has nothing there (404{detail}): check the address and its settings"
        elif status == 429:
            why = f"has had too many requests (429{detail}): try later"
        elif status >= 500:
            why = f"fails ({status}{detail}): try later"
        elif status >= 400:
            why = f"does not accept the request ({status}{detail})"
        elif page:
            why = "answers with a web page, not with data: check the address, and set "
            why += self._credentials
        else:
            return
        raise self.problem(response.url, why)

    def _detail(self, content: bytes) -> str:
        """`: reason` of an error that is told in JSON, one line, or nothing."""
        try:
            told = json.loads(content)
        except (ValueError, RecursionError):
            return ""
        if not isinstance(told, dict):
            return ""
        for name in ("message", "error", "detail"):
            if isinstance(told.get(name), str):
                line = re.sub(r"[\s\x00-\x1f\x7f]+", " ", told[name]).strip()
                return f": {self.redacted(line)[:DETAIL]}"
        return ""


class OwnSession:
    """Mixed into a client that makes a session for itself: it gets ours instead."""

    def __init__(self, own: Session, *arguments: Any, **options: Any) -> None:
        self._own = own
        super().__init__(*arguments, **options)

    @property
    def session(self) -> Session:
        return self._own

    @session.setter
    def session(self, made: requests.Session) -> None:
        del made


def _as_it_is(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


def _reason(error: Exception) -> str:
    """In words, without the address, which may hold a secret."""
    text = str(error)
    if isinstance(error, requests.exceptions.ConnectTimeout):
        return f"cannot be reached within {CONNECT_SECONDS:.0f} s: check the address"
    if "timed out" in text:
        return f"does not answer within {READ_SECONDS:.0f} s: try later"
    if isinstance(error, requests.exceptions.SSLError):
        return "has no certificate that is trusted here: check the address"
    if isinstance(error, requests.exceptions.ConnectionError):
        return "cannot be reached: check the address and the network"
    return f"cannot be asked ({type(error).__name__})"
