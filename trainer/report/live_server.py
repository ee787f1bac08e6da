"""The page of a run that is training, on this machine alone: it may be read and not changed."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.report.report_page import as_json, report_data, report_html

HOST = "127.0.0.1"
_SHARE = 0.1  # of a core's time that reading the records of a long run may take beside its training


class _Newest:
    """What the page shows, read anew when it is asked for, but not so often that the run would feel it."""

    def __init__(self, runs: Sequence[Path]) -> None:
        self._runs, self._lock, self._data, self._until = runs, threading.Lock(), dict[str, Any](), 0.0

    def data(self) -> dict[str, Any]:
        """Of now, or of as long ago as nine readings take."""
        with self._lock:
            begin = time.monotonic()
            if not self._data or begin >= self._until:
                self._data = report_data(self._runs)
                end = time.monotonic()
                self._until = end + (end - begin) * (1 / _SHARE - 1)
            return self._data


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes while it is answered is no error."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def make_server(runs: Sequence[Path], port: int) -> ThreadingHTTPServer:
    """A server of the page at `/` and of its data at `/data.json`; 0: any free port.

    Raises:
        UserError: the port is taken.
    """

    newest = _Newest(runs)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # A page of elsewhere whose name leads here must not read it.
            if self.headers.get("Host", "").partition(":")[0] not in (HOST, "localhost"):
                self.send_error(403)
            elif self.path == "/":
                self._answer("text/html", report_html(newest.data(), live=True))
            elif self.path == "/data.json":
                self._answer("application/json", as_json(newest.data()))
            else:
                self.send_error(404)

        def _answer(self, kind: str, text: str) -> None:
            body = text.encode()
            self.send_response(200)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: the terminal is somebody's."""

    try:
        return _Server((HOST, port), Handler)
    except OSError as error:
        raise UserError(f"--port {port}: {error.strerror}; give another, or 0 for any") from None
