"""The page of a comparison: what stands in it, and that a browser draws it."""

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from optex.studies.baselines import Trace
from optex.studies.cli.table import Result
from optex.studies.comparison import Run
from optex.studies.html import check_page_path, html_page, readable_on_dark
from optex.studies.plots import METHOD_STYLES

HOSTILE = '</script><img src=x onerror=alert(1)> & "two" {{data}} \u2028'
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def made_up(method, loss, seed=0, problem="sphere", stopped=None, rounds=2):
    length = len(loss)
    trace = Trace(
        loss=list(loss),
        gradients=[3 * i for i in range(length)],
        seconds=[0.125 * i for i in range(length)],
        accepted=[0] + [1] * (length - 1),
        lr=0.1,
        overhead_seconds=math.nan,
        stopped=stopped,
    )
    return Run(problem, method, "adam", 0.1, 3, seed, rounds, trace)


RUNS = [
    made_up("vanilla", [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0], seed=0),
    made_up("vanilla", [4.0, 2.0, 1.0, 0.5, 0.4, 0.3, 0.2], seed=1),
    made_up("optex", [9.0, 4.0, 1.0], seed=0),
    made_up("optex", [4.0, 1.0, 1.0], seed=1),
    made_up("hold-last", [9.0, math.nan, math.nan], seed=0, stopped="not finite"),
    made_up("hold-last", [4.0, 3.0, 2.0], seed=1),
    made_up("vanilla", [1.0, 0.5, 0.25], problem=HOSTILE),
]
META = {
    "optex": "0.1.0",
    "cpu": HOSTILE,
    "command": ["optex", "compare", HOSTILE],
    "minimum": {"sphere": 0.0, HOSTILE: None},
    "options": {"problems": ["sphere", HOSTILE], "lr": 0.1, "history_size": None},
}
TOLD = Result(
    heading=f"adam {HOSTILE}",
    headers=("method", "final\nloss"),
    tables=[(f"sphere {HOSTILE}", [("vanilla", "1.6 ± 2"), ("optex", "1 ± 0")])],
    notes=[HOSTILE],
)


class Outline(HTMLParser):
    """Elements with their attributes, and the text within each kind."""

    VOID = ("meta", "link", "input", "br", "img")

    def __init__(self, page):
        super().__init__()
        self.elements, self.texts, self.open = [], {}, []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)


@pytest.fixture(scope="module")
def page():
    return html_page(META, RUNS, TOLD)


@pytest.fixture(scope="module")
def outline(page):
    return Outline(page)


def embedded(outline):
    places = [i for i, (tag, _) in enumerate(outline.elements) if tag == "script"]
    kinds = [outline.elements[i][1].get("type") for i in places]
    assert kinds == ["application/json", None]
    return json.loads(outline.texts["script"][0])


class TestStructure:
    def test_every_element_is_closed_and_ids_are_unique(self, outline):
        assert outline.open == []
        ids = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
        assert len(ids) == len(set(ids)) > 0

    def test_nothing_is_loaded(self, page, outline):
        for tag, attributes in outline.elements:
            assert tag not in ("img", "iframe", "object", "embed", "base")
            assert "src" not in attributes
            assert attributes.get("href", "data:,") == "data:,"
            assert not any(name.startswith("on") for name in attributes)
        policy = next(a["content"] for _, a in outline.elements if "http-equiv" in a)
        assert policy.startswith("default-src 'none';")
        loaded = "".join(outline.texts["style"]) + outline.texts["script"][1]
        assert "@import" not in loaded
        assert "url(http" not in loaded
        assert re.findall(r"https?://[^\"]+", loaded) == ["http://www.w3.org/2000/svg"]  # a name, not a place

    def test_the_table_stands_in_the_page_with_heads_for_rows_and_columns(self, outline):
        scopes = [attributes.get("scope") for tag, attributes in outline.elements if tag == "th"]
        assert scopes[:4] == ["col", "col", "row", "row"]
        assert "1.6 ± 2" in outline.texts["td"]
        assert "vanilla" in outline.texts["th"]

    def test_settings_and_machine_are_told(self, outline):
        told = outline.texts["th"]
        for name in ("lr", "history size", "optex", "cpu", "command"):
            assert name in told
        assert f"optex compare {HOSTILE}" in outline.texts["td"]

    def test_it_is_for_phones_and_the_dark_too(self, page, outline):
        viewport = next(a["content"] for _, a in outline.elements if a.get("name") == "viewport")
        assert "width=device-width" in viewport
        assert "prefers-color-scheme: dark" in page


class TestData:
    def test_the_runs_round_trip(self, outline):
        document = embedded(outline)
        runs = [Run.of_record(record, document["plot"]["rounds"]) for record in document["runs"]]
        for ours, theirs in zip(RUNS, runs, strict=True):
            assert (ours.case, ours.rounds, ours.trace.stopped) == (
                theirs.case,
                theirs.rounds,
                theirs.trace.stopped,
            )
            assert ours.trace.gradients == theirs.trace.gradients
            assert ours.trace.seconds == theirs.trace.seconds
            for one, other in zip(ours.trace.loss, theirs.trace.loss, strict=True):
                assert one == other or (math.isnan(one) and math.isnan(other))

    def test_so_do_names_that_look_like_html(self, outline):
        document = embedded(outline)
        assert document["runs"][-1]["problem"] == HOSTILE
        assert document["meta"]["cpu"] == HOSTILE
        assert document["plot"]["minimum"] == {"sphere": 0.0, HOSTILE: None}
        assert outline.texts["title"] == [f"optex compare: sphere, {HOSTILE}"]

    def test_methods_have_the_pictures_colours(self, outline):
        styles = embedded(outline)["plot"]["styles"]
        assert styles.keys() == {"vanilla", "optex", "hold-last"}
        for method, style in styles.items():
            assert style["light"] == METHOD_STYLES[method]["color"]
            assert style["dark"] == readable_on_dark(style["light"])

    def test_colours_on_dark_are_told_apart(self):
        dark = [readable_on_dark(style["color"]) for style in METHOD_STYLES.values()]
        assert len(set(dark)) == len(dark)


def test_a_name_that_is_no_page_is_refused(tmp_path):
    check_page_path(tmp_path / "a.HTML")
    with pytest.raises(ValueError, match=r"html: 'a.png' must end in one of \.html, \.htm"):
        check_page_path(tmp_path / "a.png")


def browsed(path, page, script="", options=()):
    """The page after its program and ``script``: what the latter answers, the document, and the console."""
    probe = f"<script>document.body.dataset.answer = JSON.stringify((() => {{ {script} }})() ?? null)</script>"
    path.write_text(page.replace("</body>", f"{probe}</body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", *options]
    profile = f"--user-data-dir={path.parent / 'profile'}"
    ended = subprocess.run(
        [*command, profile, "--virtual-time-budget=2000", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    dom = Outline(ended.stdout)
    answer = next(attributes["data-answer"] for tag, attributes in dom.elements if tag == "body")
    return json.loads(answer), dom, [line for line in ended.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt install chromium")
class TestInABrowser:
    """One start of the browser a test: they take a second or two each."""

    def test_the_plot_is_drawn_and_the_console_is_silent(self, page, tmp_path):
        script = """
          return [...document.querySelectorAll(".panel")].map((panel) => ({
            title: panel.querySelector("h2").textContent,
            label: panel.querySelector("svg").getAttribute("aria-label"),
            lines: [...panel.querySelectorAll(".series:not(.single)")].map((line) => line.getTotalLength()),
            singles: panel.querySelectorAll(".single").length,
            texts: [...panel.querySelectorAll("text")].map((text) => text.textContent),
            width: panel.querySelector("svg").clientWidth,
          }));
        """
        panels, dom, console = browsed(tmp_path / "page.html", page, script)
        assert console == []
        assert [panel["title"] for panel in panels] == ["sphere", HOSTILE]
        sphere, other = panels
        assert len(sphere["lines"]) == 3
        assert sum(length > 100 for length in sphere["lines"]) == 2, "hold-last stopped at its start"
        assert sphere["singles"] == 6
        assert len(other["lines"]) == 1
        assert {"loss − minimum (0)", "rounds (sequential gradient evaluations)"} <= set(sphere["texts"])
        assert "loss" in other["texts"]
        assert sphere["width"] > 200
        assert not any(tag == "img" for tag, _ in dom.elements)

    def test_an_error_would_be_seen(self, page, tmp_path):
        broken = page.replace('"vanilla": "vanilla"', '"minimum_": 0').replace('"styles": {', '"no": {')
        assert broken != page
        _, _, console = browsed(tmp_path / "page.html", broken)
        assert any("Uncaught" in line for line in console)

    def test_a_click_hides_a_method_and_another_shows_it(self, page, tmp_path):
        script = """
          const count = () => document.querySelectorAll(".panel .series:not(.single)").length;
          const buttons = [...document.querySelectorAll("#legend button")];
          const button = buttons.find((b) => b.textContent === "optex");
          const seen = [[count(), button.getAttribute("aria-pressed")]];
          for (let i = 0; i < 2; i++) {
            button.click();
            seen.push([count(), button.getAttribute("aria-pressed")]);
          }
          for (const each of buttons) each.click();
          return [seen, count(), document.querySelector(".panel text").textContent];
        """
        (seen, left, text), _, console = browsed(tmp_path / "page.html", page, script)
        assert seen == [[4, "true"], [3, "false"], [4, "true"]]
        assert (left, text) == (0, "no method is shown")
        assert console == []

    def test_keys_read_means_that_are_the_scales(self, page, tmp_path):
        # Of the seeds 9 and 4 the geometric mean is 6, the arithmetic one 6.5.
        script = """
          const svg = document.querySelector(".panel svg");
          const press = (key) => svg.dispatchEvent(new KeyboardEvent("keydown", { key, cancelable: true }));
          const choose = (value) => document.querySelector(`input[value=${value}]`).click();
          const read = (key) => { press(key); return svg.getAttribute("aria-valuetext"); };
          const told = [read("Home"), read("ArrowRight")];
          choose("linear");
          told.push(read("Home"), read("End"));
          choose("gradients");
          told.push(read("End"));
          choose("seconds");
          told.push(read("End"));
          const tip = document.querySelector(".tip");
          told.push(tip.hidden);
          press("Escape");
          told.push(tip.hidden);
          return told;
        """
        told, _, console = browsed(tmp_path / "page.html", page, script)
        assert told[0] == "round 0: vanilla 6, optex 6, hold-last 6"
        assert told[1] == "round 1: optex 2, vanilla 4, hold-last 6"
        assert told[2] == "round 0: vanilla 6.5, optex 6.5, hold-last 6.5"
        assert told[3] == "round 2: optex 1, vanilla 4, hold-last 6.5 (ended at 0)"
        assert told[4] == "6 gradients: optex 1, vanilla 4, hold-last 6.5 (ended at 0)"
        assert told[5] == "0.25 seconds: optex 1, vanilla 4, hold-last 6.5 (ended at 0)"
        assert told[6:] == [False, True]
        assert console == []

    @pytest.mark.parametrize("width", [400, 1280])
    def test_nothing_is_wider_than_the_screen(self, page, tmp_path, width):
        # A window has a least width of its own, a frame has none.
        measure = """<script>
          const wide = (element) => element.getBoundingClientRect().right;
          parent.postMessage({
            width: innerWidth,
            needed: document.documentElement.scrollWidth,
            panels: [...document.querySelectorAll(".panel > svg")].map((svg) => svg.viewBox.baseVal.width),
            buttons: Math.max(...[...document.querySelectorAll("button, label")].map(wide)),
          }, "*");
        </script></body>"""
        (tmp_path / "framed.html").write_text(page.replace("</body>", measure))
        frame = f"""<body><script>
          addEventListener("message", (event) => document.body.dataset.answer = JSON.stringify(event.data));
          </script><iframe src="framed.html" width="{width}" height="900" style="border: 0"></iframe></body>"""
        found, _, console = browsed(tmp_path / "page.html", frame, options=["--window-size=1400,1000"])
        assert console == []
        assert found["width"] == width
        assert found["needed"] <= width
        assert found["buttons"] <= width
        columns = 1 if width == 400 else 2
        for drawn in found["panels"]:
            assert 0.7 * width / columns < drawn < width / columns
