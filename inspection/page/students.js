// Errors of the students, and their training curves.

function startStudents() {
  const { students } = data;
  byId("student-choice").hidden = students.length < 2;
  if (!students.length) {
    byId("errors").append(element("p", {}, "No student in this report."));
    return;
  }
  const choice = byId("student");
  choice.append(...students.map(({ name }, place) => element("option", { value: place }, name)));
  choice.addEventListener("change", () => change({ student: Number(choice.value) }));
  startErrors(byId("errors"));
  startCurves(byId("curves"));
  const show = () => { choice.value = view.student; };
  watch(["student"], show);
  show();
}

function startErrors(container) {
  const heading = element("h3");
  const summary = element("p", { class: "quiet" });
  const map = element("div");
  const means = element("div");
  container.append(heading, summary, map, element("h3", {}, "Mean error by step"), means);
  const heat = new HeatMap(map);
  const chart = new LineChart(means);
  chart.show(meansByStep());
  const draw = () => {
    const chosen = evaluations[view.student];
    const { name, parameters } = chosen.student;
    const evaluated = chosen.student.rows.length > 0;
    heading.textContent = evaluated ? `Errors of ${name}, hardest prompts first` : name;
    const errors = evaluated ? "Errors are relative to the norm of the teacher's velocity." : "Not evaluated in this report.";
    summary.textContent = `${isNumber(parameters) ? `${numberText(parameters)} parameters. ` : ""}${errors}`;
    map.hidden = !evaluated;
    heat.show(chosen);
  };
  watch(["student"], draw);
  draw();
}

function meansByStep() {
  const means = (student, values) => student.steps.map((_, step) => mean(values.map((row) => row[step])));
  const series = data.students.flatMap((student, colour) => [
    { name: student.name, x: student.steps, y: means(student, student.errors), colour, dashed: false },
    ...(student.replay_error
      ? [{ name: `replay error of ${student.name}`, x: student.steps, y: means(student, student.replay_error), colour, dashed: true }]
      : []),
  ]);
  const overall = data.students.map(({ name, errors }) => `${name} ${percentText(mean(errors.flat()))}`);
  return {
    label: `Mean error by step, with the replay error as a dashed line; over all steps ${overall.join(", ")}`,
    xLabel: "step", xName: "step", yLabel: "error", yText: percentText, fromZero: true, series,
  };
}

function startCurves(container) {
  const draw = () => {
    const { name, curves } = data.students[view.student];
    container.replaceChildren();
    if (!curves.length) return;
    const figures = element("div", { class: "charts" });
    container.append(element("h3", {}, `Training of ${name}`), figures);
    drawTraining(figures, curves, "h4");
  };
  watch(["student"], draw);
  draw();
}
