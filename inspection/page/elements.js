// Elements and formatting of numbers. Recorded data is inserted as text, never as markup.

const SVG = "http://www.w3.org/2000/svg";

function element(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

function shape(name, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

function filled(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(key, value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

// A form's fields have properties of their own: any type for the checker.
/** @returns {any} */
function byId(id) {
  return document.getElementById(id);
}

function facts(list, pairs) {
  list.replaceChildren(
    ...pairs.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", { dir: "auto" }, value))),
  );
}

function note(text) {
  return element("p", { class: "note" }, text);
}

// A command with a copy button; without access to the clipboard, the text is selected instead.
function command(text) {
  const code = element("code", {}, text);
  const button = element("button", { type: "button", "aria-label": `Copy: ${text}` }, "Copy");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  return element("div", { class: "command" }, code, button);
}

// A word of a POSIX shell.
function shellWord(text) {
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", `'"'"'`)}'`;
}

function isNumber(value) {
  return typeof value === "number" && Number.isFinite(value);
}

function numberText(value) {
  if (!isNumber(value)) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const rounded = Number(value.toPrecision(4));
  return Math.abs(rounded) < 1e-4 ? rounded.toExponential() : String(rounded);
}

function percentText(value) {
  return isNumber(value) ? `${Number((100 * value).toPrecision(3))} %` : "–";
}

function plural(count, one, many = `${one}s`) {
  return `${numberText(count)} ${count === 1 ? one : many}`;
}

function mean(values) {
  let sum = 0;
  let count = 0;
  for (const value of values) {
    if (!isNumber(value)) continue;
    sum += value;
    count += 1;
  }
  return count ? sum / count : null;
}

function highest(values) {
  return values.reduce((found, value) => (isNumber(value) && (found === null || value > found) ? value : found), null);
}

function clamp(value, low, high) {
  return Math.min(Math.max(value, low), high);
}

// Calls draw(width) whenever the width of the container changes; returns a function that redraws.
function responsive(container, draw) {
  let width = 0;
  new ResizeObserver(([entry]) => {
    const now = Math.floor(entry.contentRect.width);
    if (now === 0 || now === width) return;
    width = now;
    draw(width);
  }).observe(container);
  return () => { if (width) draw(width); };
}

function madeText({ created_at, created_by }) {
  return `Report of ${timeText(created_at)}, by ${created_by}`;
}

function timeText(text) {
  const time = new Date(text);
  if (Number.isNaN(time.getTime())) return text;
  return `${time.toLocaleString("en-GB", { dateStyle: "long", timeStyle: "short", timeZone: "UTC" })} UTC`;
}

const darkness = matchMedia("(prefers-color-scheme: dark)");
