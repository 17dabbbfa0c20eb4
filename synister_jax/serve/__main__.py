# SPDX-License-Identifier: Apache-2.0
r"""Serves predictions on demand: a web page for people, and an API for programs.

    python -m synister_jax.serve --models=DIR [--port=8000] [--open]
    python -m synister_jax.serve --models=DIR --host=0.0.0.0 \
        --public_url=https://synister.example.org
    python -m synister_jax.serve --models=DIR --add_token=NAME
    python -m synister_jax.serve --models=DIR --revoke_token=NAME
    python -m synister_jax.serve --models=DIR --list_tokens

The file DIR/models.toml names the models. The folder DIR/service keeps the requests and
the answers. You can stop the server at any moment: its jobs continue after the next
start. By default, only this machine can reach the server. To let other machines in, set
--host, put a proxy with https in front of the server, and give the address of the proxy
as --public_url. docs/deploy.md describes the whole setup.
"""

import datetime
import ipaddress
import pathlib
import signal
import socket
import sys
import threading
import webbrowser
from typing import TYPE_CHECKING

from absl import flags

from synister_jax.base import command, files
from synister_jax.base.errors import UserError
from synister_jax.serve import annotations, served_models, supervisor, tokens
from synister_jax.serve.store import Store

if TYPE_CHECKING:
    from synister_jax.serve.service import Service

_MOST_CONNECTIONS = 1000
_KEEP_ALIVE_SECONDS = 30
_FIRST_TOKEN = "first"


def _socket(host: str, port: int) -> socket.socket:
    try:
        [(family, *_), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"cannot listen at {host}, port {port} ({error}); choose another --port"
        ) from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _list(store: Store) -> None:
    for token in tokens.listing(store.database):
        made = datetime.datetime.fromtimestamp(token.created).date()
        state = "in use" if token.revoked is None else "revoked"
        print(f"{token.name}\t{state}\tmade {made}\t{token.jobs} jobs")


def _serve(
    listening: socket.socket,
    url: str,
    service: "Service",
    workers: supervisor.Supervisor,
    opens: bool,
) -> None:
    """Serves until the process receives SIGINT or SIGTERM."""
    import uvicorn

    from synister_jax.serve import app

    configuration = uvicorn.Config(
        app.make(service),
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        # Anybody can send X-Forwarded headers. The service believes these headers only
        # if --public_url says that a proxy is in front of the server.
        proxy_headers=service.options.public_url is not None,
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=3,
    )
    server = uvicorn.Server(configuration)

    def stop(*_: object) -> None:
        server.should_exit = True

    # While uvicorn serves, it uses its own handlers. When uvicorn ends, it raises the
    # received signals again, and these handlers catch them.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    workers.start()
    try:
        if opens:
            threading.Timer(0.5, webbrowser.open, [url]).start()
        server.run(sockets=[listening])
    finally:
        print("stopping the server and its workers", flush=True)
        workers.stop()


def main() -> None:
    sys.argv[0] = "serve"  # error messages begin with this name
    folder = flags.DEFINE_string(
        "models",
        None,
        "Serve the models that the file models.toml in this folder names.",
        required=True,
    )
    state = flags.DEFINE_string(
        "state",
        None,
        "Keep the jobs, the answers and the tokens in this folder; the default is the "
        "folder service in --models.",
    )
    host = flags.DEFINE_string(
        "host",
        "127.0.0.1",
        "Listen at this address. At 127.0.0.1, only this machine reaches the server.",
    )
    port = flags.DEFINE_integer(
        "port", 8000, "Listen at this port; 0 takes a free port.", 0, 65535
    )
    public_url = flags.DEFINE_string(
        "public_url",
        None,
        "Say that browsers reach the server through a proxy at this address, for "
        "example https://synister.example.org.",
    )
    workers = flags.DEFINE_integer(
        "workers",
        None,
        "Start this many processes that predict; the default is one process for each "
        "accelerator.",
        1,
    )
    batch_size = flags.DEFINE_integer(
        "batch_size", 32, "Classify this many crops at once.", 1
    )
    most_rows = flags.DEFINE_integer(
        "most_rows",
        100_000,
        "Refuse a request that has more rows than this.",
        1,
    )
    most_synapses = flags.DEFINE_integer(
        "most_synapses",
        1_000_000,
        "Let a job fail if its neurons have more synapses than this together.",
        1,
    )
    most_jobs = flags.DEFINE_integer(
        "most_jobs",
        20,
        "Refuse new requests of a token that has this many unfinished jobs.",
        1,
    )
    most_bytes = flags.DEFINE_integer(
        "most_bytes",
        2 << 30,
        "Refuse new requests of a token when its stored answers take more bytes than "
        "this.",
        1,
    )
    requests_per_minute = flags.DEFINE_integer(
        "requests_per_minute",
        1200,
        "Answer at most this many HTTP requests of a token in a minute.",
        1,
    )
    credentials = flags.DEFINE_string(
        "credentials",
        None,
        "Read the addresses and the tokens of the sources from this ini file. "
        "Environment variables, if they are set, come first.",
    )
    neuroglancer = flags.DEFINE_string(
        "neuroglancer",
        annotations.NEUROGLANCER,
        "Open results in the Neuroglancer at this address.",
    )
    opens = flags.DEFINE_bool(
        "open", False, "Open the page in a browser when the server has started."
    )
    add = flags.DEFINE_string(
        "add_token", None, "Make a token with this name, print the token, and stop."
    )
    revoke = flags.DEFINE_string(
        "revoke_token",
        None,
        "Revoke the token with this name, cancel its unfinished jobs, and stop.",
    )
    lists = flags.DEFINE_bool(
        "list_tokens",
        False,
        "Print the name, the state and the number of jobs of every token, and stop.",
    )

    def run() -> None:
        # This import takes half a second, and --help does not need it.
        from synister_jax.serve.service import Service, ServiceOptions

        found = served_models.load(pathlib.Path(folder.value))
        networks = {name: served_models.network(model) for name, model in found.items()}
        for name in ("public_url", "neuroglancer"):
            url = flags.FLAGS[name].value
            if url is not None and not url.startswith(("http://", "https://")):
                raise UserError(
                    f"--{name}={url}: the address does not begin with http:// or "
                    "https://; give the whole address"
                )
        place = files.make_folder(state.value or pathlib.Path(folder.value) / "service")
        place.chmod(0o700)
        for name in ("jobs", "uploads"):
            files.make_folder(place / name)
        store = Store(place / "service.sqlite")
        if lists.value:
            _list(store)
            return
        if revoke.value is not None:
            cancelled = tokens.revoke(store.database, revoke.value)
            print(
                f"token {revoke.value} is revoked; {cancelled} unfinished jobs of this "
                "token are cancelled"
            )
            return
        if add.value is not None:
            print(tokens.add(store.database, add.value))
            return
        with files.locked(place), _socket(host.value, port.value) as listening:
            number = listening.getsockname()[1]
            shown = f"[{host.value}]" if ":" in host.value else host.value
            url = (public_url.value or f"http://{shown}:{number}").rstrip("/") + "/"
            if not _is_loopback(host.value):
                print(
                    f"warning: every machine that reaches {host.value} reaches this "
                    "server, and others can read the tokens on the way; put a proxy "
                    "with https in front of the server",
                    file=sys.stderr,
                )
            print(f"serving {', '.join(found)} at {url}", flush=True)
            if not any(t.revoked is None for t in tokens.listing(store.database)):
                url += f"#token={tokens.add(store.database, _FIRST_TOKEN)}"
                print(
                    f"sign in with this link, which is shown only once: {url}",
                    flush=True,
                )
            else:
                print("sign in with a token; --add_token=NAME makes a new token")
            with supervisor.alone(place) as mark:
                store.start_over()
                arguments = [
                    f"--models={folder.value}",
                    f"--state={place}",
                    f"--batch_size={batch_size.value}",
                    f"--most_synapses={most_synapses.value}",
                ]
                if credentials.value is not None:
                    arguments.append(f"--credentials={credentials.value}")
                keeper = supervisor.Supervisor(
                    store, place, arguments, workers.value, mark
                )
                options = ServiceOptions(
                    host=host.value,
                    public_url=public_url.value,
                    neuroglancer=neuroglancer.value,
                    most_rows=most_rows.value,
                    most_jobs=most_jobs.value,
                    most_bytes=most_bytes.value,
                    requests_per_minute=requests_per_minute.value,
                )
                service = Service(place, store, found, networks, options, keeper.alive)
                _serve(listening, url, service, keeper, opens.value)
        store.close()

    command.run(run)


if __name__ == "__main__":
    main()
