// Selection and order of the rows, and the students' errors of a row.

const lowered = table.prompt.map((prompt) => prompt.toLowerCase());
// A short word may occur in many hexadecimal keys by chance: only long words are searched in keys.
const SHORTEST_KEY = 12;

const evaluations = data.students.map((student) => {
  const places = new Map(student.rows.map((row, place) => [row, place]));
  return { student, places, means: student.errors.map(mean), worst: student.errors.map(highest) };
});

const SHOWN = {
  all: { label: "all", has: () => true },
  strips: { label: "with a film strip", has: (row) => stripOfRow.has(row) },
  evaluated: { label: "evaluated", has: (row) => evaluations.some(({ places }) => places.has(row)) },
  held_out: { label: "held out", has: (row) => table.held_out[row] === 1 },
  non_finite: { label: "not finite", has: (row) => table.non_finite[row] > 0 },
};

function sourcesOf(row) {
  return table.sources[row].map((source) => table.source_names[source]).join(", ");
}

function hasValues(name) {
  return Boolean(table[name]?.some(isNumber));
}

function columns() {
  const number = (id, label) => ({ id, label, numeric: true, value: (row) => table[id][row], text: numberText });
  // Noise last: its norm is one unless something is wrong.
  const norms = [["velocity_rms", "Velocity"], ["final_rms", "Final"]];
  return [
    { id: "number", label: "Nr", numeric: true, value: (row) => table.index[row], text: String },
    { id: "prompt", label: "Prompt", value: (row) => table.prompt[row], text: String },
    ...evaluations.flatMap(errorColumns),
    { id: "source", label: "Source", value: sourcesOf, text: String },
    ...(hasValues("guidance") ? [number("guidance", "Guidance")] : []),
    number("tokens", "Tokens"),
    ...norms.filter(([id]) => hasValues(id)).map(([id, label]) => number(id, `${label} rms`)),
    ...(table.non_finite.some((count) => count > 0) ? [number("non_finite", "Not finite")] : []),
  ];
}

function errorColumns({ student, places, means, worst }) {
  const prefix = data.students.length > 1 ? `${student.name} ` : "";
  const column = (kind, values) => ({
    id: `${kind} ${student.name}`,
    label: prefix ? `${prefix}${kind}` : `${kind === "mean" ? "Mean" : "Worst"} error`,
    numeric: true,
    value: (row) => values[places.get(row)],
    text: percentText,
  });
  return [column("mean", means), column("worst", worst)];
}

function matchingRows({ query, source, show, bin }) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  const number = source ? table.source_names.indexOf(source) : -1;
  const { has } = SHOWN[show] ?? SHOWN.all;
  const chosen = binOf(bin);
  const inBin = (row) => !chosen || chosen.distribution.placeOf(chosen.distribution.values[row]) === chosen.place;
  const found = [];
  for (let row = 0; row < lowered.length; row += 1) {
    if (number >= 0 && !table.sources[row].includes(number)) continue;
    if (has(row) && inBin(row) && words.every((word) => occurs(word, row))) found.push(row);
  }
  return found;
}

function occurs(word, row) {
  return lowered[row].includes(word) || (word.length >= SHORTEST_KEY && table.key[row].startsWith(word));
}

const collator = new Intl.Collator("en", { numeric: true });

// Rows without a value are last in either direction; equal ones stay in cache order.
function sortedRows(rows, column, descending) {
  const sign = descending ? -1 : 1;
  const compare = column.numeric ? (a, b) => a - b : collator.compare;
  const values = new Map(rows.map((row) => [row, column.value(row)]));
  const missing = (row) => values.get(row) === null || values.get(row) === undefined;
  const present = rows.filter((row) => !missing(row));
  present.sort((a, b) => sign * compare(values.get(a), values.get(b)) || a - b);
  return [...present, ...rows.filter(missing)];
}
