// Text that others wrote, made visible and harmless.

// Controls, direction overrides, invisible letters, tags: shown by their code points, so that none of them acts.
const SIGNS = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\ufff9-\ufffb]|[\u{e0000}-\u{e0fff}]/gu;

// A new element with a class and a text.
export const element = (name, className = "", text = "") => {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (text) node.textContent = text;
  return node;
};

// A block that shows `text` in its own direction, signs that are not to be seen marked.
export const textNode = (text) => {
  const node = element("div", "text");
  node.dir = "auto";
  if (!text.trim()) node.append(element("span", "empty", text ? "(white space only)" : "(empty)"));
  const clean = text.replace(/\r\n/g, "\n");
  let end = 0;
  for (const match of clean.matchAll(SIGNS)) {
    node.append(clean.slice(end, match.index));
    const code = match[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    node.append(element("span", "sign", `U+${code}`));
    end = match.index + match[0].length;
  }
  node.append(clean.slice(end));
  return node;
};
