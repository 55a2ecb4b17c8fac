"""The look of a run's report: one HTML page with everything in it, nothing loaded from elsewhere.

Text that comes from a model or a data set reaches the page in two ways only: escaped by
`html.escape`, or inside a JSON block whose `<`, `>` and `&` are escaped, from where the script
puts it in place as text, never as HTML.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence

from trainer.report_charts import BOTTOM, COLOURS, HEIGHT, LEFT, RIGHT, TOP, WIDTH


def page(
    *,
    title: str,
    subtitle: str,
    tiles: Sequence[tuple[str, str, str]],
    charts: Sequence[str],
    config: Sequence[tuple[str, str]],
    data: Mapping[str, object],
) -> str:
    """The whole page.

    Args:
        title, subtitle: plain text.
        tiles: (label, value, change) of the headline numbers, plain text.
        charts: HTML of the charts, from `chart_card`.
        config: (name, value), plain text.
        data: what the script reads: `charts` (points by chart) and `browser` (problems, samples).
    """
    tile_html = "".join(
        f'<div class="tile"><span>{html.escape(label)}</span><b>{html.escape(value)}</b>'
        f"<i>{html.escape(change)}</i></div>"
        for label, value, change in tiles
    )
    config_html = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in config
    )
    config_section = (
        f"<section><h2>Configuration</h2><table>{config_html}</table></section>" if config else ""
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<link rel="icon" href="data:,">
<style>{_colour_rules()}{_CSS}</style>
</head>
<body>
<header><h1>{html.escape(title)}</h1><p>{html.escape(subtitle)}</p></header>
<main>
<section class="tiles">{tile_html}</section>
<section><h2>Curves</h2><div class="charts">{"".join(charts)}</div></section>
<section id="browser" hidden><h2>Samples</h2>
<p class="hint" id="hint"></p>
<div class="controls"><button id="previous" title="previous problem">&#8592;</button>
<select id="problem"></select><button id="next" title="next problem">&#8594;</button></div>
<div id="question"></div>
<div id="timeline"></div>
</section>
{config_section}
</main>
<script type="application/json" id="data">{_script_json(data)}</script>
<script>{_JS}</script>
</body>
</html>
"""


def chart_card(
    index: int, title: str, note: str, legend: Sequence[tuple[str, str]], svg: str
) -> str:
    """A chart with its title and legend; `legend` holds (colour, label)."""
    keys = "".join(
        f'<span class="key {colour}">{html.escape(label)}</span>' for colour, label in legend
    )
    note_html = f"<small>{html.escape(note)}</small>" if note else ""
    return (
        f'<figure data-chart="{index}"><figcaption>{html.escape(title)}{note_html}</figcaption>'
        f'<div class="legend">{keys}</div><div class="plot">{svg}</div></figure>'
    )


def _script_json(data: Mapping[str, object]) -> str:
    # Escaped so that no text in it can end the script element or open a comment.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _colour_rules() -> str:
    light = "".join(f"--{name}:{pair[0]};" for name, pair in COLOURS.items())
    dark = "".join(f"--{name}:{pair[1]};" for name, pair in COLOURS.items())
    rules = "".join(
        f"polyline.{name}{{stroke:var(--{name})}}circle.{name}{{fill:var(--{name})}}"
        f".key.{name}::before{{background:var(--{name})}}"
        for name in COLOURS
    )
    return (
        f":root{{{light}--bg:#f6f7f9;--card:#fff;--ink:#1b2330;--dim:#667085;--edge:#e2e6ec;"
        "--right:#e7f6ef;--wrong:#fdeceb;--mark:#fff0c2}"
        f"@media (prefers-color-scheme:dark){{:root{{{dark}--bg:#12161d;--card:#1b212b;"
        "--ink:#e6eaf0;--dim:#97a1b2;--edge:#2c3442;--right:#15322a;--wrong:#3a2021;"
        f"--mark:#5a4a14}}}}{rules}"
    )


_CSS = """
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
header,main{max-width:1280px;margin:0 auto;padding:0 24px}
header{padding-top:28px}
main{padding-bottom:48px}
h1{font-size:22px;margin:0}
h2{font-size:16px;margin:32px 0 10px}
header p,.hint{color:var(--dim);margin:2px 0 0}
button,select,.tile,figure,#question,.step,table{
  background:var(--card);border:1px solid var(--edge);border-radius:10px}

.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:12px}
.tiles{margin-top:20px}
.tile{padding:12px 16px}
.tile span,.tile i{display:block;color:var(--dim);font-size:13px;font-style:normal}
.tile b{font-size:23px;font-variant-numeric:tabular-nums;white-space:nowrap}

.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(340px,1fr));gap:12px}
figure{margin:0;padding:12px 14px 6px;min-width:0}
figcaption{font-weight:600}
figcaption small{display:block;font-weight:400;color:var(--dim)}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:12.5px;color:var(--dim)}
.legend{min-height:19px}
.key::before{content:"";display:inline-block;width:12px;height:3px;border-radius:2px;
  margin-right:5px;vertical-align:middle}
.plot{position:relative}
svg{display:block;width:100%}
svg text{font-size:10.5px;fill:var(--dim);font-variant-numeric:tabular-nums}
.grid{stroke:var(--edge)}
polyline{fill:none;stroke-width:1.8;stroke-linejoin:round}
polyline.pale{opacity:.25;stroke-width:1}
.cursor{stroke:var(--dim);stroke-dasharray:2 3}
.tip{position:absolute;top:4px;pointer-events:none;padding:3px 8px;font-size:12px;
  background:var(--card);border:1px solid var(--edge);border-radius:6px;white-space:nowrap;
  font-variant-numeric:tabular-nums;box-shadow:0 2px 8px #0002}
.tip b{display:block}

.controls{display:flex;gap:6px;margin:10px 0}
button,select{font:inherit;color:inherit;border-radius:7px;padding:4px 10px;cursor:pointer}
select{min-width:0;flex:0 1 560px}
#question{padding:10px 14px;white-space:pre-wrap;overflow-wrap:anywhere}
#question b{display:block;color:var(--dim);font-weight:400;font-size:13px}
.step{display:grid;grid-template-columns:150px minmax(0,1fr);margin-top:8px;overflow:hidden}
.side{padding:10px 14px;border-right:1px solid var(--edge);font-variant-numeric:tabular-nums}
.side small{display:block;color:var(--dim)}
.chips{display:flex;flex-wrap:wrap;gap:4px;margin-top:6px}
.chip{width:26px;height:22px;padding:0;font-size:12px;border-radius:5px}
.chip.right{background:var(--right);border-color:var(--green)}
.chip.wrong{background:var(--wrong);border-color:var(--red)}
.chip[aria-pressed=true]{outline:2px solid var(--blue);outline-offset:1px}
.text{padding:10px 14px;border-left:4px solid;white-space:pre-wrap;overflow-wrap:anywhere;
  max-height:340px;overflow-y:auto}
.text.right{background:var(--right);border-left-color:var(--green)}
.text.wrong{background:var(--wrong);border-left-color:var(--red)}
.text small{display:block;color:var(--dim);margin-top:6px}
.tag{color:var(--dim)}
mark{background:var(--mark);color:inherit;border-radius:3px;padding:0 2px}

table{border-collapse:separate;border-spacing:0;width:100%;font-size:13.5px;padding:6px 0}
th,td{text-align:left;padding:2px 14px;vertical-align:top;overflow-wrap:anywhere}
th{color:var(--dim);font-weight:400;width:280px}
@media (max-width:640px){.step{grid-template-columns:1fr}.side{border-right:0}}
"""

_JS = (
    f"const LEFT = {LEFT}, INNER = {WIDTH - LEFT - RIGHT}, WIDTH = {WIDTH};"
    f"const TOP = {TOP}, BASE = {HEIGHT - BOTTOM};"
    + r"""
const data = JSON.parse(document.getElementById("data").textContent);
const browser = data.browser;
const byId = id => document.getElementById(id);

function make(tag, text, cls) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (cls) node.className = cls;
  return node;
}
function short(value, unit) {
  if (unit === "share") return (100 * value).toFixed(1) + " %";
  return Number(value.toPrecision(4)).toString();
}

function nearest(points, step) {
  const distance = point => Math.abs(point[0] - step);
  return points.reduce((best, point) => distance(point) < distance(best) ? point : best);
}
function addCursor(figure) {
  const chart = data.charts[figure.dataset.chart];
  const plot = figure.querySelector(".plot"), svg = plot.querySelector("svg");
  const points = chart.curves.flatMap(curve => curve.points);
  const last = Math.max(data.last_step, 1);
  const tip = make("div", undefined, "tip");
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
  cursor.setAttribute("class", "cursor");
  plot.addEventListener("pointerleave", () => { tip.remove(); cursor.remove(); });
  plot.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), scale = WIDTH / box.width;
    const wanted = ((event.clientX - box.left) * scale - LEFT) / INNER * last;
    const step = nearest(points, wanted)[0];
    tip.replaceChildren(make("b", "step " + step));
    for (const curve of chart.curves.filter(candidate => candidate.points.length)) {
      const point = nearest(curve.points, step);
      const at = point[0] === step ? "" : " (step " + point[0] + ")";
      tip.append(make("div", curve.label + at + ": " + short(point[1], chart.unit)));
    }
    const x = LEFT + INNER * step / last;
    const ends = {x1: x, x2: x, y1: TOP, y2: BASE};
    for (const name in ends) cursor.setAttribute(name, ends[name]);
    svg.append(cursor);
    plot.append(tip);
    const left = x / scale;
    const before = left > box.width / 2;
    tip.style.left = (before ? left - tip.offsetWidth - 8 : left + 8) + "px";
  });
}
document.querySelectorAll("figure").forEach(addCursor);

const words = browser.words.join("|");
const marked = new RegExp("(</?(?:think|answer)>)|\\b(?:" + words + ")\\b", "gi");
function appendMarked(node, text) {
  let from = 0;
  for (const match of text.matchAll(marked)) {
    node.append(text.slice(from, match.index));
    node.append(match[1] ? make("span", match[0], "tag") : make("mark", match[0]));
    from = match.index + match[0].length;
  }
  node.append(text.slice(from));
}
function showSample(view, samples, chosen) {
  const sample = samples[chosen], verdict = sample.correct ? "right" : "wrong";
  view.text.className = "text " + verdict;
  view.text.replaceChildren();
  appendMarked(view.text, sample.completion);
  const facts = [verdict];
  facts.push(sample.extracted === null ? "no answer" : "answer " + sample.extracted);
  if (sample.reward !== null) facts.push("reward " + short(sample.reward));
  facts.push(sample.length + " tokens");
  if (sample.finish_reason === "length") facts.push("cut off");
  if (sample.mean_logprob !== null) {
    facts.push("mean log-probability " + short(sample.mean_logprob));
  }
  view.text.append(make("small", facts.join(" \u00b7 ")));
  view.chips.forEach((chip, at) => chip.setAttribute("aria-pressed", at === chosen));
}
function stepRow(entry) {
  const row = make("div", undefined, "step"), side = make("div", undefined, "side");
  const chips = make("div", undefined, "chips");
  const right = entry.samples.filter(sample => sample.correct).length;
  const view = {text: make("div"), chips: []};
  entry.samples.forEach((sample, at) => {
    const chip = make("button", at + 1, "chip " + (sample.correct ? "right" : "wrong"));
    chip.addEventListener("click", () => showSample(view, entry.samples, at));
    view.chips.push(chip);
    chips.append(chip);
  });
  const summary = make("small", right + " of " + entry.samples.length + " right");
  side.append("step " + entry.step, summary, chips);
  row.append(side, view.text);
  showSample(view, entry.samples, 0);
  return row;
}
function showProblem(index) {
  const problem = browser.problems[index];
  byId("problem").value = index;
  byId("question").replaceChildren(
    make("b", "question"), problem.question, make("b", "gold answer"), problem.answer);
  byId("timeline").replaceChildren(...problem.steps.map(stepRow));
}
if (browser.problems.length) {
  const select = byId("problem"), count = browser.problems.length;
  const move = by => showProblem((Number(select.value) + by + count) % count);
  byId("browser").hidden = false;
  byId("hint").textContent = browser.hint;
  browser.problems.forEach((problem, index) => {
    const option = make("option", problem.problem_id + ": " + problem.question.slice(0, 70));
    option.value = index;
    select.append(option);
  });
  select.addEventListener("change", () => move(0));
  byId("previous").addEventListener("click", () => move(-1));
  byId("next").addEventListener("click", () => move(1));
  showProblem(0);
}
"""
)
