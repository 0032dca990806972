"use strict";
// A model's scores come as sums and token values; what depends on hyperparameters is computed here.
// Texts enter the page as text nodes only, so that none of them can be markup.
const $ = (selector, root = document) => root.querySelector(selector);
const element = (tag, properties = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
};
const drawn = (tag, attributes, text = "") => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.textContent = text;
  return node;
};
const fixed = (value, digits = 2) => value.toFixed(digits).replace("-", "−");
const percent = value => `${Math.round(100 * value)}%`;
const sum = values => values.reduce((total, value) => total + value, 0), mean = values => sum(values) / values.length;
const summary = JSON.parse($("#summary").textContent), stored = document.querySelectorAll("script.pair");
const objective = summary.objective, pairs = summary.pairs, form = $("#controls"), fields = form.querySelectorAll("[name]");
const ROWS = 100; // of the table, at a time
let settings, shown, current, limit, selected = null, order = ["pair", 1];

// ---------------------------------------------------------------- the margin, as in rmipo/objectives/rmipo.py
const SCHEDULES = {
  exponential: d => Math.exp(-d),
  linear: (d, span) => 1 - Math.min(d / span, 1),
  cosine: (d, span) => (1 + Math.cos(Math.PI * Math.min(d / span, 1))) / 2,
  constant: () => 0.5,
};
const margin = (delta, s) =>
  s.gamma_min + (s.gamma_max - s.gamma_min) * SCHEDULES[s.schedule](Math.max(delta, 0), s.span);

// A side is [log pi(y|x), log pi(y), tokens scored in the first, tokens scored in the second].
function measure([chosen, rejected], s) {
  const average = ([given, , tokens]) => given / tokens;
  const pmi = ([given, prior, tokens, priorTokens]) =>
    s.pmi_normalization === "token" ? given / tokens - prior / Math.max(priorTokens, 1) : given - prior;
  const gap = average(chosen) - average(rejected), delta = pmi(chosen) - pmi(rejected), gamma = margin(delta, s);
  const reward = s.beta * (s.length_normalization ? gap : chosen[0] - rejected[0]);
  const subtracted = s.fidelity === "release" ? s.beta * gamma : gamma;
  const max = s.schedule !== "constant" && gamma >= s.gamma_max - 1e-6, length = chosen[2] - rejected[2];
  return {gap, delta, gamma, reward, weight: 1 / (1 + Math.exp(reward - subtracted)), length, max, less: gap < 0};
}

function recompute() {
  form.gamma_min.max = form.gamma_max.value;
  if (!form.checkValidity()) return;
  const value = field => field.type === "number" ? Number(field.value) : field.value;
  settings = {...objective, ...Object.fromEntries([...fields].map(field => [field.name, value(field)]))};
  for (const pair of pairs) {
    Object.assign(pair, measure(pair.sides, settings));
    pair.moved = pair.after && measure(pair.after, settings);
  }
  const [delta, gap] = ["delta", "gap"].map(name => Math.sqrt(mean(pairs.map(pair => pair[name] ** 2))));
  for (const pair of pairs) pair.swapped = pair.delta < -delta && pair.gap < -gap;
  showVerdict();
  showCharts();
  showAfter();
  filter();
}

// ---------------------------------------------------------------- verdict and recipe
function showVerdict() {
  const count = name => pairs.filter(pair => pair[name]).length, pinned = percent(count("max") / pairs.length);
  const card = (number, range, text, noise = false) => element("div", {className: noise ? "noise" : ""},
    element("b", {}, `${number} `, element("small", {}, range)), text);
  $("#verdict").replaceChildren(
    settings.schedule === "constant"
      ? card(fixed(margin(0, settings)), "everywhere", "The schedule is constant: RMiPO is SimPO with this margin.")
      : card(pinned, "at γ max", `On ${pinned} of these pairs RMiPO is SimPO with a margin of ${settings.gamma_max}.`),
    ...summary.findings[settings.pmi_normalization].map(found => card(found.number, found.range, found.text, found.noise)),
    card(`${count("cut")} cut`, `${summary.dropped} dropped`,
      `${count("alike")} near-duplicates, ${count("swapped")} probably mislabelled. ${summary.reasons}`));
  const text = value => Number.isInteger(value) ? value.toFixed(1) : value;
  $("#recipe").textContent = "objective:\n  name: rmipo\n" + ["beta", "gamma_min", "gamma_max", "schedule", "span",
    "pmi_normalization", "prior_context", "fidelity"].map(key => `  ${key}: ${text(settings[key])}`).join("\n");
}

// ---------------------------------------------------------------- charts
function ticks([low, high], about) {
  const raw = (high - low) / about, power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find(factor => factor * power >= raw), first = Math.ceil(low / step);
  return Array.from({length: Math.floor(high / step) - first + 1}, (_, k) => Number(((first + k) * step).toPrecision(6)));
}
function extent(values, ...also) {
  const low = Math.min(...values, ...also), high = Math.max(...values, ...also), room = (high - low) * 0.04 || 0.5;
  return [low - room, high + room];
}

// points: {x, y, pair, kind}. lines: [class, [[x, y], ...]]. marks: [y, label] at the right edge.
function chart(id, points, {x, y, xs, ys, lines = [], marks = [], width = 330, height = 210}) {
  xs ??= extent(points.map(p => p.x));
  ys ??= extent(points.map(p => p.y));
  const node = $(id), [left, right, top, bottom] = [40, width - (marks.length ? 28 : 8), 16, height - 32];
  const px = value => left + (value - xs[0]) / (xs[1] - xs[0]) * (right - left);
  const py = value => bottom - (value - ys[0]) / (ys[1] - ys[0]) * (bottom - top);
  const label = (text, x, y, anchor) => drawn("text", {x, y, "text-anchor": anchor}, String(text).replace("-", "−"));
  const path = (name, d, more) => drawn("path", {class: name, d, ...more});
  const places = points.map(p => ({...p, px: px(p.x), py: py(p.y)}));
  const here = drawn("circle", {class: "here", r: 5, transform: "scale(0)"}), brush = drawn("rect", {class: "brush", width: 0});
  node.setAttribute("viewBox", `0 0 ${width} ${height}`);
  node.replaceChildren(
    path("axis", `M${left} ${top}V${bottom}H${right}` + (xs[0] < 0 && xs[1] > 0 ? `M${px(0)} ${top}V${bottom}` : "")),
    ...ticks(xs, 5).map(t => label(t, px(t), height - 18, "middle")),
    ...ticks(ys, 4).map(t => label(t, left - 5, py(t) + 4, "end")),
    ...marks.map(([at, text]) => label(text, right + 4, py(at) + 4, "start")),
    label(x, (left + right) / 2, height - 4, "middle"), label(y, left, 10, "start"),
    // A line of no length with a round end is a dot: thousands of them are one element.
    ...[...new Set(points.map(p => p.kind))].map(kind => path(`dots ${kind}`, places.filter(p => p.kind === kind)
      .map(p => `M${p.px.toFixed(1)} ${p.py.toFixed(1)}h0`).join(""), {"stroke-width": points.length > 600 ? 3 : 5})),
    ...lines.map(([name, at]) => path(name, "M" + at.map(([a, b]) => `${px(a).toFixed(1)} ${py(b).toFixed(1)}`).join("L"))),
    brush, here);
  node.mark = () => {
    const place = places.find(p => p.pair === current);
    here.setAttribute("transform", place ? `translate(${place.px} ${place.py})` : "scale(0)");
  };
  let start = null;
  const at = event => [event.offsetX, event.offsetY].map(value => value * width / node.clientWidth);
  const nearest = ([cx, cy]) => {
    const distances = places.map(p => Math.hypot(p.px - cx, p.py - cy)), least = Math.min(20, ...distances);
    return places[distances.indexOf(least)]?.pair;
  };
  const area = (a, b) => [0, 1].flatMap(axis => [Math.min(a[axis], b[axis]), Math.abs(a[axis] - b[axis])]);
  node.onpointerdown = event => { start = at(event); };
  node.onpointermove = event => {
    const pair = nearest(at(event));
    showTip(event, pair && `${pair.index + 1}: ${pair.title}\nΔPMI ${fixed(pair.delta)}, γ ${fixed(pair.gamma)}, `
      + `r ${fixed(pair.reward)}, σ(γ − r) ${fixed(pair.weight)}`);
    if (start) area(start, at(event)).forEach((value, k) => brush.setAttribute(["x", "width", "y", "height"][k], value));
  };
  node.onpointerup = event => {
    const [low, wide, up, high] = area(start ?? at(event), at(event)), pair = nearest(at(event));
    if (start && wide + high > 6) {
      const inside = p => p.px >= low && p.px <= low + wide && p.py >= up && p.py <= up + high;
      selected = new Set(places.filter(inside).map(p => p.pair));
      filter();
    } else if (pair) { show(pair); $("#pair").scrollIntoView(); }
    node.onpointerleave();
  };
  node.onpointerleave = () => { start = null; brush.setAttribute("width", 0); };
}

const kindOf = pair => pair.max ? "c1" : "c0";
// Pairs of one bin on top of each other: a histogram in which each pair can be pointed at.
function stacked(name, [low, high], bins = 60) {
  const counts = {};
  return pairs.map(pair => {
    const bin = Math.max(0, Math.min(bins - 1, Math.floor((pair[name] - low) / (high - low) * bins)));
    counts[bin] = (counts[bin] ?? 0) + 1;
    return {pair, x: low + (bin + 0.5) / bins * (high - low), y: counts[bin], kind: kindOf(pair)};
  });
}

function showCharts() {
  const sorted = pairs.map(pair => pair.delta).sort((a, b) => a - b), tail = Math.floor(pairs.length / 50);
  const delta = extent(sorted.slice(tail, pairs.length - tail), 0), gamma = extent([settings.gamma_min, settings.gamma_max]);
  const dots = stacked("delta", delta), ys = [0, 1.06 * Math.max(...dots.map(p => p.y))], scale = ys[1] / 1.06 / settings.gamma_max;
  const curve = Array.from({length: 121}, (_, k) => delta[0] + (delta[1] - delta[0]) * k / 120);
  chart("#chart-delta", dots, {x: `nats${settings.pmi_normalization === "token" ? " per token" : ""}`, y: "pairs", xs: delta, ys,
    lines: [["curve", curve.map(d => [d, margin(d, settings) * scale])]],
    marks: [settings.gamma_min, settings.gamma_max].map(value => [value * scale, value])});
  chart("#chart-gamma", stacked("gamma", gamma), {x: "γ", y: "pairs", xs: gamma});
  chart("#chart-length", pairs.map(pair => ({pair, x: pair.length, y: pair.delta, kind: kindOf(pair)})),
    {x: "tokens of chosen − rejected", y: "ΔPMI"});
  chart("#chart-weight", pairs.map(pair => ({pair, x: pair.reward, y: pair.gamma, kind: `w${Math.floor(pair.weight * 4.999)}`})),
    {x: "r", y: "γ", ys: gamma});
}

function showTip(event, text = "") {
  const tip = $("#tip");
  tip.textContent = text; // the style hides an empty one
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${Math.min(event.clientY + 18, innerHeight - tip.offsetHeight - 8)}px`;
}

// ---------------------------------------------------------------- the table
const COLUMNS = { // title: what it sorts by
  pair: pair => pair.index, "ΔPMI": pair => pair.delta, "γ": pair => pair.gamma, r: pair => pair.reward,
  "σ(γ − r)": pair => pair.weight, "ΔA": pair => pair.gap, "|y| chosen": pair => pair.sides[0][2],
  "|y| rejected": pair => pair.sides[1][2],
  ...(summary.after && {"γ after": pair => pair.moved?.gamma ?? NaN, "r after": pair => pair.moved?.reward ?? NaN}),
  flags: pair => flagsOf(pair).length,
};
const boxes = [...document.querySelectorAll("#filters [type=checkbox]")];
const flagsOf = pair => boxes.filter(box => pair[box.name]).map(box => box.parentNode.textContent.trim());
const detail = pair => JSON.parse(stored[pair.index].textContent);
const textOf = pair => pair.text ??= (({prompt, sides}) => [prompt.text, prompt.cut, ...sides.flatMap(side =>
  [side.tokens.join(""), side.cut])].join("\n").toLowerCase())(detail(pair));

function filter() {
  const wanted = $("#search").value.toLowerCase(), [by, sign] = order;
  shown = pairs.filter(pair => boxes.every(box => !box.checked || pair[box.name]) && (!selected || selected.has(pair))
    && (!wanted || textOf(pair).includes(wanted)));
  shown.sort((a, b) => sign * (COLUMNS[by](a) - COLUMNS[by](b)) || a.index - b.index);
  $("#shown").textContent = `${shown.length} of ${pairs.length} pairs${selected ? ", selected in a chart (Esc: all)" : ""}`;
  limit = ROWS;
  show(shown.includes(current) ? current : shown[0]);
}

function showRows() {
  const texts = {pair: pair => `${pair.index + 1}  ${pair.title}`, flags: pair => flagsOf(pair).join(", ")};
  const cell = (pair, title) => texts[title]?.(pair) ?? fixed(COLUMNS[title](pair), title.startsWith("|") ? 0 : 3);
  $("#list tbody").replaceChildren(...shown.slice(0, limit).map(pair => element("tr",
    {onclick: () => show(pair), className: pair === current ? "open" : ""},
    ...Object.keys(COLUMNS).map(title => element("td", {}, cell(pair, title))))));
  for (const head of $("#list tr").children) head.dataset.sorted = head.textContent === order[0] ? order[1] : "";
}

// ---------------------------------------------------------------- one pair
const NAMES = ["chosen", "rejected"];
const floats = text => new Float32Array(Uint8Array.from(atob(text), character => character.charCodeAt(0)).buffer);
const cutText = part => part.lost ? element("span", {className: "cut"}, `[${part.lost} tokens cut: ${part.cut}]`) : "";

// Shows the tokens of one response; returns its cumulative PMI.
function showSide(node, name, side, scores) {
  const given = floats(scores), prior = floats(side.prior), unscored = given.length - prior.length;
  const difference = [...given].map((value, t) => t < unscored ? 0 : value - prior[t - unscored]);
  $("h3", node).textContent = `${name}: ${given.length} tokens, log π(y|x) ${fixed(sum(given))}, PMI ${fixed(sum(difference))}`;
  $(".text", node).replaceChildren(...side.tokens.map((text, t) => {
    const kind = `token ${difference[t] < 0 ? "neg" : "pos"} ${side.special.includes(t) ? "special" : ""}`;
    const token = element("span", {className: kind}, text);
    token.style.setProperty("--a", Math.min(Math.abs(difference[t]) / 4, 1));
    token.dataset.tip = `${JSON.stringify(text)}, token ${t + 1}\nlog π(yₜ|x, y<ₜ) ${fixed(given[t], 4)}\n`
      + (t < unscored ? "not scored without the prompt"
        : `log π(yₜ|y<ₜ) ${fixed(prior[t - unscored], 4)}\ndifference ${fixed(difference[t], 4)}`);
    return token;
  }), cutText(side));
  let total = 0;
  return [[0, 0], ...difference.map((value, t) => [t + 1, total += value])];
}

function show(pair) {
  $("#pair").hidden = !pair;
  current = pair;
  limit = Math.max(limit, shown.indexOf(pair) + ROWS);
  showRows();
  for (const node of document.querySelectorAll(".charts svg")) node.mark?.();
  if (!pair) return;
  const content = detail(pair), partner = pairs[content.other], other = partner && $("#other input").checked;
  $("#pair h2").textContent = `Pair ${pair.index + 1} of ${pairs.length}, row ${pair.row} of the data`;
  $("#pair .numbers").textContent = [`ΔPMI ${fixed(pair.delta, 3)}`, `γ ${fixed(pair.gamma, 3)}`, `r ${fixed(pair.reward, 3)}`,
    `gradient weight ${fixed(pair.weight, 3)}`, ...flagsOf(pair)].join(" · ");
  $("#other").hidden = !partner;
  $("#other span").textContent = partner ? `scored under the prompt of pair ${partner.index + 1}` : "";
  const prompt = other ? detail(partner).prompt : content.prompt;
  $("#prompt").replaceChildren(cutText(prompt), prompt.text);
  const lines = content.sides.map((side, k) =>
    showSide($(".sides").children[k], NAMES[k], side, other ? side.other : side.given));
  chart("#cumulative", [], {x: "tokens", y: "nats", xs: [0, Math.max(...lines.map(line => line.length - 1))],
    ys: extent(lines.flat().map(([, value]) => value)), lines: lines.map((line, k) => [`line ${NAMES[k]}`, line]),
    width: 900, height: 200});
  const list = $("#list"), row = $("#list .open");
  const away = row && Math.abs(row.offsetTop - list.scrollTop - list.clientHeight / 2);
  if (away > list.clientHeight / 2 - 40) list.scrollTop = row.offsetTop - 80;
}

// How the pairs moved from the first model to the second.
function showAfter() {
  const both = pairs.filter(pair => pair.moved), after = pair => pair.moved, before = pair => pair;
  $("#after").hidden = !both.length;
  $("#after h2").textContent = `From ${summary.model} to ${summary.after}`;
  if (!both.length) return;
  const change = (value, text) => [before, after].map(side => text(mean(both.map(pair => Number(value(side(pair))))))).join(" → ");
  $("#after ul").replaceChildren();
  for (const [name, title, claim, holds] of [["reward", "reward difference", "chosen preferred", pair => pair.reward > 0],
    ["delta", "ΔPMI", "chosen with the higher PMI", pair => pair.delta > 0], ["gamma", "γ", "at γ max", pair => pair.max]]) {
    const range = extent(both.flatMap(pair => [pair[name], pair.moved[name]]));
    $("#after ul").append(element("li", {}, `Mean ${title} ${change(pair => pair[name], fixed)}, ${claim} ${change(holds, percent)}`));
    chart(`#after-${name}`, both.map(pair => ({pair, x: pair[name], y: pair.moved[name], kind: kindOf(pair)})),
      {x: "before", y: "after", xs: range, ys: range, lines: [["curve", range.map(end => [end, end])]]});
  }
}

// ---------------------------------------------------------------- controls, keys
const step = by => shown.length && show(shown[(shown.indexOf(current) + by + shown.length) % shown.length]);
const reset = () => { fields.forEach(field => { field.value = objective[field.name]; }); recompute(); };
$("#about").textContent = summary.about;
const sort = title => { order = [title, order[0] === title ? -order[1] : 1]; filter(); };
$("#list tr").append(...Object.keys(COLUMNS).map(title =>
  element("th", {}, element("button", {type: "button", onclick: () => sort(title)}, title))));
form.oninput = recompute;
$("#reset").onclick = reset;
$("[value=sequence]").disabled = objective.fidelity === "release";
$("#filters").oninput = filter;
$("#list").onscroll = ({target}) => {
  if (limit < shown.length && target.scrollTop + target.clientHeight > target.scrollHeight - 300) { limit += ROWS; showRows(); }
};
$("#other input").onchange = () => show(current);
$("#previous").onclick = () => step(-1);
$("#next").onclick = () => step(1);
$("#copy").onclick = () => navigator.clipboard.writeText($("#recipe").textContent);
document.onpointerover = event => showTip(event, event.target.dataset?.tip);
document.onkeydown = event => {
  const all = () => { document.activeElement.blur(); selected = null; filter(); };
  const act = {Escape: all, ArrowRight: () => step(1), ArrowLeft: () => step(-1), "/": () => $("#search").focus()}[event.key];
  const typing = event.target.matches("input:not([type=checkbox]), select") && event.key !== "Escape";
  if (act && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) { event.preventDefault(); act(); }
};
reset();
