"""How long does the History tab wait for a page of 60 pictures out of 100,000?"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from modules.history.index import HistoryIndex, PictureFacts, Question
from tools.measure import Bench, Variant

NUM_PICTURES = 100_000
PAGE = 60
FIRST_SECOND = 1_700_000_000
_WORDS = ("portrait", "castle", "forest", "cat", "robot", "watercolor", "night", "sunset", "city", "mountain", "river", "knight", "dragon", "teapot")


def _filled_index() -> HistoryIndex:
    """Infotexts of the usual length, over two years of daily folders; every hundredth picture has a star."""
    index, choose = HistoryIndex(Path(tempfile.mkdtemp()) / "history.sqlite3"), random.Random(0)
    batch: list[PictureFacts] = []
    for number in range(NUM_PICTURES):
        words = ", ".join(choose.choices(_WORDS, k=12))
        rest = f"Steps: 20, Sampler: Euler a, Schedule type: Automatic, CFG scale: 7, Seed: {choose.getrandbits(32)}, Size: 512x512, Model: demo"
        infotext = f"{words}\nNegative prompt: blurry, low quality\n{rest}" + (", unicorn" if number % 1000 == 7 else "")
        path = f"{'txt2img' if number % 3 else 'img2img'}-images/day-{number // 140:03d}/{number:05d}-{choose.getrandbits(32)}.png"
        second = FIRST_SECOND + 600 * number
        batch.append(PictureFacts(path=path, mtime_ns=second * 10**9, num_bytes=400_000, width=512, height=512, infotext=infotext))
    index.put(batch)
    for number in range(0, NUM_PICTURES, 100):
        index.set_star((FIRST_SECOND + 600 * number) * 10**6, True)
    return index


def _ask(index: HistoryIndex, question: Question, offset: int) -> None:
    """What one request of the tab asks: a page, the number of pictures, the folders."""
    found = index.page(question, offset, PAGE)
    total = index.count(question)
    index.main_folders()
    assert len(found) == min(PAGE, total - offset)


def _make_variants() -> Mapping[str, Variant]:
    index = _filled_index()
    questions = {
        "first page": (Question(), 0),
        "last page": (Question(), NUM_PICTURES - PAGE),
        "a rare word": (Question(text="unicorn"), 0),
        "three words": (Question(text="dragon teapot castle"), 0),
        "a word that all have": (Question(text="steps"), 0),
        "its last page": (Question(text="steps"), NUM_PICTURES - PAGE),
        "the beginning of a word, not another": (Question(text="cas -robot"), 0),
        "with a star": (Question(only_stars=True), 0),
        "with a star and a word that all have": (Question(text="steps", only_stars=True), 0),
        "one folder and a word that all have": (Question(text="steps", folder="img2img-images"), 0),
        "oldest first": (Question(oldest_first=True), 5000),
    }
    return {name: partial(_ask, index, *asked) for name, asked in questions.items()}


BENCH = Bench(
    question=f"How long does the History tab wait for a page of {PAGE} pictures out of {NUM_PICTURES:,}? Asked for: below 0.1 s.",
    make_variants=_make_variants,
    baseline="first page",
    num_rounds=9,
    packages=("numpy",),
)
