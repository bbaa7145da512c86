// Markdown -> DOM nodes: the part of it that models write. Everything that is not markup is a text
// node, HTML included. A link keeps its address only if that is http, https or mailto.
import { element } from "./dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*).*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}>\s?(.*)$/;
const ITEM = /^(\s*)(?:[-*+]|(\d{1,9})[.)])\s+(.*)$/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;
const INLINE =
  /(`+)(?!`)([^]*?[^`])\1(?!`)|\*\*(?=\S)([^]*?\S)\*\*|__(?=\S)([^]*?\S)__(?!\w)|\*(?=\S)([^*]*?[^\s*])\*|\b_(?=\S)([^_]*?[^\s_])_\b|~~(?=\S)([^]*?\S)~~|\[([^\]\n]+)\]\(\s*<?([^\s)>]+)>?(?:\s+"[^"]*")?\s*\)/;
const MAX_DEPTH = 20; // of quotes and lists; what is deeper is text
const SAFE_ADDRESS = /^(?:https?:\/\/|mailto:)/i;

export function markdown(text) {
  const fragment = document.createDocumentFragment();
  fragment.append(...blocks(text.replaceAll("\r\n", "\n").split("\n")));
  return fragment;
}

function blocks(lines, depth = 0) {
  const nests = depth < MAX_DEPTH;
  const made = [];
  let i = 0;
  while (i < lines.length) {
    const line = lines[i];
    let match;
    if (!line.trim()) {
      i += 1;
    } else if ((match = FENCE.exec(line))) {
      const end = closingFence(lines, i + 1, match[1]);
      made.push(code(lines.slice(i + 1, end).join("\n"), match[2]));
      i = end + 1;
    } else if ((match = HEADING.exec(line))) {
      made.push(element(`h${match[1].length}`, {}, ...inline(match[2])));
      i += 1;
    } else if (RULE.test(line)) {
      made.push(element("hr"));
      i += 1;
    } else if (nests && QUOTE.test(line)) {
      const end = firstNot(lines, i, (l) => QUOTE.test(l));
      made.push(element("blockquote", {}, ...blocks(lines.slice(i, end).map((l) => QUOTE.exec(l)[1]), depth + 1)));
      i = end;
    } else if (nests && ITEM.test(line)) {
      const end = firstNot(lines, i, (l, j) => belongsToList(lines, l, j, indent(line)));
      made.push(list(lines.slice(i, end), depth + 1));
      i = end;
    } else if (line.includes("|") && i + 1 < lines.length && TABLE_RULE.test(lines[i + 1])) {
      const end = firstNot(lines, i, (l) => l.includes("|"));
      made.push(table(lines.slice(i, end)));
      i = end;
    } else {
      const end = Math.max(i + 1, firstNot(lines, i, (l) => l.trim() && !beginsBlock(l)));
      made.push(element("p", {}, ...inline(lines.slice(i, end).join("\n"))));
      i = end;
    }
  }
  return made;
}

const beginsBlock = (line) => [FENCE, HEADING, RULE, QUOTE, ITEM].some((block) => block.test(line));
const indent = (line) => /^\s*/.exec(line)[0].length;

function firstNot(lines, start, belongs) {
  let i = start;
  while (i < lines.length && belongs(lines[i], i)) i += 1;
  return i;
}

// A fence that is never closed, as while an answer comes, goes to the end.
function closingFence(lines, start, fence) {
  return firstNot(lines, start, (line) => {
    const bare = line.trim();
    return !(bare.startsWith(fence) && [...bare].every((c) => c === fence[0]));
  });
}

function code(text, language) {
  return element("pre", {}, element("code", { text, className: language ? `language-${language}` : "" }));
}

function belongsToList(lines, line, i, depth) {
  if (!line.trim()) {
    const next = lines[i + 1] ?? "";
    return Boolean(next.trim()) && (indent(next) > depth || ITEM.test(next));
  }
  return indent(line) > depth || (ITEM.test(line) && indent(line) === depth) || !beginsBlock(line) && Boolean(lines[i - 1]?.trim());
}

function list(lines, depth) {
  const margin = indent(lines[0]);
  const number = ITEM.exec(lines[0])[2];
  const made = element(number === undefined ? "ul" : "ol");
  if (number !== undefined && number !== "1") made.start = Number(number);
  let item = [];
  const close = () => {
    if (item.length) made.append(element("li", {}, ...tight(blocks(item, depth))));
    item = [];
  };
  for (const line of lines) {
    const match = ITEM.exec(line);
    if (match && match[1].length <= margin) {
      close();
      item.push(match[3]);
    } else {
      item.push(line.slice(Math.min(indent(line), margin + 2)));
    }
  }
  close();
  return made;
}

// The only paragraph of an item is its text.
function tight(nodes) {
  return nodes.flatMap((node, i) => (i === 0 && node.tagName === "P" ? [...node.childNodes] : [node]));
}

function table(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const row = (line, name) => element("tr", {}, ...cells(line).map((c) => element(name, {}, ...inline(c))));
  const head = element("thead", {}, row(lines[0], "th"));
  const body = element("tbody", {}, ...lines.slice(2).map((line) => row(line, "td")));
  return element("div", { className: "table" }, element("table", {}, head, body));
}

function inline(text) {
  const nodes = [];
  for (let match; (match = INLINE.exec(text)); text = text.slice(match.index + match[0].length)) {
    if (match.index) nodes.push(text.slice(0, match.index));
    nodes.push(marked(match));
  }
  if (text) nodes.push(text);
  return nodes;
}

function marked([whole, , codeText, strong, strong2, emphasis, emphasis2, struck, label, address]) {
  if (codeText !== undefined) return element("code", { text: codeText.trim() || codeText });
  if (strong ?? strong2) return element("strong", {}, ...inline(strong ?? strong2));
  if (emphasis ?? emphasis2) return element("em", {}, ...inline(emphasis ?? emphasis2));
  if (struck) return element("del", {}, ...inline(struck));
  if (!SAFE_ADDRESS.test(address)) return whole;
  return element("a", { href: address, target: "_blank", rel: "noopener noreferrer" }, ...inline(label));
}
