"""Measured values in the sentences of pages come from committed records."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from optex.studies.values import fill_values, read_value

ROOT = Path(__file__).resolve().parents[1]
RECORD = {
    "share": 0.418,
    "seeds": [3, 5],
    "checks": [
        {"name": "cosine", "measured": "0.99 and 1,200; −3.5e-2"},
        {"name": "coordinates", "measured": "5"},
        {"name": "rounds", "measured": "33, 68, 1,204; 2"},
        {"name": "twice", "measured": "1"},
        {"name": "twice", "measured": "2"},
    ],
}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("share", 0.418),
        ("seeds/1", 5),
        ("seeds/-1", 5),
        ("checks/0/name", "cosine"),
        ("checks/cos/measured/1", "1,200"),
        ("checks/cos/measured/2", "−3.5e-2"),
        ("checks/coordinates/measured", "5"),
        ("checks/rounds/measured/0", "33"),
        ("checks/rounds/measured/2", "1,204"),
        ("checks/-1/measured", "2"),
    ],
)
def test_a_path_finds_its_value(path, value):
    assert read_value(RECORD, path) == value


@pytest.mark.parametrize(
    "path",
    [
        "missing",
        "seeds/2",
        "checks/co/measured",
        "checks/sine",
        "checks/cos/measured/3",
        "checks/twice/measured",
    ],
)
def test_a_path_to_nothing_or_to_several_is_refused(path):
    with pytest.raises(LookupError, match="exactly one"):
        read_value(RECORD, path)


@pytest.fixture
def records(tmp_path):
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "run.json").write_text(json.dumps(RECORD))
    return tmp_path


def test_every_place_is_filled_and_the_words_between_are_kept(records):
    page = (
        "A <!-- value:some/run#share | .2f -->{}<!-- end -->, <!-- value:some/run#seeds/0 -->{}<!-- end -->.\n"
    )
    filled = fill_values(page.format(9, "\n9"), records)
    assert filled == page.format("0.42", 3)
    assert fill_values(filled, records) == filled


def test_a_record_made_anew_is_read_anew(records):
    page = "<!-- value:some/run#share -->0.418<!-- end -->"
    assert fill_values(page, records) == page
    (records / "some" / "run.json").write_text('{"share": 0.5000001}')
    assert "0.5000001" in fill_values(page, records)


@pytest.mark.parametrize(
    "place", ["other/run#share", "some/run#shares", "some/run#share | d", "some/run#checks | .2f"]
)
def test_a_place_that_cannot_be_filled_is_named(records, place):
    with pytest.raises(ValueError, match=place.split(" ")[0].replace("#", ".json#")):
        fill_values(f"<!-- value:{place} -->9<!-- end -->", records)


def test_the_pages_say_what_the_records_say():
    check = subprocess.run(
        [sys.executable, "benchmarks/pages.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (check.returncode, check.stdout, check.stderr) == (0, "", "")
