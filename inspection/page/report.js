// Assembles the page.

const BADGES = { intact: ["intact", "✓"], damaged: ["damaged", "✕"], "not checked": ["unchecked", "?"] };
const MOST_PROBLEMS = 100;

// A note is shown in the first section whose pattern it matches.
/** @type {[string, RegExp][]} */
const NOTE_PLACES = [
  ["strips", /film strip/i],
  ["students", /student|error|evaluat|closed loop|curve|replay|\bloss/i],
  ["distributions", /norm|\brms\b|histogram/i],
  ["trajectories", /trajector|prompt|row/i],
];

function startHead() {
  byId("title").textContent = data.title;
  byId("made").textContent = madeText(data);
  facts(byId("summary-facts"), data.summary);
  for (const text of data.notes) {
    const place = NOTE_PLACES.find(([, words]) => words.test(text))?.[0] ?? "summary";
    document.querySelector(`[data-notes="${place}"]`).append(note(text));
  }
}

function startIntegrity() {
  const { state, text, problems } = data.integrity;
  const [name, sign] = BADGES[state] ?? BADGES["not checked"];
  const badge = byId("badge");
  badge.classList.add(name);
  badge.append(element("span", { "aria-hidden": "true" }, sign), ` ${state}`);
  byId("integrity").classList.add(name);
  byId("integrity-text").textContent = text;
  if (!problems.length) return;
  const more = problems.length - MOST_PROBLEMS;
  byId("problems").append(
    element("ul", { class: "problems" }, ...problems.slice(0, MOST_PROBLEMS).map(problemItem)),
    ...(more > 0 ? [element("p", {}, `and ${plural(more, "more problem")}, listed by secondcast inspect verify`)] : []),
  );
}

function problemItem({ path, problem, repair }) {
  return element("li", {}, element("p", {}, element("code", {}, path), " ", problem), repair ? command(repair) : null);
}

function startFilters() {
  const [query, source, show, bin] = [byId("query"), byId("source"), byId("show"), byId("bin")];
  source.append(element("option", { value: "" }, "all"), ...table.source_names.map((name) => element("option", { value: name }, name)));
  const kinds = Object.entries(SHOWN).filter(([kind, { has }]) => kind === "all" || table.index.some((_, row) => has(row)));
  show.append(...kinds.map(([kind, { label }]) => element("option", { value: kind }, label)));
  query.addEventListener("input", () => change({ query: query.value }));
  source.addEventListener("change", () => change({ source: source.value }));
  show.addEventListener("change", () => change({ show: show.value }));
  bin.addEventListener("click", () => {
    change({ bin: "" });
    query.focus();
  });
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  const take = () => {
    if (query.value !== view.query) query.value = view.query;
    source.value = view.source;
    show.value = kinds.some(([kind]) => kind === view.show) ? view.show : "all";
    const chosen = binOf(view.bin);
    bin.hidden = !chosen;
    bin.replaceChildren(...(chosen ? [`${chosen.distribution.title}: ${chosen.text} `, element("span", { "aria-hidden": "true" }, "✕")] : []));
    if (chosen) bin.setAttribute("aria-label", `Remove the filter ${chosen.distribution.title}: ${chosen.text}`);
  };
  watch(FILTERS, take);
  take();
}

// Links within the page leave the hash alone: it holds the view.
function startJumps() {
  document.addEventListener("click", (event) => {
    const link = /** @type {Element} */ (event.target).closest("[data-jump]");
    if (!link) return;
    event.preventDefault();
    const target = byId(link.getAttribute("data-jump"));
    target.scrollIntoView();
    target.focus({ preventScroll: true });
  });
}

function start() {
  const shared = location.hash.includes("row=");
  takeHash();
  startHead();
  startPictures();
  startIntegrity();
  startFilters();
  startJumps();
  startTable();
  startViewer();
  startDetail();
  startGallery();
  startHistograms();
  startStudents();
  addEventListener("hashchange", () => {
    takeHash();
    showRow(view.row);
  });
  document.documentElement.dataset.ready = "true";
  if (shared) reveal();
}

start();
