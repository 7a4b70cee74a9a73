// A chart of the last 15 minutes, drawn in SVG.
"use strict";

const SPAN_MS = 15 * 60 * 1000;
const HEIGHT = 104;
const LEFT = 44;
const BOTTOM = 18;
const TOP = 8;
const STYLES = ["first", "second", "third"];

/** Return the smallest round number that is not below a value. */
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 2.5, 5, 10].find((step) => step * power >= value * 0.999) * power;
}

class Chart {
  /**
   * `lines` returns the lines of some points: [{name, value: point => number or null}…], three at most.
   * `format` makes text of a value, `least` is the smallest upper end of the scale.
   */
  constructor({ title, note, lines, format, least = 1, kind = "" }) {
    Object.assign(this, { title, lines, format, least });
    this.points = [];
    this.at = null; // index of the point under the cursor
    this.gap = 12500;
    this.now = h("b", {}, NONE);
    this.svg = s("svg", { role: "img", tabindex: 0, "aria-label": title });
    this.legend = h("ul", {});
    const caption = h("figcaption", {}, h("span", {}, title, note ? h("small", {}, ` ${note}`) : null), this.now);
    this.element = h("figure", { class: `chart ${kind}` }, caption, this.svg, this.legend);
    new ResizeObserver(() => this.draw()).observe(this.svg);
    this.svg.addEventListener("pointermove", (event) => this.point(this.nearest(event.offsetX)));
    this.svg.addEventListener("pointerleave", () => this.point(null));
    this.svg.addEventListener("blur", () => this.point(null));
    this.svg.addEventListener("keydown", (event) => this.key(event));
  }

  show(points, intervalMs) {
    this.points = points;
    this.gap = intervalMs * 2.5;
    this.draw();
  }

  /** Put the cursor on a point; the legend shows its values. */
  point(index) {
    if (index === this.at) return;
    this.at = index;
    this.draw();
  }

  key(event) {
    const last = this.points.length - 1;
    const step = { ArrowLeft: -1, ArrowRight: 1, Home: -last, End: last }[event.key];
    if (step === undefined || last < 0) return;
    event.preventDefault();
    this.point(Math.max(0, Math.min(last, (this.at ?? last) + step)));
  }

  nearest(x) {
    if (!this.points.length) return null;
    const distance = (point) => Math.abs(this.x(point.at) - x);
    return this.points.reduce((best, point, index) => (distance(point) < distance(this.points[best]) ? index : best), 0);
  }

  x(time) {
    return LEFT + (1 - (this.end - time) / SPAN_MS) * (this.width - LEFT);
  }

  y(value) {
    return TOP + (1 - value / this.top) * (HEIGHT - TOP - BOTTOM);
  }

  draw() {
    this.width = this.svg.clientWidth;
    if (this.width === 0) return;
    const lines = this.lines(this.points);
    const values = this.points.flatMap((point) => lines.map((line) => line.value(point) ?? 0));
    this.end = this.points.at(-1)?.at ?? Date.now();
    this.top = roundUp(Math.max(this.least, ...values));
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${HEIGHT}`);
    const paths = lines.flatMap((line, index) => [...this.line(line, index)]);
    this.svg.replaceChildren(...this.axes(), ...paths, ...this.cursor());
    this.tell(lines);
  }

  *axes() {
    for (const share of [0, 0.5, 1]) {
      const y = this.y(this.top * share);
      yield s("line", { class: "grid", x1: LEFT, x2: this.width, y1: y, y2: y });
      yield s("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, this.format(this.top * share));
    }
    for (const minutes of this.width < 260 ? [15, 0] : [15, 10, 5, 0]) {
      const anchor = { 15: "start", 0: "end" }[minutes] ?? "middle";
      const x = this.x(this.end - minutes * 60000);
      yield s("text", { x, y: HEIGHT - 3, "text-anchor": anchor }, minutes ? `−${minutes} min` : "now");
    }
  }

  /** Yield a line's paths. It breaks where nothing was measured. */
  *line(line, index) {
    const runs = [[]];
    let before = null;
    for (const point of this.points) {
      const value = line.value(point);
      const broken = before !== null && point.at - before > this.gap;
      if ((value === null || broken) && runs.at(-1).length) runs.push([]);
      if (value !== null) runs.at(-1).push([this.x(point.at), this.y(value)]);
      before = point.at;
    }
    for (const run of runs.filter((each) => each.length)) {
      if (run.length === 1) run.push([run[0][0] + 1.5, run[0][1]]);
      const path = `M${run.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join("L")}`;
      const floor = this.y(0);
      if (index === 0) yield s("path", { class: "area", d: `${path}V${floor}H${run[0][0].toFixed(1)}Z` });
      yield s("path", { class: STYLES[index], d: path });
    }
  }

  *cursor() {
    const point = this.points[this.at];
    if (!point) return;
    const x = this.x(point.at);
    yield s("line", { class: "cursor", x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM });
  }

  /** Write the values of the newest point, or of the one under the cursor. */
  tell(lines) {
    const point = this.points[this.at] ?? this.points.at(-1);
    const values = lines.map((line) => [line.name, point ? this.format(line.value(point)) : NONE]);
    this.now.textContent = values[0]?.[1] ?? this.format(0);
    const items = values.map(([name, value], index) =>
      h("li", {}, s("svg", {}, s("path", { class: STYLES[index], d: "M0,4H18" })), name, " ", h("b", {}, value)),
    );
    if (this.at !== null && point) items.push(h("li", {}, `at ${clock(point.at)}`));
    this.legend.replaceChildren(...(lines.length > 1 || this.at !== null ? items : []));
    const told = values.map(([name, value]) => `${name} ${value}`).join(", ") || "none";
    this.svg.setAttribute("aria-label", `${this.title}: ${told}${this.at === null ? ", now" : `, at ${clock(point.at)}`}`);
  }
}
