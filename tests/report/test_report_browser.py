"""The report in a browser without a screen: nothing fails, every picture is drawn, values appear under the mouse, the
surface is drawn and turns."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from whole_run_helper import whole_run

from cryoiso.report import build

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LARGEST_BYTES = 8_000_000

BEFORE = """<script>
window.failures = [];
window.addEventListener("error", (event) => window.failures.push(String(event.message || event.target.src)), true);
const complain = console.error;
console.error = (...words) => { window.failures.push(words.join(" ")); complain(...words); };
</script>"""
AFTER = """<script>
addEventListener("load", () => {
  function values(key, fx, fy) {
    const picture = document.querySelector("#figure-" + key + " img"), tip = document.getElementById("tip");
    picture.scrollIntoView();
    const frame = picture.getBoundingClientRect();
    const place = { clientX: frame.left + fx * frame.width, clientY: frame.top + fy * frame.height };
    picture.dispatchEvent(new PointerEvent("pointermove", place));
    const said = tip.hidden ? "" : tip.innerText;
    picture.dispatchEvent(new PointerEvent("pointerleave", place));
    return said + (tip.hidden ? "" : "STILL THERE");
  }
  const canvas = document.querySelector("#figure-measured canvas");
  const pixels = () => canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  const sum = () => pixels().reduce((a, b) => a + b, 0);
  const first = sum();
  canvas.dispatchEvent(new PointerEvent("pointerdown", { clientX: 10, clientY: 10, pointerId: 1 }));
  canvas.dispatchEvent(new PointerEvent("pointermove", { clientX: 60, clientY: 30, pointerId: 1 }));
  canvas.dispatchEvent(new PointerEvent("pointerup", { pointerId: 1 }));
  const colours = pixels();
  let blue = 0, orange = 0;
  for (let i = 0; i < colours.length; i += 4) {
    if (!colours[i + 3]) continue;
    if (colours[i + 2] > colours[i] + 40) blue += 1;
    if (colours[i] > colours[i + 2] + 40) orange += 1;
  }
  const found = {
    failures: window.failures, state: window.cryoisoReport,
    pictures: [...document.images].map((i) => [i.complete, i.naturalWidth]),
    fsc: values("fsc", 0.5, 0.5), outside: values("fsc", 0.001, 0.001), sphere: values("sphere", 0.5, 0.5),
    local: values("local", 0.13, 0.5), model: values("model", 0.75, 0.5),
    drawn: Number(canvas.dataset.drawn), turned: sum() !== first, blue, orange,
  };
  const element = document.createElement("pre");
  element.id = "found";
  element.textContent = "FOUND" + JSON.stringify(found) + "END";
  document.body.appendChild(element);
});
</script>"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return whole_run(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def text(folder) -> str:
    return build(folder).read_text(encoding="utf-8")


def test_the_section_joins_what_is_known(text, folder):
    shell = re.sub(r'src="data:[^"]*"', "", text)
    part = shell[shell.index('id="measured"') : shell.index('id="numbers"')]
    for words in ("70.0 % of the corrected map", "template bias Omega", "0.011 (-0.004 to 0.026): pass", "cFAR",
                  "measured share of the corrected map"):  # fmt: skip
        assert words in part, words
    assert 'id="local"' in shell and 'id="model"' in shell and "TM-like score" in shell
    assert len(text.encode()) < LARGEST_BYTES
    table = (folder / "06_diagnose" / "q_scores.tsv").read_text().splitlines()
    assert table[0].split("\t")[:3] == ["chain", "residue", "name"] and len(table) == 41


def test_data_cannot_end_the_script(folder):
    numbers = folder / "06_diagnose" / "diagnose.json"
    kept = numbers.read_text()
    try:
        changed = json.loads(kept)
        changed["model"]["table"]["chain"] = ["</script><b>"] * len(changed["model"]["table"]["chain"])
        numbers.write_text(json.dumps(changed))
        page = build(folder).read_text()
        assert "</script><b>" not in page and "\\u003c/script>\\u003cb>" in page.replace("\\\\", "\\")
    finally:
        numbers.write_text(kept)


def opened(page: Path, folder: Path, size: str = "1100,900") -> dict:
    """What the page's own script found in a browser of this size."""
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        f"--user-data-dir={folder / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr",
        f"--window-size={size}", "--virtual-time-budget=4000", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    match = re.search(r"FOUND(\{.*\})END", done.stdout, re.S)
    assert match, done.stderr[-2000:]
    assert not re.search(r"CONSOLE.*(?:rror|Refused|Failed)", done.stderr), done.stderr
    found: dict = json.loads(html.unescape(match[1]))
    return found


SMALL = """<script>
addEventListener("load", () => {
  const wide = (name) => document.querySelector(name).getBoundingClientRect().width;
  const table = document.querySelector(".numbers"), element = document.createElement("pre");
  element.textContent = "FOUND" + JSON.stringify({
    window: innerWidth, page: document.documentElement.scrollWidth, fsc: wide("#figure-fsc img"),
    frame: wide("#figure-fsc"), cut: table.scrollWidth - table.clientWidth,
  }) + "END";
  document.body.appendChild(element);
});
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="LOUD: no chromium")
def test_on_a_small_screen(text, tmp_path):
    """The page is as wide as the screen, no number is cut off, and pictures keep their words legible: they scroll."""
    page = tmp_path / "page.html"
    page.write_text(text.replace("</body>", SMALL + "</body>", 1))
    found = opened(page, tmp_path, "420,900")
    assert found["page"] <= found["window"] < 700 and found["cut"] <= 0, found
    assert found["fsc"] >= 450 > found["frame"] - 60, found


@pytest.mark.skipif(CHROMIUM is None, reason="LOUD: no chromium")
def test_in_a_browser(text, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(text.replace("<head>", "<head>" + BEFORE, 1).replace("</body>", AFTER + "</body>", 1))
    found = opened(page, tmp_path)
    assert found["failures"] == [] and found["state"]["errors"] == []
    assert len(found["pictures"]) >= 7 and all(complete and wide > 0 for complete, wide in found["pictures"])
    assert "spatial frequency" in found["fsc"] and "Å)" in found["fsc"] and "corrected for the mask:" in found["fsc"]
    assert found["outside"] == ""
    assert "resolution by direction:" in found["sphere"] and re.search(r"\d", found["sphere"])
    assert found["local"].startswith(("XY", "XZ", "YZ")) and "chain A:" in found["model"]
    assert found["drawn"] > 5000 and found["turned"] and found["state"]["surfaces"] == 1
    assert found["blue"] > 500 and found["orange"] > 500, "both ends of the share are seen"
