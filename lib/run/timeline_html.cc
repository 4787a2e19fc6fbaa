// A timeline as one page that needs nothing else: the JSON inside, a script that draws it to the
// window's width, and tables for those who cannot see or run it.
#include <fmt/format.h>

#include "timeline_text.h"

namespace fathom {
namespace {

using run::human_bytes;
using run::xml_quote;

constexpr const char* kPageStyle = R"css(
:root{color-scheme:light dark;--ground:#fff;--card:#f7f8fa;--ink:#1b1f24;--quiet:#59626f;--grid:#e2e5ea;
--budget:#b3261e}
@media(prefers-color-scheme:dark){:root{--ground:#14181d;--card:#1c2127;--ink:#e8eaed;--quiet:#a2abb8;
--grid:#2c333c;--budget:#ff8a80}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1180px;margin:0 auto;padding:28px 20px 48px}
h1{font-size:26px;line-height:1.2;margin:0 0 4px}h2{font-size:17px;margin:32px 0 8px}
.quiet{color:var(--quiet)}
#summary{font-size:17px;margin:0 0 18px}
#legend{display:flex;flex-wrap:wrap;gap:4px 18px;padding:0;margin:0 0 8px;list-style:none;font-size:13px}
#legend i{display:inline-block;width:13px;height:13px;border-radius:3px;margin-right:6px;vertical-align:-2px}
#legend i.line{height:0;border-radius:0;border-top:2px solid var(--ink);vertical-align:4px}
#legend i.dash{border-top-style:dashed}#legend i.limit{border-color:var(--budget)}
figure{margin:0 0 22px;position:relative}
figcaption{display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 16px;margin:8px 0 2px}
figcaption b{font-size:16px}
svg{display:block;width:100%;font-size:12px;outline-offset:3px;touch-action:pan-y}
svg text{fill:var(--quiet)}svg text.strong{fill:var(--ink)}
.area{stroke:var(--ground);stroke-width:.6}.grid{stroke:var(--grid)}
.plan{stroke:var(--ink);stroke-dasharray:6 4;stroke-width:1.4}.limit{stroke:var(--budget);stroke-width:1.6}
.tokens{stroke:var(--ink);fill:none;stroke-width:1.5}
.halo{stroke:var(--ground);fill:none;stroke-width:3.5;opacity:.8}
.mark{stroke:var(--quiet);stroke-dasharray:2 3}.cursor{stroke:var(--ink);stroke-width:1}
.start{fill:#747a84}.load{fill:#5f6d86}.prefill{fill:#3768a8}.decode{fill:#237253}
svg text.strip{fill:#fff;font-size:11px}
#tip{position:absolute;pointer-events:none;background:var(--card);border:1px solid var(--grid);
border-radius:8px;padding:8px 11px;font-size:13px;line-height:1.45;box-shadow:0 4px 16px #0003;
min-width:190px;z-index:2}
#tip table{font-size:13px;margin-top:4px;width:100%}#tip td{border:0;padding:0 0 0 12px}
#tip td:first-child{padding-left:0;white-space:nowrap}
#tip i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:6px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:14px}td,th{padding:4px 14px 4px 0;text-align:left;
border-bottom:1px solid var(--grid);vertical-align:top}
th{font-weight:600}td.n,th.n{text-align:right;white-space:nowrap}
)css";

constexpr const char* kPageScript = R"js(
'use strict';
const data = JSON.parse(document.getElementById('data').textContent);
const BYTES = 3;  // where a point's bytes begin: [seconds, tokens, phase, ...bytes]
const panels = document.getElementById('panels');
const tip = document.getElementById('tip');
const live = document.getElementById('live');

function bytes(n) {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];
  let u = 0;
  while (Math.abs(n) >= 1024 && u < units.length - 1) { n /= 1024; ++u; }
  return (u ? n.toFixed(2) : n) + ' ' + units[u];
}
const count = n => n.toLocaleString('en-US');
function time(s) {
  if (s < 1) return (s * 1000).toFixed(0) + ' ms';
  if (s < 60) return +s.toPrecision(3) + ' s';
  const m = Math.floor(s / 60), two = x => String(Math.floor(x)).padStart(2, '0');
  return m < 60 ? m + ':' + two(s % 60) : Math.floor(m / 60) + ':' + two(m % 60) + ':' + two(s % 60);
}
function tickStep(range, most) {
  const least = Math.max(range, 1e-9) / most, power = 10 ** Math.floor(Math.log10(least));
  return power * ([1, 2, 5, 10].find(f => f * power >= least) || 10);
}
function timeStep(seconds, most) {
  if (seconds < 60) return tickStep(seconds, most);
  return [10, 15, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 28800].find(s => seconds <= s * most) ||
      3600 * tickStep(seconds / 3600, most);
}
const byteStep = (range, most) => 2 ** Math.ceil(Math.log2(Math.max(range, 1) / most));
const quote = s => s.replace(/[&<>"]/g, c => ({'&': '&amp;', '<': '&lt;', '>': '&gt;', '"': '&quot;'}[c]));
const total = p => { let sum = 0; for (let i = BYTES; i < p.length; ++i) sum += p[i]; return sum; };
// The last point at or before a time.
function at(points, seconds) {
  let low = 0, high = points.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (points[middle][0] <= seconds) low = middle; else high = middle - 1;
  }
  return low;
}

const views = data.devices.map(device => {
  const figure = document.createElement('figure');
  const near = device.budget_bytes <= 2 * Math.max(device.peak_bytes, device.planned_bytes, 1);
  figure.innerHTML = '<figcaption><b>' + quote(device.name) + '</b><span class="quiet">peak ' +
      bytes(device.peak_bytes) + (device.planned_bytes ? ' of ' + bytes(device.planned_bytes) + ' planned' : '') +
      ', budget ' + bytes(device.budget_bytes) + (near ? '' : ' (above this scale)') +
      '</span></figcaption><div class="plot"></div>';
  panels.append(figure);
  return {device, figure, near, plot: figure.querySelector('.plot')};
});

function draw(view) {
  const {device, near} = view, points = device.points;
  const width = Math.max(280, view.plot.clientWidth), narrow = width < 560;
  const left = narrow ? 70 : 84, right = width - (narrow ? 52 : 72), top = narrow ? 22 : 38;
  const tall = narrow ? 210 : 280, base = top + tall, span = Math.max(data.seconds, 1e-9);
  const held = Math.max(device.peak_bytes, device.planned_bytes, 1);
  const scale = 1.06 * (near ? Math.max(held, device.budget_bytes) : held);
  const most = Math.max(1, ...points.map(p => p[1]));
  const x = s => left + (right - left) * s / span;
  const y = b => base - tall * Math.min(b / scale, 1);
  const yTokens = n => base - tall * n / (1.06 * most);
  let out = '';
  const text = (tx, ty, s, extra = '') => `<text x="${tx.toFixed(1)}" y="${ty.toFixed(1)}" ${extra}>${s}</text>`;
  const line = (name, x1, x2, y1, y2) => `<line class="${name}" x1="${x1}" x2="${x2}" y1="${y1}" y2="${y2}"/>`;

  for (let b = 0, by = byteStep(scale, 5); b <= scale; b += by)
    out += line('grid', left, right, y(b), y(b)) + text(left - 8, y(b) + 4, bytes(b), 'text-anchor="end"');
  for (let n = 0, by = Math.max(1, tickStep(most, 4)); n <= most; n += by)
    out += text(right + 8, yTokens(n) + 4, count(n));
  out += text(right + 8, top - 8, 'tokens');
  const label = narrow ? 4 : 8;
  for (let i = 0, by = timeStep(span, label); i * by <= span * 1.0001; ++i)
    out += line('mark', x(i * by), x(i * by), base + 19, base + 24) +
        text(x(i * by), base + 38, time(i * by), 'text-anchor="middle"');

  // The whole stack first, then without its top purpose, and so on: each path is one edge.
  for (let layers = LOOK.stack.length; layers > 0; --layers) {
    const purpose = LOOK.stack[layers - 1];
    if (!device.peaks[purpose]) continue;
    let path = `M${left} ${base}`, last = -1;
    for (const p of points) {
      let sum = 0;
      for (let i = 0; i < layers; ++i) sum += p[BYTES + LOOK.stack[i]];
      const now = y(sum);
      if (Math.abs(now - last) < 0.05) continue;
      path += `H${x(p[0]).toFixed(1)}V${now.toFixed(1)}`;
      last = now;
    }
    out += `<path class="area" fill="${LOOK.colours[purpose]}" d="${path}H${right}V${base}Z"/>`;
  }
  const route = points.map((p, i) => (i ? 'L' : 'M') + x(p[0]).toFixed(1) + ' ' + yTokens(p[1]).toFixed(1)).join('');
  out += `<path class="halo" d="${route}"/><path class="tokens" d="${route}"/>`;
  // The plan's name stands on the left, the budget's on the right: they may be one line.
  const level = (value, name, word, place) => value ? line('halo', left, right, y(value), y(value)) +
      line(name, left, right, y(value), y(value)) +
      text(place === 'end' ? right - 6 : left + 6, y(value) - 5, word + ' ' + bytes(value),
           `class="strong" text-anchor="${place}"`) : '';
  out += level(device.planned_bytes, 'plan', 'plan', 'start');
  if (near) out += level(device.budget_bytes, 'limit', 'budget', 'end');

  // Labels take the first row in which they do not run into the one before.
  const free = narrow ? [left] : [left, left];
  for (const m of data.marks) {
    const name = m.count > 1 ? `${m.kind} \u00d7${m.count}` : m.kind, mx = x(m.seconds);
    out += line('mark', mx, mx, top, base);
    const row = free.findIndex(f => mx >= f && mx + 7 * name.length < right);
    if (row < 0) continue;
    free[row] = mx + 7 * name.length + 8;
    out += text(mx, top - 8 - 14 * row, quote(name));
  }
  for (let i = 0; i < points.length;) {
    let end = i;
    while (end < points.length && points[end][2] === points[i][2]) ++end;
    const from = x(points[i][0]), to = end < points.length ? x(points[end][0]) : right, phase = points[i][2];
    out += `<rect class="${phase}" x="${from}" y="${base + 2}" width="${Math.max(to - from, 0.5)}" height="16"/>`;
    if (to - from > 8 * phase.length)
      out += text((from + to) / 2, base + 14, phase, 'class="strip" text-anchor="middle"');
    i = end;
  }
  out += `<line class="cursor" x1="0" x2="0" y1="${top}" y2="${base}" visibility="hidden"/>`;
  const height = base + 46;
  view.plot.innerHTML = `<svg viewBox="0 0 ${width} ${height}" height="${height}" tabindex="0" role="img" ` +
      `aria-label="Memory of ${quote(device.name)} over ${time(data.seconds)}: peak ${bytes(device.peak_bytes)}. ` +
      `Arrow keys move through the points.">${out}</svg>`;
  view.left = left; view.right = right; view.x = x; view.top = top;
  view.svg = view.plot.firstElementChild;
  view.svg.onpointermove = e => {
    const box = view.svg.getBoundingClientRect();
    const px = (e.clientX - box.left) * width / box.width;
    show(view, Math.min(Math.max((px - left) / (right - left), 0), 1) * span);
  };
  view.svg.onpointerleave = hide;
  view.svg.onblur = hide;
  view.svg.onkeydown = e => {
    const step = {ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20}[e.key];
    const jump = {Home: 0, End: points.length - 1}[e.key];
    if (step === undefined && jump === undefined) return;
    e.preventDefault();
    const i = Math.min(Math.max(jump ?? (view.index ?? 0) + step, 0), points.length - 1);
    show(view, points[i][0], i);
  };
}

function show(view, seconds, index) {
  const {device} = view, i = index ?? at(device.points, seconds), p = device.points[i];
  view.index = i;
  for (const v of views) {
    const c = v.svg.querySelector('.cursor'), cx = v.x(seconds);
    c.setAttribute('x1', cx); c.setAttribute('x2', cx); c.setAttribute('visibility', 'visible');
  }
  const sum = total(p);
  const rows = [...LOOK.stack].reverse().filter(q => device.peaks[q]).map(q =>
      `<tr><td><i style="background:${LOOK.colours[q]}"></i>${data.purposes[q]}</td><td class="n">${bytes(p[BYTES + q])}</td></tr>`);
  const share = device.budget_bytes ? ` (${(100 * sum / device.budget_bytes).toFixed(1)}% of budget)` : '';
  tip.innerHTML = `<b>${time(seconds)}</b> ${p[2]}, ${count(p[1])} tokens<br>${bytes(sum)}${share}<table>${rows.join('')}</table>`;
  live.textContent = `${time(seconds)}, ${p[2]}, ${count(p[1])} tokens, ${bytes(sum)}${share}`;
  tip.hidden = false;
  view.figure.append(tip);
  const at_x = view.x(seconds), room = view.plot.clientWidth;
  tip.style.left = (at_x + 16 + tip.offsetWidth < room ? at_x + 16 : Math.max(0, at_x - 16 - tip.offsetWidth)) + 'px';
  tip.style.top = (view.plot.offsetTop + view.top + 6) + 'px';
}

function hide() {
  tip.hidden = true;
  for (const v of views) { v.svg.querySelector('.cursor').setAttribute('visibility', 'hidden'); v.index = undefined; }
}

views.forEach(draw);
let last = panels.clientWidth;
new ResizeObserver(() => {
  if (panels.clientWidth === last) return;
  last = panels.clientWidth;
  views.forEach(draw);
}).observe(panels);
document.body.dataset.drawn = views.length;
)js";

// JSON that may stand inside a script element: "</script" cannot occur in it.
std::string inside_script(std::string json) {
  for (size_t at = json.find('<'); at != std::string::npos; at = json.find('<', at))
    json.replace(at, 1, "\\u003c");
  return json;
}

std::string legend(const Timeline& t) {
  std::string out;
  for (auto it = run::kStackOrder.rbegin(); it != run::kStackOrder.rend(); ++it) {
    bool used = false;
    for (const TimelineDevice& device : t.devices)
      used = used || device.peaks[static_cast<size_t>(*it)] > 0;
    if (used)
      out += fmt::format("<li><i style=\"background:{}\"></i>{}</li>",
                         run::kPurposeColours[static_cast<size_t>(*it)], purpose_name(*it));
  }
  return out +
         "<li><i class=\"line\"></i>tokens in context</li>"
         "<li><i class=\"line dash\"></i>planned peak</li>"
         "<li><i class=\"line limit\"></i>budget</li>";
}

std::string peaks_table(const Timeline& t) {
  std::string rows;
  for (const TimelineDevice& device : t.devices) {
    for (int p = 0; p < kPurposeCount; ++p)
      if (const int64_t peak = device.peaks[static_cast<size_t>(p)]; peak > 0)
        rows += fmt::format(
            "<tr><td>{}</td><td>{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td></tr>\n",
            xml_quote(device.name), purpose_name(static_cast<Purpose>(p)),
            run::grouped_digits(peak), human_bytes(peak));
    rows += fmt::format(
        "<tr><th>{}</th><th>all together</th><th class=\"n\">{}</th><th class=\"n\">{}</th></tr>\n",
        xml_quote(device.name), run::grouped_digits(device.peak_bytes),
        human_bytes(device.peak_bytes));
  }
  return rows;
}

std::string marks_table(const Timeline& t) {
  std::string rows;
  for (const TimelineMark& mark : t.marks)
    rows += fmt::format(
        "<tr><td class=\"n\">{}</td><td>{}{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td>"
        "<td>{}</td></tr>\n",
        run::human_duration(mark.seconds), xml_quote(mark.kind),
        mark.count > 1 ? fmt::format(" &times;{}", mark.count) : "",
        run::grouped_digits(mark.n_tokens), mark.bytes > 0 ? human_bytes(mark.bytes) : "",
        xml_quote(mark.text));
  return rows;
}

}  // namespace

std::string Timeline::to_html() const {
  std::string stack, colours;
  for (const Purpose purpose : run::kStackOrder)
    stack += fmt::format("{}{}", stack.empty() ? "" : ",", static_cast<int>(purpose));
  for (const std::string_view colour : run::kPurposeColours)
    colours += fmt::format("{}'{}'", colours.empty() ? "" : ",", colour);
  std::string out =
      "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
      "<meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\n"
      "<title>Fathom: memory over time</title>\n<style>";
  out += kPageStyle;
  out += fmt::format(
      "</style>\n</head>\n<body>\n<main>\n<h1>Memory over time</h1>\n<p id=\"summary\">{}</p>\n"
      "<ul id=\"legend\">{}</ul>\n<div id=\"panels\"></div>\n"
      "<div id=\"tip\" hidden></div>\n<p id=\"live\" class=\"quiet\" role=\"status\" "
      "style=\"position:absolute;left:-9999px\"></p>\n"
      "<noscript><p>The chart needs JavaScript; the numbers are below.</p></noscript>\n"
      "<h2>Peaks by purpose</h2>\n<div class=\"scroll\"><table>\n<thead><tr><th>device</th>"
      "<th>purpose</th><th "
      "class=\"n\">bytes</th><th></th></tr></thead>\n<tbody>\n{}</tbody></table>"
      "</div>\n<h2>What happened</h2>\n<div class=\"scroll\"><table>\n<thead><tr>"
      "<th class=\"n\">time</th><th>what</th><th class=\"n\">tokens</th><th class=\"n\">bytes</th>"
      "<th></th></tr></thead>\n<tbody>\n{}</tbody></table></div>\n"
      "<p class=\"quiet\">{} over {}; every point is a state the device was in: per interval the "
      "one "
      "with the least and the one with the most bytes.</p>\n</main>\n",
      xml_quote(summary()), legend(*this), peaks_table(*this), marks_table(*this),
      fmt::format("{} changes", run::grouped_digits(n_changes)), run::human_duration(seconds));
  out += "<script type=\"application/json\" id=\"data\">" + inside_script(to_json()) +
         "</script>\n<script>\nconst LOOK = {stack: [" + stack + "], colours: [" + colours + "]};";
  out += kPageScript;
  return out + "</script>\n</body>\n</html>\n";
}

}  // namespace fathom
