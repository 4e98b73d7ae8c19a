// Histograms of the columns over all rows, or over the matches of the filters, in the same bins. A bar filters the table.

const BINS = 24;
const HISTOGRAM_PX = 190;
// Space saved below: the heading replaces the axis label.
const UNNAMED_PX = 18;

const DISTRIBUTIONS = [
  ["guidance", "Guidance"],
  ["tokens", "Tokens of the prompt"],
  ["velocity_rms", "Velocity, root mean square"],
  ["final_rms", "Final latent, root mean square"],
];

// A bin is chosen by its histogram and place, and filters the table.
const distributions = DISTRIBUTIONS.filter(([name]) => hasValues(name)).map(([name, title]) => {
  const values = table[name];
  const bins = binsOf(values);
  return { name, title, values, bins, placeOf: placesIn(bins) };
});

function startHistograms() {
  const only = byId("only-matches");
  const drawn = distributions.map((distribution) => new Histogram(distribution));
  byId("histograms").append(...drawn.map(({ figure }) => figure));
  const update = () => {
    for (const histogram of drawn) histogram.count(only.checked ? grid.matches : null);
  };
  only.addEventListener("change", update);
  watch(["matches"], () => { if (only.checked) update(); });
  watch(["bin"], () => { for (const histogram of drawn) histogram.mark(); });
  update();
}

// The bin that a view names, such as "tokens.3"; null for any other text.
function binOf(text) {
  const [name, place] = text.split(".");
  const distribution = distributions.find((one) => one.name === name);
  const bin = distribution?.bins[Number(place)];
  return bin ? { distribution, place: Number(place), text: binText(bin) } : null;
}

// Bins of all values: one per value where there are few, else of equal width, whole where the values are.
function binsOf(values) {
  const found = values.filter(isNumber);
  const distinct = new Set();
  for (const value of found) {
    distinct.add(value);
    if (distinct.size > BINS) break;
  }
  if (distinct.size <= BINS) return [...distinct].sort((a, b) => a - b).map((value) => ({ low: value, high: value }));
  const low = found.reduce((a, b) => Math.min(a, b));
  const high = found.reduce((a, b) => Math.max(a, b));
  const whole = found.every(Number.isInteger);
  const width = whole ? Math.ceil((high - low + 1) / BINS) : (high - low) / BINS;
  const count = whole ? Math.ceil((high - low + 1) / width) : BINS;
  return Array.from({ length: count }, (_, place) => ({ low: low + place * width, high: low + (place + 1) * width - (whole ? 1 : 0) }));
}

// The place of a value among the bins; undefined for a missing one.
function placesIn(bins) {
  if (bins.every(({ low, high }) => low === high)) {
    const exact = new Map(bins.map(({ low }, place) => [low, place]));
    return (value) => exact.get(value);
  }
  const width = bins[1].low - bins[0].low;
  return (value) => (isNumber(value) ? clamp(Math.floor((value - bins[0].low) / width), 0, bins.length - 1) : undefined);
}

function countsIn({ bins, values, placeOf }, rows) {
  const counts = bins.map(() => 0);
  const add = (value) => {
    const place = placeOf(value);
    if (place !== undefined) counts[place] += 1;
  };
  if (rows === null) values.forEach(add);
  else for (const row of rows) add(values[row]);
  return counts;
}

function binText({ low, high }) {
  return low === high ? numberText(low) : `${numberText(low)} to ${numberText(high)}`;
}

class Histogram {
  constructor(distribution) {
    const { name, title, values, bins } = distribution;
    this.distribution = distribution;
    this.name = name;
    this.title = title;
    this.values = values;
    this.bins = bins;
    this.plot = element("div", { class: "plot" });
    this.caption = element("p", { class: "quiet" });
    this.rows = element("tbody");
    const head = element("tr", {}, element("th", { scope: "col" }, title), element("th", { scope: "col" }, "Trajectories"));
    const shown = element("details", {}, element("summary", {}, "As a table"),
      element("table", { class: "values" }, element("thead", {}, head), this.rows));
    this.figure = element("figure", {}, element("h3", {}, title), this.plot, this.caption, shown);
    this.counts = [];
    this.plot.addEventListener("keydown", (event) => this.move(event));
    this.redraw = responsive(this.plot, (width) => this.draw(width));
  }

  count(rows) {
    this.counts = countsIn(this.distribution, rows);
    const total = this.counts.reduce((a, b) => a + b, 0);
    const all = rows === null ? this.values.length : rows.length;
    this.counted = total ? `${numberText(total)} of ${plural(all, "trajectory", "trajectories")}` : "No values";
    this.rows.replaceChildren(...this.bins.map((bin, place) =>
      element("tr", {}, element("td", {}, binText(bin)), element("td", {}, numberText(this.counts[place])))));
    this.label = this.described(total);
    this.redraw();
  }

  described(total) {
    if (!total) return `${this.title}: no values`;
    const most = this.counts.indexOf(Math.max(...this.counts));
    const ends = `${numberText(this.bins[0].low)} to ${numberText(this.bins.at(-1).high)}`;
    return `Histogram of ${this.title}: ${numberText(total)} values, ${ends}; most, ${numberText(this.counts[most])}, at ${binText(this.bins[most])}`;
  }

  draw(width) {
    const { bins, counts } = this;
    const height = HISTOGRAM_PX;
    const top = Math.max(...counts, 1);
    const step = (width - MARGIN.left - MARGIN.right) / bins.length;
    const y = scale([0, top], [height - MARGIN.bottom, MARGIN.top]);
    const bars = bins.map((_, place) => this.bar(place, MARGIN.left + place * step + 1, Math.max(step - 2, 1), y));
    const focused = bars.findIndex((_, place) => this.bars?.[place] === document.activeElement);
    const yTicks = ticks(0, top, 3).filter(Number.isInteger);
    const under = axes({ width, height, y, yTicks, xLabel: "", yLabel: "trajectories", ...this.along(width, step) });
    const shown = height - UNNAMED_PX;
    this.plot.replaceChildren(shape("svg", {
      width, height: shown, viewBox: `0 0 ${width} ${shown}`, role: "group", "aria-label": this.label,
    }, ...under, ...bars));
    this.bars = bars;
    this.stopAt(focused);
    if (focused >= 0) bars[focused].focus();
    this.mark();
  }

  // A button as tall as the plot: a bar of one row is a pixel tall.
  bar(place, x, width, y) {
    const text = `${binText(this.bins[place])}: ${numberText(this.counts[place])}`;
    const top = y(this.counts[place]);
    return shape("g", { role: "button", class: "bin", tabindex: "-1", "aria-label": text, click: () => this.choose(place) },
      shape("title", {}, text),
      shape("rect", { class: "reach", x, width, y: MARGIN.top, height: y(0) - MARGIN.top }),
      shape("rect", { class: "bar", x, width, y: top, height: y(0) - top }));
  }

  choose(place) {
    const bin = `${this.name}.${place}`;
    this.stopAt(place);
    change({ bin: view.bin === bin ? "" : bin });
  }

  move(event) {
    const at = this.bars.indexOf(document.activeElement);
    if (at < 0 || event.altKey || event.ctrlKey || event.metaKey) return;
    const last = this.bars.length - 1;
    const wanted = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: last }[event.key];
    if (wanted === undefined && event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    if (wanted === undefined) {
      this.choose(at);
      return;
    }
    const place = clamp(wanted, 0, last);
    this.stopAt(place);
    this.bars[place].focus();
  }

  // One bar is a tab stop, at first the chosen or the highest one.
  stopAt(place) {
    const chosen = binOf(view.bin);
    const own = chosen?.distribution === this.distribution ? chosen.place : this.counts.indexOf(Math.max(...this.counts));
    const stop = place >= 0 ? place : own;
    this.bars.forEach((bar, at) => { bar.setAttribute("tabindex", at === stop ? "0" : "-1"); });
  }

  mark() {
    const chosen = binOf(view.bin);
    const own = chosen?.distribution === this.distribution ? chosen.place : -1;
    this.bars?.forEach((bar, at) => { bar.setAttribute("aria-pressed", at === own ? "true" : "false"); });
    this.caption.replaceChildren(this.counted, ...(own < 0 ? [] : [
      `. The table shows ${chosen.text}: `, element("a", { href: "#trajectories", "data-jump": "trajectories" }, "go to the table"),
    ]));
  }

  // Single values have a tick under their bar, ranges at round values between bars.
  along(width, step) {
    const { bins } = this;
    const room = Math.max(Math.floor(width / 64), 2);
    if (bins.every(({ low, high }) => low === high)) {
      const every = Math.ceil(bins.length / room);
      const places = bins.map((_, place) => place).filter((place) => place % every === 0);
      return { x: (place) => MARGIN.left + (place + 0.5) * step, xTicks: places, xText: (place) => numberText(bins[place].low) };
    }
    /** @type {[number, number]} */
    const ends = [bins[0].low, bins[0].low + bins.length * (bins[1].low - bins[0].low)];
    return { x: scale(ends, [MARGIN.left, width - MARGIN.right]), xTicks: ticks(...ends, Math.min(room, 6)) };
  }
}
