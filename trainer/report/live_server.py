"""The page of a run that is training, on this machine alone: it may be read and not changed."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from trainer.errors import UserError
from trainer.report.report_page import RunReport, as_json, report_html, without_samples

HOST = "127.0.0.1"
_SHARE = 0.1  # of a core's time that reading the records of a long run may take beside its training


class _Newest:
    """What the page shows, brought up to date when it is asked for, but not so often that the run would feel it."""

    def __init__(self, report: RunReport) -> None:
        self._report, self._lock, self._data, self._until = report, threading.Lock(), report.data(), 0.0

    def data(self) -> dict[str, Any]:
        """Of now, or of as long ago as nine readings take; of before, while the run's files are not there."""
        with self._lock:
            begin = time.monotonic()
            if begin >= self._until:
                with suppress(UserError):
                    self._data = self._report.data()
                end = time.monotonic()
                self._until = end + (end - begin) * (1 / _SHARE - 1)
            return self._data


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes while it is answered is no error."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def make_server(report: RunReport, port: int) -> ThreadingHTTPServer:
    """A server of the page at `/` and of its data at `/data.json`; 0: any free port.

    Raises:
        UserError: the port is taken, or a run has no records yet.
    """
    newest = _Newest(report)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path, _, key = self.path.partition("?")
            # A page of elsewhere whose name leads here must not read it.
            if self.headers.get("Host", "").partition(":")[0] not in (HOST, "localhost"):
                self.send_error(403)
            elif path == "/":
                self._answer("text/html", report_html(newest.data(), live=True))
            elif path == "/data.json":
                self._answer("application/json", as_json(without_samples(newest.data(), key.removeprefix("samples="))))
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
