// Histograms of the columns over all rows, or over search matches, in the same bins.

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

function startHistograms() {
  const only = byId("only-matches");
  const drawn = DISTRIBUTIONS.filter(([name]) => hasValues(name)).map(([name, title]) => new Histogram(name, title));
  byId("histograms").append(...drawn.map(({ figure }) => figure));
  const update = () => {
    for (const histogram of drawn) histogram.count(only.checked ? grid.matches : null);
  };
  only.addEventListener("change", update);
  watch(["matches"], () => { if (only.checked) update(); });
  update();
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

function countsIn(bins, values, rows) {
  const counts = bins.map(() => 0);
  const exact = new Map(bins.map(({ low }, place) => [low, place]));
  const single = bins.every(({ low, high }) => low === high);
  const width = single ? 1 : bins[1].low - bins[0].low;
  const add = (value) => {
    if (!isNumber(value)) return;
    const place = single ? exact.get(value) : clamp(Math.floor((value - bins[0].low) / width), 0, bins.length - 1);
    counts[place] += 1;
  };
  if (rows === null) values.forEach(add);
  else rows.forEach((row) => add(values[row]));
  return counts;
}

function binText({ low, high }) {
  return low === high ? numberText(low) : `${numberText(low)} to ${numberText(high)}`;
}

class Histogram {
  constructor(name, title) {
    this.title = title;
    this.values = table[name];
    this.bins = binsOf(this.values);
    this.plot = element("div", { class: "plot" });
    this.caption = element("p", { class: "quiet" });
    this.rows = element("tbody");
    const head = element("tr", {}, element("th", { scope: "col" }, title), element("th", { scope: "col" }, "Trajectories"));
    const values = element("details", {}, element("summary", {}, "As a table"),
      element("table", { class: "values" }, element("thead", {}, head), this.rows));
    this.figure = element("figure", {}, element("h3", {}, title), this.plot, this.caption, values);
    this.counts = [];
    this.redraw = responsive(this.plot, (width) => this.draw(width));
  }

  count(rows) {
    this.counts = countsIn(this.bins, this.values, rows);
    const total = this.counts.reduce((a, b) => a + b, 0);
    const all = rows === null ? this.values.length : rows.length;
    this.caption.textContent = total ? `${numberText(total)} of ${plural(all, "trajectory", "trajectories")}` : "No values.";
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
    const bars = bins.map((bin, place) => shape("rect", {
      class: "bar", x: MARGIN.left + place * step + 1, width: Math.max(step - 2, 1), y: y(counts[place]), height: y(0) - y(counts[place]),
    }, shape("title", {}, `${binText(bin)}: ${numberText(counts[place])}`)));
    const yTicks = ticks(0, top, 3).filter(Number.isInteger);
    const under = axes({ width, height, y, yTicks, xLabel: "", yLabel: "trajectories", ...this.along(width, step) });
    const shown = height - UNNAMED_PX;
    this.plot.replaceChildren(shape("svg", {
      width, height: shown, viewBox: `0 0 ${width} ${shown}`, role: "img", "aria-label": this.label,
    }, ...under, ...bars));
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
    const ends = [bins[0].low, bins[0].low + bins.length * (bins[1].low - bins[0].low)];
    return { x: scale(ends, [MARGIN.left, width - MARGIN.right]), xTicks: ticks(...ends, Math.min(room, 6)) };
  }
}
