"""What `data browse` gathers and writes: rows, pictures, twins, lists; everything of the data stands there as text."""

import base64
import hashlib
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from tests.data.photographs import astronaut, coffee
from tests.data.small_set import write_small_set
from tests.data.survey.browsed_set import BrowsedSet, write_browsed_set
from trainer.cli.main import main
from trainer.data.buckets import Bucket, BucketRules, make_buckets, place
from trainer.data.captions import caption_record
from trainer.data.images import BadImage, load_pixels, load_reduced
from trainer.data.loss_weights import TagSeparators
from trainer.data.store.snapshot import PreparedSet
from trainer.data.survey.browse.chosen_rows import choose_rows
from trainer.data.survey.browse.left_out_list import left_out_by_reason
from trainer.data.survey.browse.look_alikes import near_duplicates
from trainer.data.survey.browse.page_parts import histogram, percent, round_up, short_count
from trainer.data.survey.browse.tag_facts import tag_facts
from trainer.data.survey.browse.thumbnails import LEAST_PX, rgb_of_latents, thumbnail_of_image

SQUARE, TALL = Bucket(64, 64), Bucket(128, 64)


@pytest.fixture(scope="module")
def browsed(tmp_path_factory: pytest.TempPathFactory) -> BrowsedSet:
    return write_browsed_set(tmp_path_factory.mktemp("browsed"))


class _Parsed(HTMLParser):
    """The elements of a page with their attributes, and the text outside script and style."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.raw: dict[str, str] = {}
        self._inside = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag if tag in ("script", "style") else ""

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.raw[self._inside] = self.raw.get(self._inside, "") + data
        else:
            self.texts.append(data)


def test_every_bucket_and_source_gets_its_turn(tmp_path: Path) -> None:
    prepared = PreparedSet.open(write_small_set(tmp_path / "prepared", {SQUARE: 30, TALL: 3}))
    chosen = choose_rows(prepared, 10)
    assert [row.bucket_index for row in chosen] == [0] * 7 + [1] * 3
    assert [row.row for row in chosen] == [0, 4, 9, 14, 19, 24, 29, 0, 1, 2]
    assert len(choose_rows(prepared, 1000)) == 33 and not choose_rows(prepared, 0)


def test_twins_are_those_that_a_comparison_of_all_pairs_finds() -> None:
    random = np.random.default_rng(0)
    prints: list[int | None] = [int(n) for n in random.integers(0, 1 << 63, 700)]
    prints[3] = None
    for original, twin, bits in ((5, 650, 0b111), (650, 20, 0b111 << 40), (100, 101, 0), (200, 300, (1 << 7) - 1)):
        prints[twin] = (prints[original] or 0) ^ bits
    assert near_duplicates(prints) == [[5, 20, 650], [100, 101]]  # seven bits are one too many
    assert near_duplicates([]) == [] and near_duplicates([None, 4]) == []


@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_the_picture_is_what_the_model_sees(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    coffee().resize((1800, 1000)).save(tmp_path / "a.jpg", exif=exif, quality=95)
    original_hw = (1800, 1000) if orientation in (6, 7) else (1000, 1800)
    placement = place(original_hw, make_buckets(512, 256, 1024, 64)[8:9], BucketRules())
    assert placement.resized_hw != (placement.bucket.height_px, placement.bucket.width_px)
    reduced = load_reduced(tmp_path / "a.jpg", original_hw, LEAST_PX)
    assert min(reduced.size) >= LEAST_PX and max(reduced.size) < 1800
    thumbnail = thumbnail_of_image(reduced, original_hw, placement)
    exact = Image.fromarray(load_pixels(tmp_path / "a.jpg", original_hw, placement))
    shown = np.asarray(Image.open(io.BytesIO(thumbnail.crop)).convert("RGB"), dtype=float)
    wanted = np.asarray(exact.resize(thumbnail.crop_wh, Image.Resampling.LANCZOS), dtype=float)
    assert np.abs(shown - wanted).mean() < 6
    assert thumbnail.box is not None and thumbnail.whole is not None
    _, _, width, height = thumbnail.box
    assert width * height == pytest.approx(
        placement.bucket.height_px * placement.bucket.width_px / np.prod(placement.resized_hw), rel=1e-3
    )
    with pytest.raises(BadImage, match="when it was listed"):
        load_reduced(tmp_path / "a.jpg", (5, 5), LEAST_PX)


def test_pictures_look_alike_after_other_sizes_and_qualities_and_others_do_not() -> None:
    placement = place((512, 512), (Bucket(512, 512),), BucketRules())
    first = thumbnail_of_image(astronaut(), (512, 512), placement).fingerprint
    file = io.BytesIO()
    astronaut().resize((256, 256)).save(file, "JPEG", quality=40)
    again = thumbnail_of_image(Image.open(file).resize((512, 512)), (512, 512), placement).fingerprint
    other = thumbnail_of_image(coffee().resize((512, 512)), (512, 512), placement).fingerprint
    assert near_duplicates([first, again, other]) == [[0, 1]]


def test_latents_become_colours_channel_by_channel() -> None:
    latents = np.zeros((4, 2, 3), dtype=np.float16)
    latents[0, 1, 2], latents[1, 0, 0], latents[3, 0, 1] = 1, 1, np.nan
    picture = np.asarray(rgb_of_latents(latents, 0.5))
    assert picture.shape == (2, 3, 3)
    assert picture[1, 0].tolist() == picture[0, 1].tolist() == [150, 140, 130]
    assert picture[1, 2].tolist() == [180, 170, 160] and picture[0, 0].tolist() == [120, 137, 135]


def test_both_lists_of_what_was_left_out(tmp_path: Path) -> None:
    lines = [json.dumps({"path": f"/a/{n}.jpg", "key": f"a/{n}", "reason": f"is {n} px"}) for n in range(5)]
    lines += ["null", "[" * 100_000, "x" * (3 << 20)]
    lines += [
        json.dumps({"path": "/b", "key": "", "reason": f"{chr(97 + n % 26) * (1 + n // 26)}"}) for n in range(300)
    ]
    (tmp_path / "bad.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "left-out.jsonl").write_text(json.dumps({"path": "/c", "key": "c\u202e", "reason": "is too dark"}))
    found = {(part.file, part.reason): part for part in left_out_by_reason(tmp_path)}
    assert found["bad.jsonl", "is N px"].images == 5
    assert found["bad.jsonl", "is N px"].examples == ("a/0", "a/1", "a/2")
    assert found["bad.jsonl", "(a line that cannot be read)"].images == 3
    assert found["left-out.jsonl", "is too dark"].examples == (r"c\u202e",)
    assert len(found) == 202 and sum(part.images for part in found.values()) == 309
    assert left_out_by_reason(tmp_path / "none") == []


def test_tags_of_all_or_of_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_small_set(
        tmp_path / "prepared", {SQUARE: 30}, record=lambda i: caption_record(tags=f"all, tag {i}" if i % 3 else "")
    )
    prepared = PreparedSet.open(root)
    told: list[int] = []
    monkeypatch.setattr("trainer.data.survey.browse.tag_facts.COUNTED_IMAGES", 10)
    sampled = tag_facts(prepared, TagSeparators(), lambda what, done, total: told.append(done))
    assert sum(told) == 30 and sampled.is_sample
    monkeypatch.undo()
    whole = tag_facts(prepared, TagSeparators(), lambda *_: None)
    assert (whole.tagged, whole.looked_at, whole.is_sample) == (20, 30, False)
    assert (sampled.different, sampled.top, sampled.few) == (whole.different, whole.top, whole.few)
    assert whole.top[0] == ("all", 20) and len(whole.top) == 11 and len(whole.rare) == 10
    assert not {*whole.top} & {*whole.rare} and whole.few == [(1, 20), (2, 20), (5, 20), (10, 20), (50, 21)]


def test_axes_have_round_numbers() -> None:
    assert [round_up(n) for n in (0, 1, 1.1, 3, 70, 12_400_000)] == [1, 1, 1.2, 3, 80, 15_000_000]
    assert [short_count(n) for n in (0, 7, 950, 12_400, 12_400_000)] == ["0", "7", "950", "12.4k", "12.4M"]
    assert [percent(0, 0), percent(1, 10**6), percent(1, 8)] == ["0.0 %", "< 0.1 %", "12.5 %"]
    drawn = histogram(np.array([0, 10, 80, 5000] + [20] * 1000), "tokens", 75)
    assert "beyond" in drawn and "75 used" in drawn and drawn.count("<rect") < 40 and "or more tokens" in drawn


def test_the_page_of_hostile_texts_is_markup_of_our_own_alone(browsed: BrowsedSet) -> None:
    out = browsed.root / "page.html"
    assert main(["data", "browse", str(browsed.config), "--out", str(out)]) == 0
    html = out.read_text(encoding="utf-8")
    page = _Parsed(html)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == tags.count("style") == 1
    assert not {"b", "i", "u", "iframe", "object"} & {*tags}
    assert tags.count("form") == 1 and tags.count("li") == 41 + html.count('<ul class="twins">')
    names = {name for _, attributes in page.elements for name in attributes}
    assert not {name for name in names if name.startswith("on") or name == "style"}
    urls = [v for _, a in page.elements for k, v in a.items() if k in ("src", "href", "action") and v]
    assert all(url.startswith(("data:image/webp;base64,", "data:,", "#")) for url in urls)
    text = "".join(page.texts)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]", html)
    assert "</script><script>alert(1)</script><img src=x onerror=alert(2)>" in text
    assert "{{script}} {{policy}}" in text and "العربية" in text and r"\u202eto left" in text
    assert '<u onclick="alert(4)">' in text and "</table><script>alert(N)</script> N" in text
    assert "photos/<b>&'bold'" in text and "<i>y</i>" in text
    policy = next(a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:;")
    for part in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(page.raw[part].encode()).digest()).decode()
        assert f"{part}-src 'sha256-{digest}'" in policy


def test_the_page_tells_the_set(browsed: BrowsedSet, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "browse", str(browsed.config)]) == 0
    out = browsed.prepared / "browse.html"
    assert capsys.readouterr().out == f"{out} ({out.stat().st_size / 1e6:.1f} MB, 41 pictures)\n"
    html = out.read_text(encoding="utf-8")
    text = re.sub(r"\s+", " ", " ".join(_Parsed(html).texts))
    assert "All 41 training images" in text and "52 seen in an epoch" in text
    assert "characters" in text  # the config's model is not there
    assert "3 left out" in text and "is not an image of a known kind" in text
    twins = html.partition('<ul class="twins">')[2].partition("</ul>")[0]
    assert "photos/crop-0-007" in twins and "tagged/twin" in twins
    assert main(["data", "browse", str(browsed.config)]) == 0
    assert out.read_text(encoding="utf-8") == html  # nothing in it is random, or of this moment


def test_without_the_images_it_shows_what_the_latents_hold(browsed: BrowsedSet, tmp_path: Path) -> None:
    moved = tmp_path / "prepared"
    shutil.copytree(browsed.prepared, moved)
    (moved / "catalog.sqlite").unlink()
    assert main(["data", "browse", str(moved), "--images", "7"]) == 0
    text = " ".join(_Parsed((moved / "browse.html").read_text(encoding="utf-8")).texts)
    assert "A sample: 7 of 41 images" in text and "7 pictures are made of the latents" in text
    assert "there is no catalogue that tells where its file is" in text
    for shard in moved.glob("shards/*/*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-100])
    assert main(["data", "browse", str(moved)]) == 0
    assert "No caption can be read." in (moved / "browse.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--images", "-1"], "--images -1: must be from 0 to 5000"),
        (["--out", "/no/such/folder/page.html"], "there is no folder /no/such/folder"),
        (["--out", "/"], "--out /: is a folder"),
        (["--model", "/no/model"], "/no/model"),
        (["captions.usee=tags"], "use"),
    ],
)
def test_mistakes_are_one_line(
    browsed: BrowsedSet, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "browse", str(browsed.config), *arguments]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_actions_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data"]) == 2 and main(["data", "--help"]) == 0
    assert main(["data", "brwose", "x"]) == 2
    assert "did you mean `data browse`?" in capsys.readouterr().err
