# SPDX-License-Identifier: Apache-2.0
"""Sends requests to a service over HTTP, with retries, time-outs and clear errors.

urllib3 repeats a request if the connection fails or the status asks for a repetition.
The waiting time grows exponentially with jitter, or is the time that `Retry-After`
gives. All requests here only read data, POST requests too. Each request can therefore
be repeated. No message contains a secret, and the size of an answer is limited.
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
READ_SECONDS = 180.0  # neuPrint can need minutes for a large query
WHOLE_SECONDS = 900.0  # for one answer, from its first byte to its last
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
DETAIL = 200  # characters that are shown of the error text of a service


class Session(requests.Session):
    """A session that returns usable answers only, and raises `UserError` otherwise."""

    def __init__(self, service: str, credentials: str, secrets: Iterable[str]) -> None:
        """Makes a session.

        Args:
          service: the name of the service, for messages.
          credentials: how to give the credentials, for messages.
          secrets: texts that no message may contain.
        """
        self._service, self._credentials = service, credentials
        self._secrets = [secret for secret in secrets if secret]
        super().__init__()
        # Without this, an entry of ~/.netrc would replace the header of a client.
        self.auth = _as_it_is

    def mount(
        self, prefix: str | bytes, adapter: requests.adapters.BaseAdapter
    ) -> None:
        """Mounts our adapter, because the adapter of a client retries differently."""
        super().mount(prefix, requests.adapters.HTTPAdapter(max_retries=RETRIES))

    def send(
        self, request: requests.PreparedRequest, **options: Any
    ) -> requests.Response:
        """Returns the whole answer, which has a status below 300 and is not a web page.

        Raises:
          UserError: the service cannot be reached, or gives another answer.
        """
        # A redirect leads to a login page, or would lose the body of a POST request.
        options |= {"stream": True, "allow_redirects": False}
        options["timeout"] = (CONNECT_SECONDS, READ_SECONDS)
        retries = RETRIES
        url = request.url or ""  # a prepared request has a URL
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
                    why = "breaks off its answer again and again: try again later"
                    raise self.problem(url, why) from None
                retries.sleep()
        response.raw = io.BytesIO(content)
        self._check(response, content)
        return response

    def json(self, method: str, url: str, **options: Any) -> Any:
        """Returns the answer as JSON; takes the options of `requests.Session.request`.

        Raises:
          UserError: the service gives no usable answer, or the answer is not JSON.
        """
        try:
            response = self.request(method, url, **options)
        except requests.RequestException as error:  # the address is not valid
            raise self.problem(url, _reason(error)) from None
        try:
            return json.loads(response.content)
        except (ValueError, RecursionError):
            raise self.broken(url, "text that is not JSON") from None

    def broken(self, url: str, what: str) -> UserError:
        """Returns the error for an answer that has not the documented form."""
        return self.problem(
            url,
            f"answers with {what}: run the command again; if the error stays, check "
            "the address",
        )

    def problem(self, url: str, why: str) -> UserError:
        """Returns a `UserError` that names the service, without path and secrets."""
        try:
            host = urlsplit(url).netloc.rpartition("@")[2] or url
        except ValueError:
            host = "an invalid address"
        return UserError(self.redacted(f"{self._service} at {host} {why}"))

    def redacted(self, text: str) -> str:
        """Returns a text without secrets. Cut the text only afterwards.

        A part of a secret would not be found.
        """
        for secret in self._secrets:
            text = text.replace(secret, "…")
        return text

    def _read(self, response: requests.Response) -> bytes:
        end = time.monotonic() + WHOLE_SECONDS
        pieces, size = [], 0
        # iter_content would wait for a full piece, even if the data come very slowly.
        while piece := response.raw.read1(1 << 16, decode_content=True):
            pieces.append(piece)
            size += len(piece)
            if size > MOST_BYTES:
                why = f"answers with more than {MOST_BYTES >> 20} MiB: ask for less"
                raise self.problem(response.url, why)
            if time.monotonic() > end:
                why = (
                    f"takes more than {WHOLE_SECONDS:.0f} s for an answer: try again "
                    "later"
                )
                raise self.problem(response.url, why)
        return b"".join(pieces)

    def _check(self, response: requests.Response, content: bytes) -> None:
        status = response.status_code
        kind = response.headers.get("Content-Type", "").lower()
        page = "html" in kind or content[:64].lstrip().lower().startswith(b"<")
        detail = "" if page else self._detail(content)
        if 300 <= status < 400:
            why = (
                "redirects the request, perhaps to a login: check the address, and set "
            )
            why += self._credentials
        elif status in (401, 403):
            why = f"refuses access ({status}{detail}): set {self._credentials}"
        elif status == 404:
            why = f"has nothing at this path (404{detail}): check address and settings"
        elif status == 429:
            why = f"reports too many requests (429{detail}): try again later"
        elif status >= 500:
            why = f"fails ({status}{detail}): try again later"
        elif status >= 400:
            why = f"does not accept the request ({status}{detail})"
        elif page:
            why = "answers with a web page, not with data: check the address, and set "
            why += self._credentials
        else:
            return
        raise self.problem(response.url, why)

    def _detail(self, content: bytes) -> str:
        """Returns `: reason` in one line for a JSON error, otherwise an empty text."""
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
    """A mixin that gives our session to a client that would make its own session."""

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
    """Returns the reason in words, without the address, which can contain a secret."""
    text = str(error)
    if isinstance(error, requests.exceptions.ConnectTimeout):
        return f"cannot be reached within {CONNECT_SECONDS:.0f} s: check the address"
    if "timed out" in text:
        return f"does not answer within {READ_SECONDS:.0f} s: try again later"
    if isinstance(error, requests.exceptions.SSLError):
        return "has no certificate that is trusted here: check the address"
    if isinstance(error, requests.exceptions.ConnectionError):
        return "cannot be reached: check the address and the network"
    return f"cannot be asked ({type(error).__name__})"
