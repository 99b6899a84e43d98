// Making elements, and the little of Markdown that answers are shown with.

export const $ = (id) => document.getElementById(id);

/** An element with properties (data- and aria- attributes by their names) and children. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-")) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

const FENCE = /^```[^\n]*\n([\s\S]*?)(?:^```[^\S\n]*$|(?![\s\S]))/m;
const INLINE = /`([^`\n]+)`|\*\*([^*\n]+)\*\*/;

/** The nodes of `text`: code in fences and in backquotes, bold words, and all else as it is. */
export function marked(text) {
  const nodes = [];
  for (let rest = text; rest !== ""; ) {
    const found = FENCE.exec(rest);
    const before = found ? rest.slice(0, found.index) : rest;
    nodes.push(...inline(found ? before.replace(/\n+$/, "") : before));
    if (found) nodes.push(make("pre", { tabIndex: 0 }, make("code", {}, found[1].replace(/\n$/, ""))));
    rest = found ? rest.slice(found.index + found[0].length).replace(/^\n+/, "") : "";
  }
  return nodes;
}

function inline(text) {
  const nodes = [];
  for (let rest = text; rest !== ""; ) {
    const found = INLINE.exec(rest);
    nodes.push(found ? rest.slice(0, found.index) : rest);
    if (found) nodes.push(found[1] ? make("code", {}, found[1]) : make("strong", {}, found[2]));
    rest = found ? rest.slice(found.index + found[0].length) : "";
  }
  return nodes.filter((node) => node !== "");
}

/** 1234.5 as "1,235", and 3.14159 as "3.1". */
export function figure(number) {
  const digits = Math.abs(number) < 10 ? 1 : 0;
  return number.toLocaleString("en", { maximumFractionDigits: digits });
}

/** Microseconds with a unit. */
export function duration(us) {
  if (us < 1000) return `${figure(us)} µs`;
  return us < 1e6 ? `${figure(us / 1e3)} ms` : `${figure(us / 1e6)} s`;
}

/** Bytes with a unit. */
export function size(bytes) {
  return bytes < 2 ** 30 ? `${figure(bytes / 2 ** 20)} MiB` : `${figure(bytes / 2 ** 30)} GiB`;
}
