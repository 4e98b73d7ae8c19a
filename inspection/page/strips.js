// Film strips: a viewer with a slider over the steps, and a gallery of all strips.

const pictures = new Map();
const viewer = { row: null, node: byId("viewer") };
// Frames this small are from a miniature world: show their pixels as squares.
const SMALL_FRAME_PX = 48;
// A frame of the strip below.
const NARROWEST_REM = 2;
const WIDEST_REM = 5;

function picture(address) {
  if (!pictures.has(address)) {
    const image = new Image();
    image.src = address;
    pictures.set(address, image.decode().then(() => image));
  }
  return pictures.get(address);
}

function isPixelated() {
  return data.strips.frame_px <= SMALL_FRAME_PX;
}

function framePlace(step) {
  const { steps } = data.strips;
  if (step >= lastStep) return steps.length;
  const distance = (place) => Math.abs(steps[place] - step);
  return steps.reduce((best, _, place) => (distance(place) < distance(best) ? place : best), 0);
}

function stepAt(place) {
  return data.strips.steps[place] ?? lastStep;
}

function stepText(place) {
  const step = stepAt(place);
  if (step === lastStep) return `final latent, σ ${numberText(data.schedule.sigmas[lastStep])}`;
  const { sigmas, timesteps } = data.schedule;
  return `step ${step} of ${lastStep}, σ ${numberText(sigmas[step])}, timestep ${numberText(timesteps[step])}`;
}

function frameCanvas(label) {
  return element("canvas", { class: isPixelated() ? "frame pixelated" : "frame", role: "img", "aria-label": label });
}

// place: column of the sheet; half: 0 for the latents, 1 for the predicted clean ones.
async function drawFrame(canvas, strip, place, half) {
  canvas.dataset.wanted = `${strip.row}/${place}`;
  const sheet = await picture(strip.sheet);
  if (canvas.dataset.wanted !== `${strip.row}/${place}`) return;
  const width = sheet.naturalWidth / (data.strips.steps.length + 1);
  const height = sheet.naturalHeight / 2;
  Object.assign(canvas, { width, height });
  canvas.getContext("2d").drawImage(sheet, place * width, half * height, width, height, 0, 0, width, height);
  canvas.dataset.shown = canvas.dataset.wanted;
}

const PLAY_MS = 160;

function playButton() {
  const button = element("button", { type: "button", click: () => (viewer.playing ? stopPlaying() : startPlaying()) }, "Play");
  viewer.playButton = button;
  return button;
}

function startPlaying() {
  viewer.playButton.textContent = "Stop";
  const frames = data.strips.steps.length;
  if (framePlace(view.step) === frames) change({ step: stepAt(0) });
  viewer.playing = setInterval(() => {
    const next = framePlace(view.step) + 1;
    change({ step: stepAt(next) });
    if (next >= frames) stopPlaying();
  }, PLAY_MS);
}

function stopPlaying() {
  clearInterval(viewer.playing);
  viewer.playing = null;
  viewer.playButton.textContent = "Play";
}

function startViewer() {
  const { strips } = data;
  viewer.latent = frameCanvas("latent");
  viewer.clean = frameCanvas("predicted clean image");
  viewer.text = element("output", { id: "step-text", class: "readout" });
  viewer.slider = element("input", {
    type: "range", id: "step", min: "0", max: strips.steps.length, step: "1", "aria-label": "Step",
    input: () => change({ step: stepAt(Number(viewer.slider.value)) }),
  });
  viewer.sheet = element("img", { alt: "", class: isPixelated() ? "pixelated" : "" });
  viewer.marks = element("div", { class: "marks" }, ...[...strips.steps, lastStep].map(mark));
  const sheet = element("div", { class: "sheet" }, viewer.sheet, viewer.marks);
  const frames = strips.steps.length + 1;
  Object.assign(sheet.style, { minWidth: `${frames * NARROWEST_REM}rem`, maxWidth: `${frames * WIDEST_REM}rem` });
  viewer.film = element("div", { class: "film" }, sheet);
  viewer.parts = [
    element("div", { class: "frames" },
      element("figure", {}, viewer.latent, element("figcaption", {}, "Latent x", element("sub", {}, "k"))),
      element("figure", {}, viewer.clean, element("figcaption", {}, "Predicted clean image"))),
    viewer.text, element("div", { class: "slider" }, viewer.slider, playButton()), viewer.film,
  ];
  viewer.sheet.addEventListener("load", followMark);
  watch(["row"], drawViewer);
  watch(["step"], drawStep);
  drawViewer();
}

function mark(step, place) {
  const click = () => {
    change({ step: stepAt(place) });
    viewer.slider.focus();
  };
  // The slider serves the keyboard; tab stops on every frame would be in the way.
  return element("button", { type: "button", tabindex: "-1", "aria-label": stepText(place), title: stepText(place), click });
}

function stripNeighbour(way) {
  const rows = data.strips.rows.map(({ row }) => row);
  const place = rows.indexOf(view.row);
  if (place < 0) return rows[way > 0 ? 0 : rows.length - 1];
  return rows[(place + way + rows.length) % rows.length];
}

function stripButtons() {
  if (!data.strips.rows.length) return null;
  const button = (way, text) => element("button", { type: "button", click: () => change({ row: stripNeighbour(way) }) }, text);
  const rows = data.strips.rows.map(({ row }) => row);
  const place = element("span", { class: "quiet", id: "strip-place" });
  const say = () => {
    const here = rows.indexOf(view.row);
    place.textContent = here < 0 ? plural(rows.length, "film strip") : `film strip ${here + 1} of ${rows.length}${whyText(data.strips.rows[here], ": ")}`;
  };
  watch(["row"], say);
  say();
  return element("div", { class: "row strip-buttons" }, button(-1, "← Previous strip"), place, button(1, "Next strip →"));
}

// If all strips were requested there is no reason to show.
function whyText({ why }, before = "") {
  return why === "all" ? "" : before + why;
}

function drawViewer() {
  const strip = stripOfRow.get(view.row);
  stopPlaying();
  if (!strip) {
    viewer.node.replaceChildren(...withoutStrip());
    return;
  }
  viewer.sheet.src = strip.sheet;
  if (viewer.text.parentNode !== viewer.node) viewer.node.replaceChildren(...viewer.parts);
  drawStep();
}

function withoutStrip() {
  if (view.row === null) return [];
  const cache = shellWord(data.cache);
  if (table.damaged?.includes(view.row)) return [note("This trajectory cannot be read: its shard is damaged. The Integrity section shows how to repair it.")];
  return [
    note("This trajectory has no film strip in this report. To show it, run:"),
    command(`secondcast inspect images ${cache} ${table.index[view.row]}`),
  ];
}

function drawStep() {
  const strip = stripOfRow.get(view.row);
  if (!strip) return;
  const place = framePlace(view.step);
  viewer.slider.value = place;
  viewer.slider.setAttribute("aria-valuetext", stepText(place));
  viewer.text.textContent = stepText(place);
  for (const [half, name, canvas] of [[0, "latent", viewer.latent], [1, "predicted clean image", viewer.clean]]) {
    canvas.setAttribute("aria-label", `${name}, ${stepText(place)}`);
    drawFrame(canvas, strip, place, half);
  }
  [...viewer.marks.children].forEach((button, at) => { button.classList.toggle("present", at === place); });
  followMark();
}

function followMark() {
  const present = viewer.marks.querySelector(".present");
  if (!present) return;
  const middle = present.offsetLeft + present.offsetWidth / 2;
  viewer.film.scrollLeft = middle - viewer.film.clientWidth / 2;
}

function startGallery() {
  const gallery = byId("gallery");
  const { rows, steps } = data.strips;
  if (!rows.length) {
    gallery.append(element("p", {}, "No film strips in this report."));
    return;
  }
  const stripOfCanvas = new Map();
  const sight = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      sight.unobserve(target);
      drawFrame(target, stripOfCanvas.get(target), steps.length, 1);
    }
  }, { rootMargin: "300px" });
  const items = rows.map((strip) => {
    const canvas = frameCanvas("final image");
    stripOfCanvas.set(canvas, strip);
    sight.observe(canvas);
    return galleryItem(strip, canvas);
  });
  const label = "Film strips; arrow keys move between them";
  gallery.append(element("ul", { class: "gallery", "aria-label": label, keydown: moveInGallery }, ...items));
  const buttons = items.map((item) => item.firstChild);
  const markChosen = () => {
    const chosen = rows.findIndex(({ row }) => row === view.row);
    buttons.forEach((button, place) => { button.setAttribute("aria-current", place === chosen ? "true" : "false"); });
    stopAt(buttons, buttons[Math.max(chosen, 0)]);
  };
  watch(["row"], markChosen);
  markChosen();
}

// Only one strip is a tab stop: a hundred would be in the way.
function stopAt(buttons, stop) {
  for (const button of buttons) button.tabIndex = button === stop ? 0 : -1;
}

function moveInGallery(event) {
  // With modifiers the keys belong to the browser, as Alt and an arrow for going back.
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const buttons = [...event.currentTarget.querySelectorAll("button")];
  const place = buttons.indexOf(event.target);
  const across = buttons.filter((button) => button.offsetTop === buttons[0].offsetTop).length;
  const last = buttons.length - 1;
  const wanted = {
    ArrowRight: place + 1, ArrowLeft: place - 1, ArrowDown: place + across, ArrowUp: place - across, Home: 0, End: last,
  }[event.key];
  if (wanted === undefined) return;
  event.preventDefault();
  const stop = buttons[clamp(wanted, 0, last)];
  stopAt(buttons, stop);
  stop.focus();
}

function galleryItem(strip, canvas) {
  const prompt = table.prompt[strip.row];
  return element("li", {}, element("button", { type: "button", title: prompt, click: () => openRow(strip.row) },
    canvas,
    element("span", { class: "number" }, String(table.index[strip.row]), element("span", { class: "why" }, whyText(strip))),
    element("span", { class: "words", dir: "auto" }, prompt)));
}
