// Details of the selected trajectory.

function startDetail() {
  const errors = byId("detail-errors");
  const chart = element("div");
  errors.append(element("h3", {}, "Error by step"), chart);
  const lines = new LineChart(chart);
  byId("viewer").before(...[stripButtons()].filter(Boolean));
  byId("jump").addEventListener("submit", jump);
  byId("detail").addEventListener("keydown", leaveDetail);
  const draw = () => {
    drawDetail();
    drawDetailErrors(errors, lines);
    drawClosed();
  };
  watch(["row"], draw);
  draw();
}

function jump(event) {
  event.preventDefault();
  const typed = byId("number").value;
  // "12", "prompt 12", "step 5 of prompt 12": a number after "step" is a step.
  const step = /step\s*(\d+)/i.exec(typed)?.[1];
  const number = /\d+/.exec(typed.replace(/step\s*\d+/i, ""))?.[0];
  const row = rowOfNumber.get(Number.parseInt(number ?? "", 10));
  const ends = table.index.length ? `: ${table.index[0]} to ${table.index.at(-1)}` : "";
  byId("jump-error").textContent = row === undefined ? `No trajectory ${typed.trim() || "without a number"} here${ends}` : "";
  if (row === undefined) return;
  change(step === undefined ? { row } : { row, step: stepAt(framePlace(Number(step))) });
  showRow(row);
}

function drawDetail() {
  const { row } = view;
  if (row === null) {
    byId("detail-title").textContent = "No trajectories";
    return;
  }
  byId("detail-title").textContent = `Trajectory ${table.index[row]}`;
  byId("detail-prompt").textContent = table.prompt[row];
  byId("jump-error").textContent = "";
  const norm = (name, label) => (table[name] ? [[label, numberText(table[name][row])]] : []);
  const read = isNumber(table.velocity_rms[row]) || isNumber(table.non_finite[row]);
  facts(byId("detail-facts"), [
    ["key", table.key[row]],
    ["source", sourcesOf(row)],
    ["held out", table.held_out[row] ? "yes: never used in training" : "no"],
    ["sample", String(table.sample_index[row])],
    ["guidance", numberText(table.guidance[row])],
    ["tokens", numberText(table.tokens[row])],
    ...(read ? [
      ...norm("velocity_rms", "velocity rms"),
      ...norm("final_rms", "final latent rms"),
      ["not finite", numberText(table.non_finite[row])],
    ] : [["norms", "not read for this report"]]),
  ]);
}

function drawDetailErrors(node, chart) {
  const series = evaluations.flatMap(({ student, places }, colour) => errorLines(student, places.get(view.row), colour));
  node.hidden = !series.length;
  if (!series.length) return;
  chart.show({
    label: `Errors by step of trajectory ${table.index[view.row]}`, xLabel: "step", xName: "step",
    yLabel: "error", yText: percentText, fromZero: true, height: 190, series,
  });
}

function errorLines(student, place, colour) {
  if (place === undefined) return [];
  const line = (name, values, dashed) => ({ name, x: student.steps, y: values[place], colour, dashed });
  return [
    line(student.name, student.errors, false),
    ...(student.replay_error ? [line(`${student.name}, replay error`, student.replay_error, true)] : []),
  ];
}

function drawClosed() {
  const found = data.students.flatMap((student) => {
    const place = student.closed ? student.closed.rows.indexOf(view.row) : -1;
    return place < 0 ? [] : [closedFigure(student, place)];
  });
  const strip = stripOfRow.get(view.row);
  if (found.length && strip) found.unshift(teacherFigure(strip));
  byId("closed").replaceChildren(...(found.length
    ? [element("h3", {}, "Closed loop: images sampled with the student"), element("div", { class: "frames many" }, ...found)]
    : []));
}

function teacherFigure(strip) {
  const canvas = frameCanvas("the teacher's final image");
  drawFrame(canvas, strip, data.strips.steps.length, 1);
  return element("figure", {}, canvas, element("figcaption", {}, "Teacher"));
}

function closedFigure({ name, closed }, place) {
  // Earlier evaluations do not store images.
  const pictures = closed.final.slice(place, place + 1).map((src) => element("img", {
    src, alt: `final image of ${name}`, class: isPixelated() ? "frame pixelated" : "frame",
  }));
  const measured = [`latent error ${percentText(closed.latent_fraction[place])}`];
  // Without scikit-image they are not measured.
  if (closed.ssim.length) {
    measured.push(closed.psnr_db[place] === null ? "identical images" : `PSNR ${numberText(closed.psnr_db[place])} dB`);
    measured.push(`SSIM ${numberText(closed.ssim[place])}`);
  }
  return element("figure", {}, ...pictures, element("figcaption", {}, name, element("span", { class: "quiet" }, measured.join(", "))));
}
