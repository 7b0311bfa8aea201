"use strict";
// Draws the bands of a timeline on one canvas with one time axis, and lets the reader zoom, move and point at boxes.
{
  const figure = document.getElementById("bands");
  const data = JSON.parse(figure.querySelector("script.drawing").textContent);
  const stage = figure.querySelector(".stage");
  const numRanks = data.bands[0].lanes.length;
  const whole = Math.max(...data.bands.map((band) => band.makespan));
  const unit = whole >= 0.9995 ? ["s", 1] : whole >= 0.9995e-3 ? ["ms", 1e-3] : ["µs", 1e-6];
  const laneHeight = Math.max(9, Math.min(30, Math.floor(400 / numRanks)));
  const GAP = laneHeight > 12 ? 3 : 1, HEAD = 27, AXIS = 30, LEFT = numRanks > 99 ? 64 : 56, RIGHT = 14;
  const bandHeight = HEAD + numRanks * (laneHeight + GAP);
  const height = data.bands.length * bandHeight + AXIS;
  const canvas = stage.appendChild(document.createElement("canvas"));
  const pen = canvas.getContext("2d");
  let from = 0, to = whole, width = 0, colours = {}, pointed = null, scheduled = false;

  canvas.tabIndex = 0;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", "Timeline, one lane a pipeline rank; the tables below hold its figures");
  figure.querySelector(".buttons").hidden = false;

  const plotWidth = () => width - LEFT - RIGHT;
  const toX = (time) => LEFT + ((time - from) / (to - from)) * plotWidth();
  const toTime = (x) => from + ((x - LEFT) / plotWidth()) * (to - from);
  const laneTop = (band, rank) => band * bandHeight + HEAD + rank * (laneHeight + GAP);

  function readColours() {
    const style = getComputedStyle(figure);
    const names = ["F", "B", "EF", "EB", "E", "send", "reduce", "lane", "wait-language", "wait-encoder"];
    colours = Object.fromEntries(names.map((name) => [name, style.getPropertyValue("--t-" + name).trim()]));
    for (const name of ["text", "soft", "faint", "grid", "axis", "surface"]) {
      colours[name] = style.getPropertyValue("--" + name).trim();
    }
    colours.font = style.fontFamily;
    const ratio = window.devicePixelRatio || 1;
    for (const name of ["wait-language", "wait-encoder"]) colours[name] = hatch(colours[name], ratio);
  }

  function hatch(colour, ratio) {
    const tile = document.createElement("canvas");
    const size = Math.round(6 * ratio);
    tile.width = tile.height = size;
    const brush = tile.getContext("2d");
    brush.strokeStyle = colour;
    brush.lineWidth = 1.1 * ratio;
    for (const shift of [-size, 0, size]) {
      brush.moveTo(shift - 1, size + 1);
      brush.lineTo(shift + size + 1, -1);
    }
    brush.stroke();
    const pattern = pen.createPattern(tile, "repeat");
    pattern.setTransform(new DOMMatrix().scale(1 / ratio));
    return pattern;
  }

  function inkOn(colour) {
    const [red, green, blue] = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
    return 0.299 * red + 0.587 * green + 0.114 * blue > 125 ? "#10161b" : "#ffffff";
  }

  // The first event that ends behind a time; events of a lane follow each other.
  function firstAfter(lane, time) {
    let low = 0, high = lane.length / EVENT_WIDTH;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (endOf(lane, middle) <= time) low = middle + 1; else high = middle;
    }
    return low;
  }

  function schedule() {
    if (scheduled) return;
    scheduled = true;
    requestAnimationFrame(() => { scheduled = false; draw(); });
  }

  function draw() {
    const ratio = window.devicePixelRatio || 1;
    width = stage.clientWidth;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
      canvas.style.height = height + "px";
    }
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    drawAxis();
    data.bands.forEach((band, number) => {
      pen.font = "600 13px " + colours.font;
      pen.fillStyle = colours.text;
      pen.textAlign = "left";
      pen.textBaseline = "alphabetic";
      pen.fillText(band.name, 0, number * bandHeight + 18);
      const nameWidth = pen.measureText(band.name).width;
      pen.font = "12px " + colours.font;
      pen.fillStyle = colours.faint;
      pen.fillText(formatTime(band.makespan, whole * 1e-3) + " " + unit[0], nameWidth + 8, number * bandHeight + 18);
      band.lanes.forEach((lane, rank) => drawLane(lane, laneTop(number, rank), rank, band.makespan));
      drawEnd(band, number);
    });
  }

  function drawAxis() {
    const step = niceStep((to - from) / Math.max(2, plotWidth() / 95));
    pen.font = "12px " + colours.font;
    pen.textAlign = "center";
    pen.textBaseline = "alphabetic";
    for (let tick = Math.ceil(from / step) * step; tick <= to + step * 1e-6; tick += step) {
      const x = Math.round(toX(tick)) + 0.5;
      pen.fillStyle = colours.grid;
      for (let band = 0; band < data.bands.length; band += 1) {
        pen.fillRect(x - 0.5, band * bandHeight + HEAD - 4, 1, bandHeight - HEAD + 4);
      }
      pen.fillStyle = colours.faint;
      const last = tick + step > to + step * 1e-6;
      const text = formatTime(tick, step) + (last ? " " + unit[0] : "");
      pen.fillText(text, Math.min(x, width - pen.measureText(text).width / 2), height - AXIS + 15);
    }
    // Which part of the step is shown.
    if (to - from < whole * 0.999) {
      pen.fillStyle = colours.grid;
      pen.fillRect(LEFT, height - 6, plotWidth(), 4);
      pen.fillStyle = colours.axis;
      pen.fillRect(LEFT + (from / whole) * plotWidth(), height - 6, Math.max(4, ((to - from) / whole) * plotWidth()), 4);
    }
  }

  function drawEnd(band, number) {
    const x = toX(band.makespan);
    if (x < LEFT || x > width) return;
    pen.fillStyle = colours.axis;
    pen.fillRect(Math.round(x), number * bandHeight + HEAD - 4, 1, bandHeight - HEAD + 4);
  }

  function drawLane(lane, top, rank, makespan) {
    pen.font = "12px " + colours.font;
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    if (laneHeight >= 12 || rank % Math.ceil(14 / laneHeight) === 0) {
      pen.fillStyle = colours.soft;
      pen.fillText("rank " + rank, LEFT - 8, top + laneHeight / 2 + 0.5);
    }
    pen.save();
    pen.beginPath();
    pen.rect(LEFT, top - 2, plotWidth() + RIGHT, laneHeight + 4);
    pen.clip();
    pen.fillStyle = colours.lane;
    pen.fillRect(toX(0), top, toX(makespan) - toX(0), laneHeight);
    pen.textAlign = "center";
    pen.font = "600 " + Math.min(12, laneHeight - 1) + "px " + colours.font;
    let drawnTo = -1;
    for (let at = firstAfter(lane, from); at < lane.length / EVENT_WIDTH && startOf(lane, at) < to; at += 1) {
      const left = toX(startOf(lane, at)), right = toX(endOf(lane, at));
      if (right - left < 0.7 && right < drawnTo + 0.7) continue; // thousands of them share a pixel
      drawEvent(lane, at, left, Math.max(right, left + 0.7), top);
      drawnTo = Math.max(right, left + 0.7);
    }
    pen.restore();
  }

  function drawEvent(lane, at, left, right, top) {
    const { kind, microbatch, payload, name } = eventAt(data, lane, at);
    const size = right - left;
    if (kind === "receive") {
      const isLanguage = ["activation", "gradient"].includes(payload);
      pen.fillStyle = colours[isLanguage ? "wait-language" : "wait-encoder"];
      pen.fillRect(left, top, size, laneHeight);
      return;
    }
    pen.fillStyle = colours[kind];
    pen.fillRect(left, top, size > 4 ? size - 1 : size, laneHeight);
    const first = Math.max(left, LEFT), last = Math.min(right, width - RIGHT);
    if (isWork(kind) && last - first > 6 + 7 * name.length) {
      pen.fillStyle = inkOn(colours[kind]);
      pen.fillText(name, (first + last) / 2, top + laneHeight / 2 + 1);
    }
    if (isWork(kind) && microbatch === pointed) {
      pen.strokeStyle = colours.text;
      pen.lineWidth = 2;
      pen.strokeRect(left, top, Math.max(1, size - 1), laneHeight);
    }
  }

  const say = (seconds) => formatTime(seconds, Math.max((to - from) * 1e-5, whole * 1e-7)) + " " + unit[0];

  function formatTime(seconds, step) {
    const decimals = Math.max(0, Math.min(9, Math.ceil(-Math.log10(step / unit[1]) - 1e-9)));
    return (seconds / unit[1]).toLocaleString("en-US", { minimumFractionDigits: decimals, maximumFractionDigits: decimals });
  }

  function niceStep(raw) {
    const power = 10 ** Math.floor(Math.log10(raw));
    return [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= raw * 0.999999);
  }

  function show(first, last) {
    const span = Math.min(whole, Math.max(whole / 5000, last - first));
    const middle = (first + last) / 2;
    from = Math.max(0, Math.min(whole - span, middle - span / 2));
    to = from + span;
    schedule();
  }

  function zoom(factor, around = (from + to) / 2) {
    const span = Math.min(whole, Math.max(whole / 5000, (to - from) * factor));
    const first = around - ((around - from) / (to - from)) * span;
    show(first, first + span);
  }

  const move = (seconds) => show(from + seconds, to + seconds);

  // What stands at a point: the band and rank of the lane, the time, and the event (-1: nothing happens there).
  function find(x, y) {
    const band = Math.floor(y / bandHeight);
    const rank = Math.floor((y - band * bandHeight - HEAD) / (laneHeight + GAP));
    const time = toTime(x);
    if (band >= data.bands.length || rank < 0 || rank >= numRanks || x < LEFT) return null;
    if (time < 0 || time > data.bands[band].makespan) return null;
    const lane = data.bands[band].lanes[rank];
    const at = firstAfter(lane, time);
    const isThere = at < lane.length / EVENT_WIDTH && startOf(lane, at) <= time;
    return { band, rank, time, lane, at: isThere ? at : -1, next: at };
  }

  const tip = document.createElement("div"), cursor = document.createElement("div");
  tip.className = "tip";
  cursor.className = "cursor";

  function hide() {
    tip.remove();
    cursor.remove();
    if (pointed !== null) { pointed = null; schedule(); }
  }

  function point(x, y) {
    const spot = find(x, y);
    if (!spot) return hide();
    cursor.style.left = x + "px";
    cursor.style.bottom = AXIS + "px";
    const [title, rows] = describeSpot(data, spot, say);
    const head = document.createElement("strong"), table = document.createElement("table");
    head.textContent = title;
    for (const [name, value] of rows) {
      const row = table.insertRow();
      row.insertCell().textContent = name;
      row.insertCell().textContent = value;
    }
    tip.replaceChildren(head, table);
    stage.append(cursor, tip);
    const right = x + 16 + tip.offsetWidth > width;
    tip.style.left = Math.max(0, right ? x - 16 - tip.offsetWidth : x + 16) + "px";
    const below = laneTop(spot.band, spot.rank) + laneHeight + 8;
    tip.style.top = (below + tip.offsetHeight > height + 40 ? laneTop(spot.band, spot.rank) - tip.offsetHeight - 8 : below) + "px";
    const event = spot.at < 0 ? null : eventAt(data, spot.lane, spot.at);
    const fresh = event && isWork(event.kind) ? event.microbatch : null;
    if (fresh !== pointed) { pointed = fresh; schedule(); }
  }

  let dragX = null;
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    dragX = event.offsetX;
    canvas.setPointerCapture(event.pointerId);
    canvas.classList.add("moving");
  });
  canvas.addEventListener("pointermove", (event) => {
    if (dragX === null) return point(event.offsetX, event.offsetY);
    hide();
    move(((dragX - event.offsetX) / plotWidth()) * (to - from));
    dragX = event.offsetX;
  });
  const drop = () => { dragX = null; canvas.classList.remove("moving"); };
  canvas.addEventListener("pointerup", drop);
  canvas.addEventListener("pointercancel", drop);
  canvas.addEventListener("pointerleave", () => { if (dragX === null) hide(); });
  canvas.addEventListener("dblclick", (event) => zoom(event.shiftKey ? 2 : 0.5, toTime(event.offsetX)));
  canvas.addEventListener("wheel", (event) => {
    // Without a key the wheel scrolls the page, as everywhere; a pinch on a touchpad comes with Ctrl.
    if (event.ctrlKey || event.metaKey || event.altKey) {
      event.preventDefault();
      hide();
      zoom(Math.exp(Math.max(-60, Math.min(60, event.deltaY)) * 0.004), toTime(event.offsetX));
    } else if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
      event.preventDefault();
      hide();
      move(((event.deltaX || event.deltaY) / plotWidth()) * (to - from));
    }
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    const span = to - from;
    const actions = {
      ArrowLeft: () => move(-span / 8), ArrowRight: () => move(span / 8), "+": () => zoom(0.6), "=": () => zoom(0.6),
      "-": () => zoom(1 / 0.6), 0: () => show(0, whole), Home: () => show(0, span), End: () => show(whole - span, whole),
    };
    if (!Object.hasOwn(actions, event.key) || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    hide();
    actions[event.key]();
  });
  for (const button of figure.querySelectorAll(".buttons button")) {
    button.addEventListener("click", () => {
      ({ in: () => zoom(0.6), out: () => zoom(1 / 0.6), fit: () => show(0, whole) })[button.dataset.do]();
    });
  }

  const restyle = () => { readColours(); schedule(); };
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", restyle);
  new ResizeObserver(restyle).observe(stage);
  restyle();
}
