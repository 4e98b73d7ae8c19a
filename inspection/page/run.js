// Assembles the page of a training run.

const data = JSON.parse(byId("data").textContent);

// The newest sheet first: what the student can do now.
function startSamples() {
  const { samples } = data;
  byId("notes").append(...data.notes.map(note));
  if (!samples.length) {
    byId("notes").append(note("No samples: secondcast train takes them with --sample-every N."));
    return;
  }
  byId("sheets").append(...samples.toReversed().map(sheetFigure));
}

function sheetFigure({ step, prompts, sheet }) {
  const alt = `Teacher and student after step ${numberText(step)}: ${prompts.join("; ")}`;
  return element("figure", {}, element("h3", {}, `step ${numberText(step)}`), element("img", { class: "frame", src: sheet, alt }));
}

byId("title").textContent = data.title;
byId("made").textContent = madeText(data);
drawTraining(byId("curves"), data.curves, "h3");
startSamples();
facts(byId("facts"), data.facts);
document.documentElement.dataset.ready = "true";
