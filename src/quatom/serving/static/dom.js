// Elements are made by name and text alone: what a model or a user writes is never parsed as HTML.

export function element(name, { text, className, ...properties } = {}, ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  Object.assign(made, properties);
  made.append(...children);
  return made;
}
