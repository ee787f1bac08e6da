"""`sdxl-train init IMAGES`: a first configuration, by a look at the images and the machine."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.cli.first.first_config import Wanted, commented, first_config
from trainer.cli.first.found_images import look_at
from trainer.config.load import load_config
from trainer.errors import UserError
from trainer.measure.card_memory import card_bytes
from trainer.parallel.environment import detect_gpus

_EXAMPLES = """\
examples:
  sdxl-train init photos --model sdxl-base.safetensors
      asks what is to be trained, looks at the images and the cards, and writes photos.yaml
  sdxl-train init photos --model sdxl-base.safetensors --train lora -o fox.yaml
      a LoRA, without a question
  sdxl-train init photos --model sdxl-base.safetensors --train word --word "<my-cat>"
      a new word alone
  sdxl-train init photos --model sdxl-base.safetensors --train full --cards 4 --card-gib 24
      for another machine than this one

then: sdxl-train plan photos.yaml
"""
_AIMS: dict[str, str] = {"full": "all of the UNet", "lora": "a LoRA", "word": "a new word (textual inversion)"}
_GIB = 1 << 30


def main(argv: Sequence[str]) -> int:
    """Write a commented configuration for a folder of images, a model and the cards that are here."""
    parser = argparse.ArgumentParser(
        prog="sdxl-train init",
        description=main.__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("images", type=Path, metavar="IMAGES", help="a folder of images, tars or parquet files, ...")
    parser.add_argument(
        "--model", metavar="MODEL", help="a .safetensors file, a diffusers folder, or a name on the hub"
    )
    parser.add_argument("--train", choices=tuple(_AIMS), help="; ".join(f"{k}: {v}" for k, v in _AIMS.items()))
    parser.add_argument("--word", help="of --train word, such as <my-cat>")
    parser.add_argument("--resolution", type=int, default=1024, metavar="PX", help="side of a square (default: 1024)")
    parser.add_argument("--cards", type=int, metavar="N", help="default: those that are here")
    parser.add_argument(
        "--card-gib", type=float, metavar="GIB", help="memory of a card (default: of the smallest here)"
    )
    parser.add_argument("-o", "--out", type=Path, metavar="OUT", help="default: NAME_OF_IMAGES.yaml")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    arguments = parser.parse_args(argv)
    out = arguments.out or Path(f"{arguments.images.absolute().name.partition('.')[0] or 'mine'}.yaml")
    if out.exists() and not arguments.overwrite:
        raise UserError(f"{out}: exists; give another name with -o, or --overwrite")
    found = look_at(arguments.images)
    cards, card_gib = _cards(arguments)
    print(f"images: {found.told}")
    print(f"cards:  {f'{cards} of {card_gib:.0f} GiB' if cards else 'none; the CPU trains, slowly'}")
    aim: Any = arguments.train or _asked("--train", "what is to be trained", _AIMS, "lora")
    wanted = Wanted(
        aim=aim,
        model=arguments.model or _asked("--model", "the model (a file, a folder, or a name on the hub)"),
        images=found,
        run_dir=Path("runs") / out.stem,
        cards=cards,
        card_gib=card_gib,
        resolution=arguments.resolution,
        word=_word_of(arguments.word, aim),
    )
    where = f"{cards} card{'s' * (cards > 1)} of {card_gib:.0f} GiB" if cards else "the CPU"
    text = commented(
        first_config(wanted), str(out), f"{_AIMS[aim][:1].upper()}{_AIMS[aim][1:]} on {where}: {found.told}."
    )
    partial = out.with_name(f"{out.name}.tmp")
    try:
        partial.write_text(text, encoding="utf-8")
        load_config(partial, check_paths=False)
        partial.replace(out)
    except OSError as error:
        raise UserError(f"{out}: could not be written: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)
    print(f"wrote {out}; next: sdxl-train plan {out}")
    return 0


def _cards(arguments: argparse.Namespace) -> tuple[int, float]:
    """(how many, GiB of the smallest)."""
    gpus = detect_gpus() if arguments.cards is None or arguments.card_gib is None else []
    cards = len(gpus) if arguments.cards is None else arguments.cards
    if cards < 0 or (arguments.card_gib is not None and arguments.card_gib < 4):
        raise UserError("--cards and --card-gib: must be 0 or more cards, of 4 GiB or more")
    here = card_bytes(gpus) if gpus else None
    return cards, arguments.card_gib or (here / _GIB if here else 24.0)


def _word_of(word: str | None, aim: str) -> str:
    if aim != "word":
        if word:
            raise UserError("--word: belongs to --train word")
        return ""
    return word or _asked("--word", "the word, such as <my-cat>")


def _asked(option: str, what: str, choices: Mapping[str, str] = {}, default: str = "") -> str:
    """The answer of whoever sits there.

    Raises:
        UserError: nobody does, or they would not say.
    """
    if not sys.stdin.isatty():
        raise UserError(f"{option}: missing, and there is nobody to ask for {what}")
    for name, text in choices.items():
        print(f"  {name:<5} {text}")
    for _ in range(3):
        answer = input(f"{what}{f' [{default}]' if default else ''}: ").strip() or default
        if answer and (not choices or answer in choices):
            return answer
    raise UserError(f"no answer to: {what}")
