"""bench/every.py: the page of all benches, and its pictures."""

import json
import re
from html import unescape
from pathlib import Path

import pytest

from bench import every
from bench.chart import chart

ROWS = [
    {"what": "scoring | 2 labels", "ours": 2.26, "reference": 2.22, "ratio": 1.018, "target": "<= 1.10", "met": True},
    {"what": "against <Fisher>", "ours": 2.26, "reference": 149.0, "ratio": 0.01517, "target": "<= 1/80", "met": False},
    {"what": "lost", "ours": 0, "reference": 0, "ratio": None, "target": "0", "met": True},
]


def texts(picture: str) -> list[str]:
    return [unescape(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", picture)]


def test_a_picture_has_a_bar_for_each_ratio_and_is_the_same_again() -> None:
    picture = chart(ROWS)
    found = texts(picture)
    assert {"scoring | 2 labels", "against <Fisher>", "1.02", "0.0152"} <= {*found}
    assert "lost" not in found
    assert picture == chart(ROWS)
    assert chart(ROWS[2:]) == ""


def test_the_page_has_what_earlier_runs_kept_and_says_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(every, "ROOT", tmp_path)
    (tmp_path / "bench").mkdir()
    script = "import json, sys; from pathlib import Path; Path(sys.argv[-1]).write_text(json.dumps({rows}))"
    (tmp_path / "bench" / "memory.py").write_text(script.format(rows=ROWS))
    (tmp_path / "bench" / "service.py").write_text("raise SystemExit('no Redis')")
    asked = ["every.py", "--out", str(tmp_path / "out"), "--page", str(tmp_path / "docs" / "benchmarks.md")]
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr("sys.argv", [*asked, "--only", "memory", "service", "quality"])
    with pytest.raises(SystemExit, match="failed: service"):
        every.main()
    assert "no Redis" in capfd.readouterr().err
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert r"| scoring \| 2 labels | 2.26 | 2.22 | 1.018 | <= 1.10 | yes |" in page
    assert "| against <Fisher> | 2.26 | 149 | 0.01517 | <= 1/80 | **no** |" in page
    assert "| lost | 0 | 0 |  | 0 | yes |" in page
    assert (tmp_path / "docs" / "images" / "bench_memory.svg").read_text() == chart(ROWS)
    kept = json.loads((tmp_path / "out" / "memory.json").read_text())
    assert kept["rows"] == ROWS
    assert "torch 2." in kept["versions"]
    assert "cores" in kept["machine"]
    (tmp_path / "bench" / "memory.py").write_text("raise SystemExit('it is not run again')")
    monkeypatch.setattr("sys.argv", [*asked, "--only", "memory"])
    every.main()
    assert (tmp_path / "docs" / "benchmarks.md").read_text() == page


def test_every_bench_that_writes_rows_is_run_by_make_bench() -> None:
    folder = Path(every.__file__).parent
    writing = {path.stem for path in folder.glob("*.py") if '"--json"' in path.read_text(encoding="utf-8")}
    assert writing - {"every"} == {*every.BENCHES}
