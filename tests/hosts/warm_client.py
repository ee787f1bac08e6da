"""Stands for `python -m trainer ...` where others start it: has a warm process do it, and is signalled in its place.

Run by path, as SOCKET ARGUMENTS...; knows nothing of the trainer. All but `[-u] -m trainer ...` is Python's as ever.
"""

import json
import os
import signal
import socket
import sys


def main() -> None:
    place, *arguments = sys.argv[1:]
    words = arguments[1:] if arguments[:1] == ["-u"] else arguments
    if words[:2] != ["-m", "trainer"]:
        os.execv(sys.executable, [sys.executable, *arguments])
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, lambda number, frame: server.send(bytes([number])))
        server.connect(place)
        wish = [words[2:], dict(os.environ), os.getcwd()]  # noqa: PTH109 - pathlib would take as long as all else
        socket.send_fds(server, [json.dumps(wish).encode()], [1, 2])
        code = int(server.recv(16) or b"1")
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


main()
