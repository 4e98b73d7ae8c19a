// The heat map of a student's errors: prompts down, hardest first, steps across.

const HEAT = { top: 22, tallest: 18, lowest: 2, longest: 16000, labelled: 12, kept: 48 };
// Magma, eight stops from low to high; on a light page from high to low, so that more ink is always more error.
const MAGMA = [[0, 0, 4], [36, 18, 88], [91, 23, 126], [146, 43, 129], [203, 62, 113], [245, 106, 92], [254, 170, 116], [252, 253, 191]];

function heatColour(fraction) {
  const along = clamp(darkness.matches ? fraction : 1 - fraction, 0, 1) * (MAGMA.length - 1);
  const stop = Math.min(Math.floor(along), MAGMA.length - 2);
  const part = along - stop;
  return `rgb(${MAGMA[stop].map((low, channel) => Math.round(low + (MAGMA[stop + 1][channel] - low) * part)).join(" ")})`;
}

// One scale for all students, for comparison; the top hundredth shares the last colour.
function heatTop() {
  const values = data.students.flatMap(({ errors }) => errors.flat()).filter(isNumber).sort((a, b) => a - b);
  return values.length ? values[Math.floor((values.length - 1) * 0.99)] || 1 : 1;
}

class HeatMap {
  constructor(container) {
    this.canvas = element("canvas", {
      class: "heat", tabindex: "0", role: "application", "aria-roledescription": "heat map",
      "aria-label": "Errors by prompt and step, hardest prompt first. Arrow keys move, Enter opens the prompt.",
      "aria-describedby": "heat-readout",
    });
    this.readout = element("output", { id: "heat-readout", class: "readout" });
    this.plot = element("div", { class: "plot" }, this.canvas);
    this.top = heatTop();
    this.legend = element("canvas", { class: "scale", width: 256, height: 1, "aria-hidden": "true" });
    const legend = element("p", { class: "row quiet" }, "0 %", this.legend, `${percentText(this.top)} and more`);
    container.append(legend, this.readout, this.plot);
    this.cursor = null;
    this.listen();
    this.redraw = responsive(this.plot, (width) => this.draw(width));
    watch(["row"], this.redraw);
    darkness.addEventListener("change", this.redraw);
  }

  show({ student, means, worst }) {
    this.student = student;
    // By the mean over the steps, or by the worst step if means are equal or missing.
    const order = student.rows.map((_, place) => place);
    order.sort((a, b) => (means[b] ?? -1) - (means[a] ?? -1) || (worst[b] ?? -1) - (worst[a] ?? -1) || a - b);
    this.order = order.slice(0, HEAT.longest);
    this.cursor = null;
    this.readout.textContent = `${plural(order.length, "trajectory", "trajectories")}, ${plural(student.steps.length, "step")}`;
    this.redraw();
  }

  draw(width) {
    if (!this.student) return;
    const rows = Math.max(this.order.length, 1);
    this.cellHeight = clamp(Math.floor(1000 / rows), HEAT.lowest, HEAT.tallest);
    this.left = width < 560 ? 44 : 230;
    this.cellWidth = (width - this.left) / Math.max(this.student.steps.length, 1);
    const height = HEAT.top + rows * this.cellHeight;
    // Long canvases at one pixel each: browsers refuse larger ones.
    const density = height > 8000 ? 1 : window.devicePixelRatio || 1;
    Object.assign(this.canvas, { width: width * density, height: height * density });
    this.canvas.style.height = `${height}px`;
    const context = this.canvas.getContext("2d");
    context.scale(density, density);
    this.drawNames(context, width);
    this.drawCells(context);
    this.drawCursor(context);
    this.drawScale();
  }

  drawNames(context, width) {
    const style = getComputedStyle(this.canvas);
    context.fillStyle = style.color;
    context.font = `12px ${style.fontFamily}`;
    context.textAlign = "center";
    const every = Math.ceil(30 / this.cellWidth);
    this.student.steps.forEach((step, place) => {
      if (place % every === 0) context.fillText(step, this.left + (place + 0.5) * this.cellWidth, 14);
    });
    context.textAlign = "left";
    context.fillText("step", 0, 14);
    if (this.cellHeight < HEAT.labelled) return;
    this.order.forEach((place, line) => {
      const row = this.student.rows[place];
      const text = width < 560 ? String(table.index[row]) : `${table.index[row]}  ${table.prompt[row]}`;
      context.font = `${row === view.row ? "bold " : ""}11px ${style.fontFamily}`;
      context.fillText(fitted(context, text, this.left - 10), 0, HEAT.top + (line + 1) * this.cellHeight - 4);
    });
  }

  drawCells(context) {
    this.order.forEach((place, line) => {
      this.student.errors[place].forEach((value, column) => {
        if (!isNumber(value)) return;
        context.fillStyle = heatColour(value / this.top);
        const gap = this.cellHeight > 6 ? 1 : 0;
        context.fillRect(this.left + column * this.cellWidth, HEAT.top + line * this.cellHeight, this.cellWidth - gap, this.cellHeight - gap);
      });
    });
  }

  drawCursor(context) {
    if (!this.cursor) return;
    const { line, column } = this.cursor;
    const box = [this.left + column * this.cellWidth, HEAT.top + line * this.cellHeight, this.cellWidth - 1, this.cellHeight - 1];
    for (const [colour, lineWidth] of [["#000", 4], ["#fff", 2]]) {
      Object.assign(context, { strokeStyle: colour, lineWidth });
      context.strokeRect(...box);
    }
  }

  drawScale() {
    const context = this.legend.getContext("2d");
    for (let at = 0; at < 256; at += 1) {
      context.fillStyle = heatColour(at / 255);
      context.fillRect(at, 0, 1, 1);
    }
  }

  listen() {
    this.canvas.addEventListener("pointermove", (event) => this.point(this.cellAt(event)));
    this.canvas.addEventListener("pointerleave", () => { if (document.activeElement !== this.canvas) this.point(null); });
    this.canvas.addEventListener("click", (event) => {
      this.point(this.cellAt(event));
      this.open();
    });
    this.canvas.addEventListener("focus", () => { if (!this.cursor && this.order.length) this.point({ line: 0, column: 0 }); });
    this.canvas.addEventListener("keydown", (event) => this.move(event));
  }

  cellAt(event) {
    const box = this.canvas.getBoundingClientRect();
    const line = Math.floor((event.clientY - box.top - HEAT.top) / this.cellHeight);
    if (line < 0 || line >= this.order.length) return null;
    const column = Math.floor((event.clientX - box.left - this.left) / this.cellWidth);
    return { line, column: clamp(column, 0, this.student.steps.length - 1) };
  }

  move(event) {
    if (!this.cursor) return;
    if (event.key === "Enter") {
      this.open();
      enterDetail();
    }
    const { line, column } = this.cursor;
    const wanted = {
      ArrowDown: [line + 1, column], ArrowUp: [line - 1, column], PageDown: [line + 10, column], PageUp: [line - 10, column],
      ArrowRight: [line, column + 1], ArrowLeft: [line, column - 1], Home: [line, 0], End: [line, Infinity],
    }[event.key];
    if (!wanted) return;
    event.preventDefault();
    this.point({
      line: clamp(wanted[0], 0, this.order.length - 1), column: clamp(wanted[1], 0, this.student.steps.length - 1),
    });
    this.follow();
  }

  // The page scrolls with the keyboard's cursor where the map is taller than the window.
  follow() {
    const top = this.canvas.getBoundingClientRect().top + HEAT.top + this.cursor.line * this.cellHeight;
    const bottom = top + this.cellHeight;
    if (top < HEAT.kept) scrollBy(0, top - HEAT.kept);
    else if (bottom > innerHeight) scrollBy(0, bottom - innerHeight + HEAT.tallest);
  }

  point(cell) {
    if (cell?.line === this.cursor?.line && cell?.column === this.cursor?.column) return;
    this.cursor = cell;
    this.redraw();
    if (!cell) return;
    const { row, step, value, replayError } = this.cell(cell);
    const beside = isNumber(replayError) ? ` (replay error ${percentText(replayError)})` : "";
    this.readout.textContent = `prompt ${table.index[row]}, step ${step}: ${percentText(value)}${beside}. ${table.prompt[row]}`;
  }

  cell({ line, column }) {
    const place = this.order[line];
    const { rows, steps, errors, replay_error } = this.student;
    return { row: rows[place], step: steps[column], value: errors[place][column], replayError: replay_error?.[place][column] };
  }

  open() {
    if (!this.cursor) return;
    const { row, step } = this.cell(this.cursor);
    openRow(row, step);
    showRow(row);
  }
}

function fitted(context, text, width) {
  if (context.measureText(text).width <= width) return text;
  let length = Math.min(text.length, 60);
  while (length > 0 && context.measureText(`${text.slice(0, length)}…`).width > width) length -= 1;
  return `${text.slice(0, length)}…`;
}
