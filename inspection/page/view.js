// The data and the view state: row, step, filters, order and student. The state is kept in the URL's hash.

const data = JSON.parse(byId("data").textContent);
const table = data.trajectories;
const rowOfNumber = new Map(table.index.map((number, row) => [number, row]));
const stripOfRow = new Map(data.strips.rows.map((strip) => [strip.row, strip]));
const lastStep = data.schedule.timesteps.length;

// step: the number of a step, or lastStep for the final latent.
// bin: of a histogram, such as "tokens.3", or "" for all rows.
const START = {
  row: null, step: lastStep, query: "", source: "", show: "all", bin: "", sort: "number", descending: false, student: 0,
};
const view = { ...START };
const watchers = [];

// watch(["row", "step"], draw): draw is called after one of these changed.
function watch(names, draw) {
  watchers.push({ names, draw });
}

function change(wanted) {
  const changed = Object.keys(wanted).filter((name) => view[name] !== wanted[name]);
  if (!changed.length) return;
  Object.assign(view, wanted);
  writeHash();
  tell(changed);
}

function tell(changed) {
  for (const { names, draw } of watchers) {
    if (names.some((name) => changed.includes(name))) draw();
  }
}

function writeHash() {
  const words = new URLSearchParams();
  if (view.row !== null) words.set("row", table.index[view.row]);
  if (view.step !== START.step) words.set("step", view.step);
  if (view.query) words.set("q", view.query);
  if (view.source) words.set("source", view.source);
  if (view.show !== START.show) words.set("show", view.show);
  if (view.bin) words.set("bin", view.bin);
  if (view.sort !== START.sort || view.descending) words.set("sort", (view.descending ? "-" : "") + view.sort);
  if (view.student) words.set("student", data.students[view.student].name);
  try {
    history.replaceState(null, "", `#${words}`);
  } catch {
    // A page without its own URL (a preview, a frame) cannot keep a hash.
  }
}

function hashView() {
  const words = new URLSearchParams(location.hash.slice(1));
  const sort = words.get("sort") ?? START.sort;
  const student = data.students.findIndex(({ name }) => name === words.get("student"));
  const step = words.has("step") ? Number.parseInt(words.get("step"), 10) : START.step;
  return {
    row: rowOfNumber.get(Number.parseInt(words.get("row"), 10)) ?? firstRow(),
    step: Number.isInteger(step) ? clamp(step, 0, lastStep) : START.step,
    query: words.get("q") ?? "",
    source: table.source_names.includes(words.get("source")) ? words.get("source") : "",
    show: words.get("show") ?? START.show,
    bin: binOf(words.get("bin") ?? "") ? words.get("bin") : "",
    sort: sort.replace(/^-/, ""),
    descending: sort.startsWith("-"),
    student: Math.max(student, 0),
  };
}

function firstRow() {
  if (data.strips.rows.length) return data.strips.rows[0].row;
  return table.index.length ? 0 : null;
}

function takeHash() {
  const wanted = hashView();
  const changed = Object.keys(wanted).filter((name) => view[name] !== wanted[name]);
  Object.assign(view, wanted);
  tell(changed);
}

// Select a row from another part of the page; on a narrow screen, scroll to its details.
function openRow(row, step = view.step) {
  change({ row, step });
  reveal();
}

let cameFrom = null;

// The keyboard enters the details, where the arrow keys move the step, and leaves them with Escape.
function enterDetail() {
  cameFrom = document.activeElement;
  reveal();
  (byId("step") ?? byId("detail")).focus({ preventScroll: true });
}

function leaveDetail(event) {
  if (event.key !== "Escape" || !cameFrom) return;
  cameFrom.focus();
  cameFrom = null;
}

function reveal() {
  const detail = byId("detail");
  if (getComputedStyle(detail).position !== "sticky") detail.scrollIntoView({ block: "start" });
}
