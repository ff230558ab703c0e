"""The README's figures show the committed results, and are readable on white and on dark pages."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

mpl = pytest.importorskip("matplotlib")
pytest.importorskip("scipy")
plot = pytest.importorskip("plot")
report = plot.report
DOCS = ROOT / "docs"


@pytest.fixture(params=plot.FIGURES)
def name(request):
    return request.param


def test_figures_show_the_committed_results(name):
    """The digest in the committed files is that of the numbers which the results give now."""
    with mpl.rc_context(plot.STYLE):
        _, numbers = plot.FIGURES[name]()
    about = f"numbers {plot.digest(numbers)}".encode()
    assert about in (DOCS / f"{name}.svg").read_bytes(), "run `make report`"


def test_drawing_again_gives_the_same_file(name, tmp_path):
    """Byte for byte, where this Matplotlib is the one that drew the committed figure."""
    plot.draw(plot.FIGURES[name], tmp_path / "a.svg")
    drawn, committed = (tmp_path / "a.svg").read_text(), (DOCS / f"{name}.svg").read_text()
    version = re.search(r"Matplotlib v([\w.]+)", committed)[1]
    if version != mpl.__version__:
        pytest.skip(f"drawn by Matplotlib {version}")
    assert drawn == committed


def test_a_changed_result_changes_the_digest(monkeypatch):
    _, before = plot.speed()
    rows = report.rows

    def changed(file):
        found = rows(file)
        target = next(r for r in found if r.get("contender") == "ours" and r["step"] == "forward + backward")
        target["ratio_p50"] = str(float(target["ratio_p50"]) + 0.01)
        return found

    monkeypatch.setattr(report, "rows", changed)
    assert plot.digest(plot.speed()[1]) != plot.digest(before)


@pytest.mark.parametrize("name", ["steps", "speed", "memory"])
def test_the_points_are_the_numbers(name):
    """What is drawn, not only what is digested: both libraries' points, each on its method's line."""
    figure, found = plot.FIGURES[name]()
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    for axes, numbers in zip(figure.axes, found.values(), strict=True):
        for who, label in enumerate(("ours", "HF PEFT")):
            lines = [line for line in axes.lines if line.get_label() == label]
            drawn = {names[round(line.get_ydata()[0])]: float(line.get_xdata()[0]) for line in lines}
            assert drawn == {method: each[who] for method, each in numbers.items() if each[who] is not None}


def luminance(colour: str) -> float:
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return sum(w * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
               for w, c in zip((0.2126, 0.7152, 0.0722), parts, strict=True))  # fmt: skip


@pytest.mark.parametrize("colour", [plot.TEXT, *plot.COLOURS])
@pytest.mark.parametrize("page", ["#ffffff", "#0d1117"])
def test_every_colour_stands_out_from_a_light_and_a_dark_page(colour, page):
    """Contrast as WCAG defines it; 3 is its bar for graphics and large text."""
    light, dark = sorted((luminance(colour), luminance(page)), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 3


def test_every_figure_is_in_the_readme(name):
    shown = f"](docs/{name}.svg)" in (ROOT / "README.md").read_text()
    assert shown or any(f"]({name}.svg)" in page.read_text() for page in DOCS.glob("*.md"))
    background = (DOCS / f"{name}.svg").read_text().split('id="patch_1"')[1].split("</g>")[0]
    assert re.search('opacity: 0[;"]|fill: none', background)
