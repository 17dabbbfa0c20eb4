# SPDX-License-Identifier: Apache-2.0
"""Serves predictions on demand: a web page, and an API for programs.

    python -m synister_jax.serve --models=DIR [--port=8000] [--open]
    python -m synister_jax.serve --models=DIR --add_token=NAME
    python -m synister_jax.serve --models=DIR --revoke_token=NAME | --list_tokens

DIR/models.toml names the models. What people ask for, and the answers, are kept in
DIR/service; stop the server at any moment and start it again, its jobs go on. It is
reached from this machine alone unless --host says otherwise; put a server that speaks
https before it then, and name it with --public_url.
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
    """Until SIGINT or SIGTERM."""
    import uvicorn

    from synister_jax.serve import app

    configuration = uvicorn.Config(
        app.make(service),
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        # Whom a proxy names is believed only where there is meant to be one.
        proxy_headers=service.options.public_url is not None,
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=3,
    )
    server = uvicorn.Server(configuration)

    def stop(*_: object) -> None:
        server.should_exit = True

    # uvicorn has its own while it serves, and raises what came again afterwards.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    workers.start()
    try:
        if opens:
            threading.Timer(0.5, webbrowser.open, [url]).start()
        server.run(sockets=[listening])
    finally:
        print("stopping", flush=True)
        workers.stop()


def main() -> None:
    sys.argv[0] = "serve"  # in messages
    folder = flags.DEFINE_string(
        "models", None, "Folder with models.toml.", required=True
    )
    state = flags.DEFINE_string("state", None, "Folder of jobs; --models/service.")
    host = flags.DEFINE_string("host", "127.0.0.1", "Where to listen.")
    port = flags.DEFINE_integer("port", 8000, "0: one that is free.", 0, 65535)
    public_url = flags.DEFINE_string(
        "public_url", None, "How browsers reach it, where that is not directly."
    )
    workers = flags.DEFINE_integer(
        "workers", None, "Processes that compute; one an accelerator.", 1
    )
    batch_size = flags.DEFINE_integer("batch_size", 32, "Crops at once.", 1)
    most_rows = flags.DEFINE_integer("most_rows", 100_000, "Of a request.", 1)
    most_synapses = flags.DEFINE_integer(
        "most_synapses", 1_000_000, "Of the neurons of a request together.", 1
    )
    most_jobs = flags.DEFINE_integer("most_jobs", 20, "Unfinished, of a token.", 1)
    most_bytes = flags.DEFINE_integer("most_bytes", 2 << 30, "Kept, of a token.", 1)
    requests_per_minute = flags.DEFINE_integer(
        "requests_per_minute", 1200, "Of a token.", 1
    )
    credentials = flags.DEFINE_string("credentials", None, "Ini file of the sources.")
    neuroglancer = flags.DEFINE_string(
        "neuroglancer", annotations.NEUROGLANCER, "Where links to it lead."
    )
    opens = flags.DEFINE_bool("open", False, "Open the page in a browser.")
    add = flags.DEFINE_string("add_token", None, "Make a token of this name.")
    revoke = flags.DEFINE_string("revoke_token", None, "End the token of this name.")
    lists = flags.DEFINE_bool("list_tokens", False, "Name the tokens.")

    def run() -> None:
        # It takes half a second to import: --help answers without it.
        from synister_jax.serve.service import Service, ServiceOptions

        found = served_models.load(pathlib.Path(folder.value))
        networks = {name: served_models.network(model) for name, model in found.items()}
        for name in ("public_url", "neuroglancer"):
            url = flags.FLAGS[name].value
            if url is not None and not url.startswith(("http://", "https://")):
                raise UserError(f"--{name}={url}: begin it with https://")
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
                f"token {revoke.value} ended, and {cancelled} unfinished jobs with it"
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
                    f"warning: whoever reaches {host.value} reaches this; put a server "
                    "that speaks https before it, or tokens can be overheard",
                    file=sys.stderr,
                )
            print(f"serving {', '.join(found)} at {url}", flush=True)
            if not any(t.revoked is None for t in tokens.listing(store.database)):
                url += f"#token={tokens.add(store.database, _FIRST_TOKEN)}"
                print(f"sign in, this once: {url}", flush=True)
            else:
                print("sign in with a token; --add_token=NAME makes another")
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
