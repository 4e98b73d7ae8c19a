// The table of all trajectories. Only visible rows are in the document, so that 100,000 stay fast.

// As in report.css.
const ROW_PX = 32;
const BEYOND = 8;
const FILTERS = ["query", "source", "show", "bin"];

const tableColumns = columns();
const grid = { matches: [], rows: [], placeOf: new Map(), body: null, above: null, below: null, node: null, none: null, scroller: byId("scroller") };

function startTable() {
  [grid.above, grid.below] = [spacer(), spacer()];
  grid.body = element("tbody", {}, grid.above, grid.below);
  grid.node = element(
    "table",
    { role: "grid", tabindex: "0", "aria-label": "Trajectories; arrow keys select one, Enter opens it", keydown: moveInTable },
    element("colgroup", {}, ...tableColumns.map(({ id }) => element("col", { class: `col-${id.split(" ")[0]}` }))),
    element("thead", {}, element("tr", { "aria-rowindex": "1" }, ...tableColumns.map(headCell))),
    grid.body,
  );
  grid.none = element("div", { class: "none" });
  grid.scroller.append(grid.node, grid.none);
  byId("strip-sign").hidden = !data.strips.rows.length;
  grid.scroller.addEventListener("scroll", drawRows, { passive: true });
  grid.body.addEventListener("click", clickInTable);
  new ResizeObserver(drawRows).observe(grid.scroller);
  watch(FILTERS, filterRows);
  watch(["sort", "descending"], orderRows);
  watch(["row"], drawRows);
  filterRows();
  showRow(view.row);
}

function headCell(column) {
  const sort = () => change({ sort: column.id, descending: view.sort === column.id ? !view.descending : firstWay(column) });
  const button = element("button", { type: "button", tabindex: "0", click: sort }, column.label);
  return element("th", { scope: "col", class: column.numeric ? "numeric" : null, "data-column": column.id }, button);
}

// Columns of errors sort the largest first.
function firstWay(column) {
  return column.id.startsWith("mean ") || column.id.startsWith("worst ") || column.id === "non_finite";
}

function filterRows() {
  grid.matches = matchingRows(view);
  const of = grid.matches.length === lowered.length ? "" : ` of ${numberText(lowered.length)}`;
  byId("count").textContent = `${numberText(grid.matches.length)}${of} ${lowered.length === 1 ? "trajectory" : "trajectories"}`;
  grid.none.replaceChildren(...(grid.matches.length ? [] : emptyState()));
  orderRows();
  tell(["matches"]);
}

function emptyState() {
  if (!lowered.length) return [element("p", {}, "The cache has no trajectories yet.")];
  return [element("p", {}, "No trajectory matches."), element("button", { type: "button", click: clearFilters }, "Clear the filters")];
}

function clearFilters() {
  change(Object.fromEntries(FILTERS.map((name) => [name, START[name]])));
  // The button is gone with the filters.
  byId("query").focus();
}

function orderRows() {
  const column = tableColumns.find(({ id }) => id === view.sort) ?? tableColumns[0];
  grid.rows = column.id === "number" && !view.descending ? grid.matches : sortedRows(grid.matches, column, view.descending);
  grid.placeOf = new Map(grid.rows.map((row, place) => [row, place]));
  for (const cell of grid.node.tHead.rows[0].cells) {
    const way = view.descending ? "descending" : "ascending";
    if (cell.dataset.column === column.id) cell.setAttribute("aria-sort", way);
    else cell.removeAttribute("aria-sort");
  }
  grid.node.setAttribute("aria-rowcount", grid.rows.length + 1);
  grid.scroller.scrollTop = 0;
  drawRows();
}

function drawRows() {
  const first = Math.max(Math.floor(grid.scroller.scrollTop / ROW_PX) - BEYOND, 0);
  const count = Math.ceil(grid.scroller.clientHeight / ROW_PX) + 2 * BEYOND;
  const shown = grid.rows.slice(first, first + count);
  grid.above.style.height = `${first * ROW_PX}px`;
  grid.below.style.height = `${(grid.rows.length - first - shown.length) * ROW_PX}px`;
  placeRows(shown, first);
  const active = shown.includes(view.row) ? `row-${view.row}` : "";
  if (active) grid.node.setAttribute("aria-activedescendant", active);
  else grid.node.removeAttribute("aria-activedescendant");
}

// Visible rows stay in the document, so that a mouse press that began on one also ends on it while scrolling.
function placeRows(shown, first) {
  const there = new Map(Array.from(grid.body.querySelectorAll("tr[data-row]"), (node) => [Number(node.dataset.row), node]));
  const wanted = new Set(shown);
  for (const [row, node] of there) if (!wanted.has(row)) node.remove();
  let before = grid.above;
  shown.forEach((row, place) => {
    const node = there.get(row) ?? tableRow(row);
    node.setAttribute("aria-rowindex", first + place + 2);
    node.setAttribute("aria-selected", row === view.row ? "true" : "false");
    if (before.nextSibling !== node) before.after(node);
    before = node;
  });
}

function spacer() {
  return element("tr", { "aria-hidden": "true", class: "spacer" });
}

function tableRow(row) {
  const cells = tableColumns.map((column) => {
    const text = column.text(column.value(row));
    const attributes = { class: column.numeric ? "numeric" : null };
    if (column.id === "prompt") Object.assign(attributes, { dir: "auto", title: text });
    const strip = column.id === "number" && stripOfRow.has(row) ? element("span", { class: "has-strip", title: "has a film strip" }) : null;
    return element("td", attributes, strip, text);
  });
  return element("tr", { id: `row-${row}`, "data-row": row }, ...cells);
}

function clickInTable(event) {
  const row = event.target.closest("tr[data-row]");
  if (row) openRow(Number(row.dataset.row));
}

function moveInTable(event) {
  if (event.target !== grid.node || !grid.rows.length) return;
  const last = grid.rows.length - 1;
  const page = Math.max(Math.floor(grid.scroller.clientHeight / ROW_PX) - 2, 1);
  const place = grid.placeOf.get(view.row) ?? -1;
  const wanted = {
    ArrowDown: place + 1, ArrowUp: place - 1, PageDown: place + page, PageUp: place - page, Home: 0, End: last,
  }[event.key];
  if (event.key === "Enter") enterDetail();
  if (wanted === undefined) return;
  event.preventDefault();
  change({ row: grid.rows[clamp(wanted, 0, last)] });
  showRow(view.row);
}

function showRow(row) {
  const place = grid.placeOf.get(row);
  if (place === undefined) return;
  const head = grid.node.tHead.offsetHeight;
  const top = place * ROW_PX;
  const height = grid.scroller.clientHeight - head;
  if (top < grid.scroller.scrollTop) grid.scroller.scrollTop = top;
  else if (top + ROW_PX > grid.scroller.scrollTop + height) grid.scroller.scrollTop = top + ROW_PX - height;
  drawRows();
}
