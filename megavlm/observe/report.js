"use strict";
// Reads the values under the pointer (or at the arrow keys) of every chart. Without it, the charts are all still there.

function formatValue(value) {
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size < 1e-3 || size >= 1e9) return value.toExponential(2);
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  return value.toPrecision(4);
}

function nearestIndex(sorted, wanted) {
  let low = 0, high = sorted.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < wanted) low = middle; else high = middle;
  }
  return wanted - sorted[low] <= sorted[high] - wanted ? low : high;
}

function add(parent, tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return parent.appendChild(element);
}

function place(value, low, high, isLog) {
  return isLog ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
}

function attach(area, data, scale) {
  const [low, high] = data.views[scale];
  const steps = data.curves[0].x;
  const parts = [];
  let at = null;

  function clear() {
    while (parts.length) parts.pop().remove();
    at = null;
  }

  function show(index) {
    clear();
    at = Math.max(0, Math.min(steps.length - 1, index));
    const step = steps[at];
    const left = 100 * place(step, data.first, data.last, false);
    const cursor = add(area, "div", "cursor");
    cursor.style.left = left + "%";
    const tip = add(area, "div", "tip");
    add(tip, "strong", "", "step " + step.toLocaleString("en-US"));
    const rows = new Map();
    const body = add(tip, "table");
    for (const curve of data.curves) {
      const found = nearestIndex(curve.x, step);
      const value = curve.y[found], where = curve.x[found];
      const isNear = Math.abs(where - step) <= 0.01 * (data.last - data.first);
      if (rows.has(curve.label)) {
        add(rows.get(curve.label), "td", "mean", "mean " + formatValue(value));
        continue;
      }
      const row = add(body, "tr");
      rows.set(curve.label, row);
      const name = add(row, "td");
      add(name, "i", "s-" + curve.style);
      name.append(curve.label);
      add(row, "td", "", formatValue(value));
      if (!isNear) add(row, "td", "mean", "at step " + where.toLocaleString("en-US"));
      if (scale === "log" && value <= 0) continue;
      const dot = add(area, "div", "dot s-" + curve.style);
      dot.style.left = 100 * place(where, data.first, data.last, false) + "%";
      dot.style.bottom = 100 * place(value, low, high, scale === "log") + "%";
      dot.style.marginBottom = "-4.5px";
      parts.push(dot);
    }
    tip.style[left > 50 ? "right" : "left"] = "calc(" + (left > 50 ? 100 - left : left) + "% + 12px)";
    parts.push(cursor, tip);
  }

  area.addEventListener("pointermove", (event) => {
    const box = area.getBoundingClientRect();
    const share = Math.max(0, Math.min(1, (event.clientX - box.left) / box.width));
    show(nearestIndex(steps, data.first + share * (data.last - data.first)));
  });
  area.addEventListener("pointerleave", clear);
  area.addEventListener("blur", clear);
  area.addEventListener("keydown", (event) => {
    const stride = event.shiftKey ? Math.max(1, Math.round(steps.length / 20)) : 1;
    const start = at === null ? steps.length - 1 : at;
    const wanted = { ArrowLeft: start - stride, ArrowRight: start + stride, Home: 0, End: steps.length - 1 }[event.key];
    if (event.key === "Escape") clear();
    if (wanted === undefined) return;
    event.preventDefault();
    show(wanted);
  });
}

for (const figure of document.querySelectorAll("figure.chart")) {
  const data = JSON.parse(figure.querySelector("script.readout").textContent);
  for (const plot of figure.querySelectorAll(".plot")) attach(plot.querySelector(".area"), data, plot.dataset.scale);
}
