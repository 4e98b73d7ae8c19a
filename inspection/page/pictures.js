// Images of the teacher, the students and an untrained student side by side, sampled from the same noise.

function startPictures() {
  const { rows } = data.pictures;
  if (!rows.length) return;
  for (const id of ["pictures", "to-pictures"]) byId(id).hidden = false;
  const shown = pictureColumns();
  const list = element("ul", { class: "side-by-side" }, ...rows.map((row) => pictureCard(row, shown)));
  list.style.setProperty("--columns", String(shown.length));
  byId("side-by-side").append(list);
}

// Students whose closed loop has images; earlier evaluations do not store them.
function pictureColumns() {
  const { rows, teacher, untrained } = data.pictures;
  const sampled = data.students.filter(({ closed }) => closed?.final.length);
  const column = (name, places, images) => ({ name, of: (row) => images[places.indexOf(row)] });
  return [
    column("teacher", rows, teacher),
    ...sampled.map(({ name, closed }) => column(sampled.length > 1 ? name : "student", closed.rows, closed.final)),
    ...(untrained.length ? [column("untrained", rows, untrained)] : []),
  ];
}

function pictureCard(row, shown) {
  const prompt = table.prompt[row];
  const side = data.strips.frame_px;
  const kind = isPixelated() ? "frame pixelated" : "frame";
  const figures = shown.map(({ name, of }) => element("figure", {},
    element("img", { src: of(row), alt: `${name}: ${prompt}`, width: side, height: side, class: kind }), element("figcaption", {}, name)));
  return element("li", {},
    element("div", { class: "frames" }, ...figures),
    element("button", { type: "button", title: prompt, click: () => openRow(row) },
      element("span", { class: "quiet" }, `${table.index[row]} `), element("span", { dir: "auto" }, prompt)));
}
