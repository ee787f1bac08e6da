"""`sdxl-train data browse`: a prepared data set as one page."""

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

from trainer.cli.run_target import add_prepared_target
from trainer.cli.text_lengths import text_measure, text_measure_or_characters
from trainer.config.load import load_config
from trainer.data.captions import PLAIN
from trainer.data.catalog.settings import replace_file
from trainer.data.images import pillow_rules
from trainer.data.loss_weights import TagSeparators
from trainer.data.store.snapshot import PreparedSet
from trainer.data.survey.browse.browse_page import page_html
from trainer.data.survey.browse.page_facts import page_facts
from trainer.errors import UserError, printable
from trainer.train.caption_rules import caption_rules, tag_separators

PAGE = "browse.html"
_IMAGES, _MOST_IMAGES = 240, 5000


def browse(argv: Sequence[str]) -> int:
    """Write a page with the buckets, sources, captions and tags of a prepared data set, what was left out, a gallery
    as the model sees it, and images that look alike. It is one file and needs no network."""
    parser = argparse.ArgumentParser(
        prog="sdxl-train data browse",
        description=browse.__doc__,
        epilog="example: sdxl-train data browse configs/4x3090.yaml",
    )
    add_prepared_target(parser)
    parser.add_argument("--out", type=Path, metavar="HTML", help=f"the page (default: PREPARED_DIR/{PAGE})")
    parser.add_argument(
        "--images", type=int, default=_IMAGES, metavar="N", help=f"in the gallery; 15 KB each (default: {_IMAGES})"
    )
    parser.add_argument("--model", type=Path, help="model folder with the tokenizers (default: the config's)")
    arguments = parser.parse_intermixed_args(argv)
    if not 0 <= arguments.images <= _MOST_IMAGES:
        raise UserError(f"--images {arguments.images}: must be from 0 to {_MOST_IMAGES}")
    target: Path = arguments.target
    rules, separators, measure = PLAIN, TagSeparators(), text_measure(None, None)
    if target.is_dir():
        if arguments.overrides:
            raise UserError(f"{arguments.overrides[0]}: only a config has values to replace; {target} is a folder")
        path = target
        if arguments.model:
            measure = text_measure(arguments.model, None)
    else:
        config = load_config(target, arguments.overrides, check_paths=False)
        path, rules, separators = config.data.prepared, caption_rules(config), tag_separators(config)
        used = config.captions.max_tokens
        if arguments.model:
            measure = text_measure(arguments.model, None, used)
        else:
            measure = text_measure_or_characters(config.model.path, config.model.tokenizer, used)
    prepared = PreparedSet.open(path)
    out: Path = arguments.out or prepared.path / PAGE
    if out.is_dir() or not out.absolute().parent.is_dir():
        reason = "is a folder; give a file" if out.is_dir() else f"there is no folder {out.absolute().parent}"
        raise UserError(f"--out {out}: {reason}")
    with _Bars() as bars, pillow_rules():
        facts = page_facts(prepared, rules, separators, measure, arguments.images, bars.report)
    replace_file(out, page_html(facts))
    print(f"{printable(str(out), 4096)} ({out.stat().st_size / 1e6:.1f} MB, {len(facts.gallery)} pictures)")
    return 0


class _Bars:
    """A progress bar for what is under way."""

    def __init__(self) -> None:
        self._stack, self._what, self._bar = ExitStack(), "", None

    def __enter__(self) -> "_Bars":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def report(self, what: str, done: int, total: int) -> None:
        """So many more of it are done."""
        if what != self._what or self._bar is None:
            self._stack.close()
            self._what = what
            self._bar = self._stack.enter_context(tqdm(desc=what, total=total, unit="img", disable=None, leave=False))
        self._bar.update(done)
