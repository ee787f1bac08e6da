"""`sdxl-train report RUN`: a page with curves, samples, events and settings of a run."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.errors import UserError

if TYPE_CHECKING:
    from trainer.report.data_facts import DataLook
    from trainer.report.report_page import RunReport

_EXAMPLES = """\
examples:
  sdxl-train report runs/foxes
      writes runs/foxes/report.html: one file, to open in a browser or to send
  sdxl-train report runs/foxes runs/foxes-before -o compared.html
      the curves of both, and which settings differ
  sdxl-train report runs/foxes --live
      serves it while the run trains, on this machine alone, updating itself; Ctrl-C ends it
"""
_PORT = 6207


def main(argv: Sequence[str]) -> int:
    """Write a page about a run that opens without a network: loss, speed, memory, samples, events, settings."""
    parser = argparse.ArgumentParser(
        prog="sdxl-train report",
        description=main.__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories; the first one in full")
    parser.add_argument("-o", "--out", type=Path, metavar="OUT", help="the page (default: report.html in the first)")
    parser.add_argument("--live", action="store_true", help="serve it on 127.0.0.1 in place of writing it")
    parser.add_argument("--port", type=int, default=_PORT, help=f"of --live (default: {_PORT})")
    arguments = parser.parse_args(argv)
    from trainer.report.report_page import RunReport, report_html

    report = RunReport(arguments.runs, _look_at_data)
    if arguments.live:
        return _serve(report, arguments.port)
    out = arguments.out or arguments.runs[0] / "report.html"
    text = report_html(report.data())
    try:
        partial = out.with_name(f"{out.name}.tmp")
        partial.write_text(text, encoding="utf-8")
        partial.replace(out)
    except OSError as error:
        raise UserError(f"{out}: could not be written: {error.strerror}") from None
    size = f"{len(text) / 1e6:.1f} MB" if len(text) >= 1e6 else f"{len(text) / 1e3:.0f} KB"
    print(f"wrote {out} ({size}); open it in a browser")
    return 0


def _look_at_data(run_dir: Path) -> "DataLook":
    """The data set that the run was told to train on, with its captions as the run composes them."""
    from trainer.cli.text_lengths import text_measure_or_characters
    from trainer.config.load import load_config
    from trainer.report.data_facts import DataLook
    from trainer.report.run_settings import CONFIG
    from trainer.train.caption_rules import caption_rules

    config = load_config(run_dir / CONFIG, check_paths=False)
    measure = text_measure_or_characters(config.model.path, config.model.tokenizer, config.captions.max_tokens)
    return DataLook(config.data.prepared, caption_rules(config), measure)


def _serve(report: "RunReport", port: int) -> int:
    from trainer.report.live_server import HOST, make_server

    if not 0 <= port < 1 << 16:
        raise UserError(f"--port {port}: must be from 0 to 65535")
    with make_server(report, port) as server:
        print(f"http://{HOST}:{server.server_address[1]}  (Ctrl-C ends it; the run is not touched)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0
