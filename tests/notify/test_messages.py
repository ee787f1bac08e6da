"""Messages over a real server, by real commands, and what happens when nobody takes them."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer.config.load import load_config, to_yaml
from trainer.config.sections.notify_config import NotifyConfig
from trainer.errors import UserError
from trainer.notify.message import Message
from trainer.notify.messenger import Messenger
from trainer.notify.ways import NotSent, post, run_command, secret_environment

SECRET = "T0123456/B0123456/abcdefghijklmnop"


@dataclass
class Hook:
    """A server that takes posts."""

    url: str
    got: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)  # those to give first; 0: none for a while


@pytest.fixture
def hook() -> Iterator[Hook]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            taken.got.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            code = taken.answers.pop(0) if taken.answers else 200
            if code == 0:
                time.sleep(1.5)
                return
            self.send_response(code)
            if code == 302:
                self.send_header("Location", f"/elsewhere/{SECRET}")
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        taken = Hook(f"http://127.0.0.1:{server.server_port}/services/{SECRET}")
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield taken
        server.shutdown()
        thread.join()


MESSAGE = Message("fault", "fox", "rig", "worker 1 <died> & more", 1.5, 7)


def test_each_service_gets_what_it_reads(hook: Hook) -> None:
    for kind in ("json", "slack", "discord", "ntfy"):
        post(MESSAGE, hook.url, kind)
    plain, slack, discord, ntfy = (body for _, body in hook.got)
    assert plain == {"event": "fault", "run": "fox", "host": "rig", "text": MESSAGE.text, "time_s": 1.5, "step": 7}
    assert slack == {"text": "! fox on rig: worker 1 &lt;died&gt; &amp; more"}
    assert discord == {"content": "! fox on rig: worker 1 <died> & more", "allowed_mentions": {"parse": []}}
    assert ntfy["topic"] == "abcdefghijklmnop" and ntfy["title"] == "fox: fault" and ntfy["priority"] == 4
    assert [path for path, _ in hook.got][-1] == "/services/T0123456/B0123456/"


def test_addresses_of_variables_and_files(hook: Hook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_HOOK", hook.url)
    (tmp_path / "hook").write_text(hook.url + "\n")
    post(MESSAGE, "env:MY_HOOK", "json")
    post(MESSAGE, f"file:{tmp_path / 'hook'}", "json")
    assert len(hook.got) == 2
    with pytest.raises(NotSent, match=r"^the variable NO_SUCH is not set$"):
        post(MESSAGE, "env:NO_SUCH", "json")
    with pytest.raises(NotSent, match=r"^its file cannot be read: No such file or directory$"):
        post(MESSAGE, f"file:{tmp_path / 'none'}", "json")


def messages_of(config: dict[str, Any]) -> tuple[Messenger, list[str]]:
    warned: list[str] = []
    return Messenger(NotifyConfig.model_validate(config), "fox", warned.append), warned


def test_only_what_is_wished_is_sent_and_at_once(hook: Hook) -> None:
    messenger, warned = messages_of({"webhook": hook.url, "on": ["stall", "restart"]})
    with messenger:
        messenger.tell(("start",), "begins")
        messenger.tell(("stall", "fault", "restart"), "worker 1 does not move")
        messenger.tell(("fault", "restart"), "worker 1 has died")
    assert [(body["event"], body["text"]) for _, body in hook.got] == [
        ("stall", "worker 1 does not move"),
        ("restart", "worker 1 has died"),
    ]
    assert not warned


@pytest.mark.parametrize(
    ("answers", "posts", "reason"),
    [
        ([500, 200], 2, ""),
        ([500, 503], 2, "the answer is 503 Service Unavailable"),
        ([302, 302], 2, "the answer is 302 Found"),
    ],
)
def test_one_more_try_and_then_a_counted_warning(hook: Hook, answers: list[int], posts: int, reason: str) -> None:
    hook.answers = answers
    messenger, warned = messages_of({"webhook": hook.url})
    with messenger:
        messenger.tell(("finish",), "done")
    assert len(hook.got) == posts
    expected = [f"notify.webhook: a message was not sent ({reason}), 1 by now; the run goes on"] if reason else []
    assert warned == expected


def test_a_server_that_is_silent_or_gone_costs_a_line_without_the_address(hook: Hook) -> None:
    hook.answers = [0]
    begin = time.monotonic()
    with pytest.raises(NotSent) as told:
        post(MESSAGE, hook.url, "json", timeout_s=0.5)
    assert time.monotonic() - begin < 5 and "timed out" in str(told.value)
    gone = f"http://127.0.0.1:9/services/{SECRET}"
    with pytest.raises(NotSent) as told:
        post(MESSAGE, gone, "json")
    assert "refused" in str(told.value) and "T0123456" not in str(told.value)
    with pytest.raises(NotSent) as told:
        post(MESSAGE, f"http://127.0.0.1:1/a\x00b{SECRET}", "json")
    assert "abcdefghijklmnop" not in str(told.value)


def test_who_waits_in_vain_holds_up_nobody(hook: Hook, monkeypatch: pytest.MonkeyPatch) -> None:
    hook.answers = [0] * 80
    monkeypatch.setattr(Messenger, "END_S", 0.5)
    messenger, warned = messages_of({"webhook": hook.url})
    begin = time.monotonic()
    for number in range(50):
        messenger.tell(("fault",), f"fault {number}")
    assert time.monotonic() - begin < 1
    assert warned[-1].startswith("notify.on: a message was not sent (32 others wait)")
    messenger.close()
    assert time.monotonic() - begin < 5


def test_a_command_gets_the_message_and_no_shell(tmp_path: Path) -> None:
    script = "import os, sys; open(sys.argv[1], 'w').write(sys.stdin.read() + os.environ['SDXL_TRAIN_EVENT'])"
    run_command(MESSAGE, [sys.executable, "-c", script, str(tmp_path / "got; $(x)")])
    text = (tmp_path / "got; $(x)").read_text()
    assert json.loads(text.splitlines()[0])["text"] == MESSAGE.text and text.endswith("\nfault")
    with pytest.raises(NotSent, match=r"^its exit code is 3$"):
        run_command(MESSAGE, [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(NotSent, match=r"^/no/such: No such file or directory$"):
        run_command(MESSAGE, ["/no/such"])
    begin = time.monotonic()
    with pytest.raises(NotSent, match=r"^takes longer than 1 s$"):
        run_command(MESSAGE, ["sh", "-c", "sleep 60 & sleep 60"], timeout_s=1)
    assert time.monotonic() - begin < 10


def config_with(tmp_path: Path, notify: object) -> Path:
    rest = {"run": {"dir": "runs/x"}, "model": {"path": "m"}, "train": {"steps": 1}, "optimizer": {"lr": 1e-6}}
    rest["data"] = {"sources": [{"path": "photos"}], "prepared": "p"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(rest | {"notify": notify}))
    return tmp_path / "config.yaml"


def test_the_address_is_written_nowhere(tmp_path: Path) -> None:
    url = f"https://hooks.example/{SECRET}"
    config = load_config(config_with(tmp_path, {"webhook": url}), check_paths=False)
    assert SECRET not in to_yaml(config) + config.model_dump_json() + str(config.model_dump())
    assert secret_environment(config.notify) == {"SDXL_TRAIN_WEBHOOK": url}
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    again = load_config(tmp_path / "again.yaml", check_paths=False)
    assert again.notify.webhook == "env:SDXL_TRAIN_WEBHOOK" and not secret_environment(again.notify)


@pytest.mark.parametrize(
    ("notify", "said"),
    [
        ({"webhook": f"ftp://hooks.example/{SECRET}"}, "notify.webhook: must be an address that begins with https://"),
        (f"https://hooks.example/{SECRET}", "notify: must be a section"),
        ({"format": "slack"}, "notify.format = slack: has no effect; give notify.webhook"),
        ({"on": ["start"]}, "has no effect; give notify.webhook or notify.command"),
        ({"command": ["true"], "on": ["samples"]}, "samples are never drawn"),
        ({"command": ["true"], "on": ["fault", "fault"]}, "names fault twice"),
        ({"command": ["true"], "on": []}, "notify.on: is empty"),
    ],
)
def test_mistakes_are_a_line_without_the_address(tmp_path: Path, notify: object, said: str) -> None:
    with pytest.raises(UserError) as told:
        load_config(config_with(tmp_path, notify), check_paths=False)
    assert said in str(told.value) and "abcdefgh" not in str(told.value)


def test_an_override_with_an_address_is_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(UserError) as told:
        load_config(config_with(tmp_path, {}), [f"notify.webhook=gopher://x/{SECRET}"], check_paths=False)
    assert "override 'notify.webhook'" in str(told.value) and "abcdefgh" not in str(told.value)
