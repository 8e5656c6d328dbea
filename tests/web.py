"""A web server on this machine, for the length of a block."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import HTTPServer, SimpleHTTPRequestHandler
from typing import Any


class Quiet(SimpleHTTPRequestHandler):
    """The files of a folder."""

    def log_message(self, *given: Any) -> None:
        return


@contextmanager
def serving(handler: Callable[..., Quiet]) -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
