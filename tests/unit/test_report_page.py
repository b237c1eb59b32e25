"""The report page as text: what is escaped, how large it gets, and whether its colours can be read."""

import html
import random
import re
import subprocess
from html import unescape
from html.parser import HTMLParser
from itertools import product

import pytest
import torch
from markupsafe import Markup

from tests.reports import UGLY, invented_contents, invented_metric, invented_result
from tests.score_names import named
from tests.tiny import merge_spec, model_spec, tiny_base, tiny_checkpoint
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.contracts.report import MergeResult
from worker.engine.catalog.contracts.spec import MergeSpec
from worker.engine.catalog.drawing.charts import Scale, heat
from worker.engine.catalog.drawing.colours import (
    AMOUNT_DARK,
    AMOUNT_LIGHT,
    BALANCE_DARK,
    BALANCE_LIGHT,
    DARK,
    GROUNDS,
    LIGHT,
    MARKS,
    TEXT,
)
from worker.engine.catalog.drawing.html import element, table
from worker.engine.catalog.planning.plan import MergePlan
from worker.engine.catalog.planning.planner import plan_merge
from worker.engine.reporting.contents import BLOCKS, MOST_CELLS, Contents, of_scores, rounded
from worker.engine.reporting.figures.certainty import certainty
from worker.engine.reporting.figures.comparisons import candidates, versions
from worker.engine.reporting.figures.search import search
from worker.engine.reporting.page import merge_page
from worker.engine.reporting.words import about_candidates, candidate_remarks, candidate_table, listed, size

SCHEMES = {"light": LIGHT, "dark": DARK}
MOST_BYTES = 2_000_000


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2.2 defines it."""
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_that_of_the_guidelines() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)


@pytest.mark.parametrize(("scheme", "name", "ground"), [*product(SCHEMES, (*TEXT, "limit"), GROUNDS)])
def test_text_can_be_read(scheme: str, name: str, ground: str) -> None:
    assert contrast(SCHEMES[scheme][name], SCHEMES[scheme][ground]) >= 4.5


@pytest.mark.parametrize(("scheme", "name"), [*product(SCHEMES, MARKS)])
def test_marks_can_be_seen(scheme: str, name: str) -> None:
    assert contrast(SCHEMES[scheme][name], SCHEMES[scheme]["page"]) >= 3


@pytest.mark.parametrize(("ramp", "page"), [(AMOUNT_LIGHT, LIGHT["page"]), (AMOUNT_DARK, DARK["page"])])
def test_more_stands_out_more_in_a_map(ramp: tuple[str, ...], page: str) -> None:
    apart = [contrast(colour, page) for colour in ramp]
    assert apart == sorted(apart)
    assert apart[-1] > 8


@pytest.mark.parametrize(("ramp", "page"), [(BALANCE_LIGHT, LIGHT["page"]), (BALANCE_DARK, DARK["page"])])
def test_both_ends_of_a_balance_stand_out_alike_and_differ_in_blue(ramp: tuple[str, ...], page: str) -> None:
    apart = [contrast(colour, page) for colour in ramp]
    assert apart[4] == min(apart)
    assert apart[4:] == sorted(apart[4:])
    assert apart[:5] == sorted(apart[:5], reverse=True)
    assert all(int(less[5:], 16) < int(more[5:], 16) - 60 for less, more in zip(ramp[:3], ramp[:-4:-1], strict=True))


class Checked(HTMLParser):
    """Tags that are open, ids, headings, and images without name."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.headings: list[int] = []
        self.tags: set[str] = set()
        self.named_by: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.add(tag)
        assert not any(name.startswith("on") for name in given)
        if given.get("id"):
            self.ids.append(given["id"] or "")
        if given.get("role") == "img":
            self.named_by += [given["aria-labelledby"] or "", given["aria-describedby"] or ""]
        if re.fullmatch(r"h\d", tag):
            self.headings.append(int(tag[1]))
        if tag not in ("meta", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> tuple[MergeSpec, MergePlan]:
    root = tmp_path_factory.mktemp("merged")
    tiny_base(root / "base")
    folders = [tiny_checkpoint(root / name, seed=seed) for seed, name in enumerate("ab")]
    spec = merge_spec(root / "out", [model_spec(folder) for folder in folders])
    spec = spec.model_copy(update={"name": UGLY, "recipe": {"method": UGLY}})
    return spec, plan_merge(
        [inspect_checkpoint(f, f.name) for f in folders], base=inspect_checkpoint(root / "base", UGLY)
    )


def page_of(merged: tuple[MergeSpec, MergePlan], result: MergeResult, contents: Contents) -> str:
    return merge_page(*merged, result, contents, "sha256:0")


def test_names_notes_and_recipes_are_no_markup(merged: tuple[MergeSpec, MergePlan]) -> None:
    names = [UGLY, "b" * 5000]
    page = page_of(merged, invented_result(names), invented_contents(names))
    checked = Checked(page)
    assert checked.open == []
    assert not checked.tags & {"script", "iframe", "img", "link", "object", "form", "input"}
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 20


def test_the_page_asks_for_nothing(merged: tuple[MergeSpec, MergePlan]) -> None:
    page = page_of(merged, invented_result(["a", "b"]), invented_contents(["a", "b"]))
    assert """http-equiv="Content-Security-Policy" content="default-src &#39;none&#39;;""" in page
    outside = set(re.findall(r"""(?:src|href|url\()=?["'(]?([^"')\s>]+)""", page)) - {"data:;"}
    assert all(link.startswith("#") for link in outside), outside


def test_headings_are_in_order_and_pictures_have_names(merged: tuple[MergeSpec, MergePlan]) -> None:
    checked = Checked(page_of(merged, invented_result(["a", "b"]), invented_contents(["a", "b"])))
    assert checked.headings[0] == 1
    assert checked.headings.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(checked.headings, checked.headings[1:], strict=False))
    assert len(set(checked.ids)) == len(checked.ids)
    assert len(checked.named_by) > 20
    assert set(checked.named_by) <= set(checked.ids)


def test_sections_are_there_only_where_there_are_data(merged: tuple[MergeSpec, MergePlan]) -> None:
    nothing = {"metrics": None, "mean_retention": None, "min_retention": None, "candidates": None, "search": None}
    result = invented_result(["a", "b"]).model_copy(update={**nothing, "stopping": None, "notes": []})
    contents = invented_contents(["a", "b"]).model_copy(update={"maps": None, "interference": None})
    bare = page_of(merged, result, contents)
    full = page_of(merged, invented_result(["a", "b"]), invented_contents(["a", "b"]))
    assert re.findall(r'<section id="(\w+)"', bare) == ["merged", "run", "repeat"]
    assert re.findall(r'<section id="(\w+)"', full) == [
        "notes", "retention", "candidates", "search", "merged", "scores", "weights", "interference", "certainty", "run",
        "repeat",
    ]  # fmt: skip
    assert "retention" not in bare


def test_the_recipe_is_posted_wherever_the_service_is_and_long_names_break_between_words(
    merged: tuple[MergeSpec, MergePlan],
) -> None:
    result = invented_result(["a", "b"]).model_copy(update={"method": {"name": "aligned_regmean"}})
    page = page_of(merged, result, invented_contents(["a", "b"]))
    assert "<dd>aligned_<wbr>regmean" in page
    [command] = re.findall(r'<pre[^>]*aria-label="Command">(.*?)</pre>', page, flags=re.DOTALL)
    command = html.unescape(command).partition(" --data")[0]
    for key, given in ((None, []), ("mm_x", ["-H", "Authorization: Bearer mm_x"])):
        variables = {"MASKMERGE_URL": "http://there:9"} | ({"MASKMERGE_API_KEY": key} if key else {})
        script = command.replace("curl", "printf '%s\n'", 1)
        told = subprocess.run(["/bin/sh", "-c", script], env=variables, capture_output=True, text=True, check=True)
        said = ["--fail-with-body", "http://there:9/merge", *given, "-H", "Content-Type: application/json"]
        assert told.stdout.splitlines() == said


def test_a_hundred_models_of_96_layers_make_no_large_page(merged: tuple[MergeSpec, MergePlan]) -> None:
    names = [f"model-with-a-name-of-its-own-{number}" for number in range(100)]
    scores = {
        name: {
            named(f"layers.{layer}.{nodes}"): torch.rand(count, dtype=torch.float64) ** 4
            for layer in range(96)
            for nodes, count in (("heads", 128), ("neurons", 300))
        }
        for name in names
    }
    spec = merged[0].model_copy(
        update={"models": [merged[0].models[0].model_copy(update={"name": name}) for name in names]}
    )
    maps = of_scores(spec, scores).maps
    assert maps is not None
    assert 0 < len(maps.models) < len(names) == len(maps.models) + maps.left_out
    cells = [len(row) for of in maps.maps for grid in of.scores.values() for row in grid]
    assert sum(cells) <= MOST_CELLS
    assert max(cells) <= BLOCKS
    shown = MOST_CELLS // (4 * BLOCKS * BLOCKS)
    contents = invented_contents(names, rows=BLOCKS, columns=BLOCKS, models=shown)
    page = page_of(merged, invented_result(names, trials=1000), contents)
    assert len(page.encode()) < MOST_BYTES
    assert f"Shown are the first {shown} of 100 models" in page
    assert "The best 200 of 1000 trials" in page


def test_what_is_text_is_escaped_and_what_is_markup_is_not() -> None:
    assert element("p", "a<b", Markup("<br>"), None, title='"x"', hidden=False, tabindex=0) == (
        '<p title="&#34;x&#34;" tabindex="0">a&lt;b<br></p>'
    )
    assert "<td>&lt;i&gt;</td>" in table(["a", "b"], [["1", "<i>"]], "&")


@pytest.mark.parametrize(
    ("values", "low", "high", "ticks"),
    [
        ([0.87, 0.96], 0.85, 1.0, [0.85, 0.9, 0.95, 1.0]),
        ([0.0, 0.0], 0.0, 1.0, [0.0, 0.5, 1.0]),
        ([-3.0, 11.0], -5.0, 15.0, [-5.0, 0.0, 5.0, 10.0, 15.0]),
    ],
)
def test_axes_have_round_ends(values: list[float], low: float, high: float, ticks: list[float]) -> None:
    scale = Scale.around(values)
    assert [scale.low, scale.high] == pytest.approx([low, high])
    assert scale.ticks == pytest.approx(ticks)


def test_an_axis_over_orders_of_magnitude_is_in_powers_of_ten() -> None:
    scale = Scale(1e-4, 1e-1, is_log=True)
    assert scale.ticks == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1])
    assert scale.across(1e-2) == "66.67%"


def test_neighbours_of_one_colour_are_one_rectangle() -> None:
    drawn = heat("m", "t", "d", [[0, 0, 3], [None, 3, 3]], ramp="a", rows=2, columns=3)
    assert '<path d="M0 0h2v1h-2z" class="a0"></path>' in drawn
    assert '<path d="M2 0h1v1h-1zM1 1h2v1h-2z" class="a3"></path>' in drawn


def test_numbers_are_rounded_and_finite() -> None:
    assert [rounded(v) for v in (None, float("nan"), float("inf"), 0.123456, 123456.0)] == [None] * 3 + [
        0.1235,
        123500.0,
    ]
    assert [size(n) for n in (12, 4_200, 90_900_000, 1_230_000_000)] == ["12 bytes", "4.2 kB", "90.9 MB", "1.23 GB"]
    assert listed(["a", "b", "c"]) == "a, b and c"
    assert listed(list("abcdefgh"), 3) == "a, b, c and 5 more"


def test_a_search_shows_every_trial_its_best_its_floors_and_what_was_given_up() -> None:
    result = invented_result(["a", "b"], trials=40)
    assert result.search is not None
    about, picture, _, key, parameters, trials, failed = (part or "" for part in search(result))
    assert "41 merges were tried on 256 search rows" in about
    assert "could not be made: 1" in failed
    assert len(re.findall(r'<path d="[^"]*" class="(?:mark|hollow) ', picture)) == 40
    assert picture.count('class="hollow ') == sum(trial.pruned for trial in result.search.trials) == 10
    assert picture.count('class="ring"') == 1
    assert 'class="limit"' not in picture, "a floor is of a model, and what is drawn is of all"
    assert f"trial {result.search.chosen} reaches the floors" in about
    assert "less what is lacking to the floors" in picture
    whole = [trial.objective for trial in result.search.trials if not trial.pruned]
    assert f"the best that was not given up is {max(whole):.3f}" in picture
    rises = [value for index, value in enumerate(whole) if value > max([-1.0, *whole[:index]])]
    level = re.findall(r'y1="([\d.]+)" x2="[\d.%]+" y2="([\d.]+)" class="best"', picture)
    assert len({first for first, last in level if first == last}) == len(rises)
    assert [f"{letter}: {name}" for letter, name in (("A", "mask_fisher"), ("G", "karcher"))] == [
        words for words in re.findall(r"<span>(\w: \w+)</span>", key) if words[0] in "AG"
    ]
    assert "Objective over scale" in parameters
    assert trials.count("given up") == 10


def test_bars_of_a_metric_above_one_are_as_long_as_their_values() -> None:
    values = {"expert": 100.0, "average": 200.0, "merged": 150.0}
    ends = {"intervals": dict.fromkeys(values, (90.0, 250.0)), "merged_kept_head": None}
    shares = invented_metric(random.Random(0))
    metrics = {"a": shares.model_copy(update={"metric": "perplexity", **values, **ends}), "b": shares}
    words, share = versions(metrics).split('<div class="card">')[1:]
    assert [float(width) for width in re.findall(r'<rect[^>]* width="([0-9.]+)%"', words)] == [40.0, 80.0, 60.0]
    longest = [float(width) for width in re.findall(r'<rect[^>]* width="([0-9.]+)%"', share)][-1]
    assert longest == pytest.approx(100 * shares.merged, abs=0.01)


def test_candidates_show_every_model_with_its_mean() -> None:
    result = invented_result(["a", "b"])
    assert result.candidates is not None
    drawn = "".join(candidates(result))
    marks = re.findall(r'class="mark (l\d)"', drawn)
    assert marks.count("l1") == marks.count("l2") == len(result.candidates) + 1  # and one in the key
    assert drawn.count('class="whisker"') == len(result.candidates)
    assert drawn.count('class="limit"') == 1
    assert "Dots are the models' retentions, the upright line is their mean. Dashed lines are floors: 0.85 of a." in (
        unescape(drawn)
    )
    assert "mask_fisher (chosen)" in drawn
    chosen = result.candidates[0].metrics["a"]
    assert f"{chosen.value:.4f} ({chosen.interval[0]:.4f} to {chosen.interval[1]:.4f})" in drawn


def test_candidates_of_many_models_with_long_names_are_drawn_without_dots() -> None:
    names = ["x" * 64, *(f"m{index}" for index in range(19))]
    drawn = unescape("".join(candidates(invented_result(names))))
    assert "Lines go from the least to the largest of the models' retentions" in drawn
    assert re.search(r">expert x{28}…: 0\.\d{3}<", drawn), "the number is not cut off"
    assert f"expert {names[0]}" in drawn
    assert "weight m1" not in "".join(candidate_remarks(invented_result(names)))


def test_what_was_chosen_is_said() -> None:
    result = invented_result(["a", "b"])
    assert result.search is not None
    assert result.candidates is not None
    [told] = candidate_remarks(result)
    assert told.startswith(f"Chosen is trial {result.search.chosen}: mask_fisher with scale ")
    assert told.endswith("weight a 1, weight b 1, align_ridge 0.1.")
    assert told in unescape("".join(candidates(result)))
    assert candidate_remarks(result.model_copy(update={"candidates": None})) == []


def test_the_table_says_what_was_given_up_and_whose_plain_average_it_is() -> None:
    result = invented_result(["a", "b"])
    assert result.search is not None
    assert result.candidates is not None
    given_up = {trial.number for trial in result.search.trials if trial.pruned}
    columns, rows = candidate_table(result)
    assert columns[-2:] == ["a, accuracy", "b, accuracy"]
    early = [candidate.trial in given_up and not candidate.chosen for candidate in result.candidates]
    assert [row[0].endswith(" (given up early)") for row in rows] == early
    assert any(early)
    assert "heads aligned to each" in about_candidates(result.candidates)
    kept = [candidate.model_copy(update={"align_ridge": None}) for candidate in result.candidates]
    assert "aligned" not in about_candidates(kept)


def test_the_error_curve_has_the_tolerance_as_a_line() -> None:
    drawn = "".join(certainty(invented_result(["a"]).stopping))
    assert drawn.count('class="mark l1"') == 3
    assert drawn.count('class="limit"') == 1
    assert ">tolerance 0.1<" in drawn
    assert "largest error is 0.0900. That is within the tolerance." in drawn
    assert certainty(None) == []
