// Charts as SVG: axes, and lines with a cursor that mouse and arrow keys move.

const MARGIN = { top: 10, right: 22, bottom: 40, left: 58 };
const SERIES_COLOURS = 6;

function ticks(low, high, count) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * ([1, 2, 5].find((factor) => factor * power >= raw) ?? 10);
  const found = [];
  for (let place = Math.ceil(low / step - 1e-9); place * step <= high + step * 1e-9; place += 1) {
    found.push(Number((place * step).toPrecision(12)));
  }
  return found;
}

function logTicks(low, high) {
  const found = [];
  const factors = Math.log10(high / low) > 2.5 ? [1] : [1, 2, 5];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
    found.push(...factors.map((factor) => Number((factor * 10 ** power).toPrecision(6))));
  }
  const inside = found.filter((value) => value >= low * 0.999 && value <= high * 1.001);
  return inside.length > 1 ? inside : ticks(low, high, 4);
}

// domain and range: two numbers each; with log: positive ones.
function scale([low, high], [from, to], log = false) {
  const place = log ? Math.log : (value) => value;
  const span = place(high) - place(low) || 1;
  return (value) => from + ((place(value) - place(low)) / span) * (to - from);
}

function axes({ width, height, x, y, xTicks, yTicks, xLabel, yLabel, xText = numberText, yText = numberText }) {
  const floor = height - MARGIN.bottom;
  const parts = [];
  for (const tick of yTicks) {
    parts.push(shape("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(tick), y2: y(tick) }));
    parts.push(shape("text", { x: MARGIN.left - 6, y: y(tick) + 4, "text-anchor": "end" }, yText(tick)));
  }
  parts.push(shape("line", { class: "axis", x1: MARGIN.left, x2: width - MARGIN.right, y1: floor, y2: floor }));
  for (const tick of xTicks) {
    parts.push(shape("line", { class: "axis", x1: x(tick), x2: x(tick), y1: floor, y2: floor + 4 }));
    parts.push(shape("text", { x: x(tick), y: floor + 16, "text-anchor": "middle" }, xText(tick)));
  }
  const middle = (MARGIN.left + width - MARGIN.right) / 2;
  parts.push(shape("text", { class: "axis-name", x: middle, y: height - 6, "text-anchor": "middle" }, xLabel));
  const turn = `translate(12 ${(MARGIN.top + floor) / 2}) rotate(-90)`;
  parts.push(shape("text", { class: "axis-name", "text-anchor": "middle", transform: turn }, yLabel));
  return parts;
}

// No more points than the width can show: of each pixel column its lowest and highest.
function thinned(points, width) {
  if (points.length <= 2 * width) return points;
  const per = points.length / width;
  const found = [];
  for (let start = 0; start < points.length; start += per) {
    const part = points.slice(Math.floor(start), Math.max(Math.floor(start + per), Math.floor(start) + 1));
    const low = part.reduce((a, b) => (b[1] < a[1] ? b : a));
    const high = part.reduce((a, b) => (b[1] > a[1] ? b : a));
    found.push(...(low[0] <= high[0] ? [low, high] : [high, low]));
  }
  return found;
}

// spec: {label, xLabel, yLabel, xName, series: [{name, x, y, colour, dashed}], log, fromZero, yText, height}
class LineChart {
  constructor(container) {
    this.legend = element("ul", { class: "legend" });
    this.plot = element("div", { class: "plot" });
    this.readout = element("output", { class: "readout" });
    container.append(this.legend, this.plot, this.readout);
    this.redraw = responsive(this.plot, (width) => this.draw(width));
  }

  show(spec) {
    const usable = (value) => isNumber(value) && (!spec.log || value > 0);
    const lines = spec.series.map((line) => ({
      ...line, points: line.x.map((x, place) => [x, line.y[place]]).filter(([, y]) => usable(y)),
    }));
    this.spec = { height: 220, yText: numberText, ...spec, lines: lines.filter(({ points }) => points.length) };
    this.places = [...new Set(this.spec.lines.flatMap(({ points }) => points.map(([x]) => x)))].sort((a, b) => a - b);
    this.cursor = null;
    this.legend.replaceChildren(...this.spec.lines.map(legendItem));
    this.redraw();
  }

  draw(width) {
    if (!this.spec) return;
    const { lines, height, log, xLabel, yLabel, yText, label } = this.spec;
    this.readout.textContent = "";
    if (!lines.length) {
      this.plot.replaceChildren(element("p", { class: "quiet" }, "No values to draw."));
      return;
    }
    const scales = this.scales(width);
    const { x, y, domainX, domainY } = scales;
    const yTicks = log ? logTicks(...domainY) : ticks(...domainY, 5);
    const xTicks = ticks(...domainX, clamp(Math.floor(width / 80), 2, 10)).filter(Number.isInteger);
    const svg = shape("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: "0", "aria-label": label },
      ...axes({ width, height, x, y, xTicks, yTicks, xLabel, yLabel, yText }),
      ...lines.map((line) => drawnLine(line, scales, width)));
    this.rule = shape("line", { class: "cursor", y1: MARGIN.top, y2: height - MARGIN.bottom, visibility: "hidden" });
    svg.append(this.rule);
    this.listen(svg, scales);
    this.plot.replaceChildren(svg);
  }

  scales(width) {
    const { lines, height, log, fromZero } = this.spec;
    const values = lines.flatMap(({ points }) => points.map(([, y]) => y));
    const low = values.reduce((a, b) => Math.min(a, b));
    const high = values.reduce((a, b) => Math.max(a, b));
    /** @type {[number, number]} */
    const domainY = log ? [low / 1.1, high * 1.1] : [fromZero ? Math.min(0, low) : low, high === low ? high + (Math.abs(high) || 1) * 0.1 : high];
    /** @type {[number, number]} */
    const domainX = [this.places[0], this.places.at(-1)];
    const x = scale(domainX, [MARGIN.left, width - MARGIN.right]);
    const y = scale(domainY, [height - MARGIN.bottom, MARGIN.top], log);
    return { x, y, domainX, domainY };
  }

  listen(svg, { x }) {
    svg.addEventListener("pointermove", (event) => {
      const here = event.clientX - svg.getBoundingClientRect().left;
      this.point(nearest(this.places, here, x), x);
    });
    svg.addEventListener("keydown", (event) => {
      const last = this.places.length - 1;
      const at = this.cursor ?? (event.key === "ArrowLeft" ? last + 1 : -1);
      const wanted = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: last }[event.key];
      if (wanted === undefined) return;
      event.preventDefault();
      this.point(clamp(wanted, 0, last), x);
    });
  }

  point(place, x) {
    this.cursor = place;
    const at = this.places[place];
    for (const name of ["x1", "x2"]) this.rule.setAttribute(name, x(at));
    this.rule.setAttribute("visibility", "visible");
    const values = this.spec.lines.map(({ name, points }) => {
      const found = points.find((point) => point[0] === at);
      return found ? `${name} ${this.spec.yText(found[1])}` : null;
    });
    this.readout.textContent = `${this.spec.xName} ${numberText(at)}: ${values.filter(Boolean).join(", ")}`;
  }
}

function nearest(places, here, x) {
  let [low, high] = [0, places.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (x(places[middle]) < here) low = middle;
    else high = middle;
  }
  return Math.abs(x(places[low]) - here) <= Math.abs(x(places[high]) - here) ? low : high;
}

function lineClass({ colour, dashed }) {
  return `line colour-${colour % SERIES_COLOURS}${dashed ? " dashed" : ""}`;
}

function drawnLine(line, { x, y }, width) {
  const points = thinned(line.points, width);
  const place = ([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`;
  if (points.length === 1) return shape("circle", { class: lineClass(line), cx: x(points[0][0]), cy: y(points[0][1]), r: 3 });
  return shape("polyline", { class: lineClass(line), points: points.map(place).join(" ") });
}

function legendItem(line) {
  const sample = shape("svg", { width: 28, height: 10, "aria-hidden": "true" },
    shape("line", { class: lineClass(line), x1: 1, x2: 27, y1: 5, y2: 5 }));
  return element("li", {}, sample, line.name);
}

// Losses share one chart for comparison; every other metric has its own. heading: element of their titles.
function drawTraining(container, curves, heading) {
  const losses = curves.filter((curve) => isLoss(curve));
  if (losses.length) drawCurves(container, "loss", losses, true, heading);
  for (const curve of curves.filter((curve) => !isLoss(curve))) drawCurves(container, curve.name, [curve], false, heading);
}

function isLoss({ name }) {
  return name.endsWith("loss");
}

function drawCurves(container, title, curves, log, heading) {
  const figure = element("figure", {}, element(heading, {}, title));
  container.append(figure);
  const series = curves.map(({ name, x, y }, colour) => ({ name, x, y, colour, dashed: false }));
  const last = series.map(({ name, y }) => `${name} ends at ${numberText(y.at(-1))}`).join(", ");
  new LineChart(figure).show({
    label: `${title} by optimizer step${log ? ", logarithmic" : ""}: ${last}`, xLabel: "optimizer step",
    xName: "step", yLabel: log ? `${title}, log scale` : title, log, fromZero: !log, series,
  });
}
