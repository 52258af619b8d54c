"use strict";
// Folds, search and order of the samples. Everything is on the page already; without scripts it stays readable as it is.
(() => {
  const FEW = 20; // samples on show before "Show all"

  // A link to a folded section unfolds it; paper has no folds.
  const unfold = (hash) => {
    const target = hash.length > 1 && document.getElementById(decodeURIComponent(hash.slice(1)));
    for (let node = target; node; node = node.parentElement) if (node.tagName === "DETAILS") node.open = true;
  };
  addEventListener("hashchange", () => unfold(location.hash));
  for (const link of document.querySelectorAll('a[href^="#"]')) link.addEventListener("click", () => unfold(link.hash));
  unfold(location.hash);
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((node) => { node.open = true; }));

  // Tables wider than the page say so.
  const wide = () => {
    for (const box of document.querySelectorAll(".scroll")) box.classList.toggle("wide", box.scrollWidth > box.clientWidth + 1);
  };
  addEventListener("resize", wide);
  document.addEventListener("toggle", wide, true);
  wide();

  const list = document.getElementById("list");
  if (!list) return;
  const search = document.getElementById("search");
  const order = document.getElementById("order");
  const count = document.getElementById("count");
  const all = document.getElementById("all");
  const items = [...list.children].map((node, index) => ({
    node,
    index,
    text: node.textContent.toLowerCase(),
    gain: node.dataset.gain === "" ? null : Number(node.dataset.gain),
  }));
  const few = (on) => {
    list.classList.toggle("few", on);
    all.hidden = !on;
    count.textContent = `${on ? FEW : items.length} of ${items.length} prompts`;
  };

  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    if (words.length) few(false);
    for (const item of items) {
      item.node.hidden = !words.every((word) => item.text.includes(word));
      if (!item.node.hidden) shown += 1;
    }
    count.textContent = `${shown} of ${items.length} prompts`;
  };

  const sort = () => {
    const sign = { gain: -1, loss: 1 }[order.value];
    const key = (item) => (item.gain === null ? Infinity : sign * item.gain);
    const sorted = sign ? [...items].sort((a, b) => key(a) - key(b) || a.index - b.index) : items;
    list.append(...sorted.map((item) => item.node));
  };

  few(items.length > FEW);
  all.textContent = `Show all ${items.length}`;
  all.addEventListener("click", () => few(false));
  search.addEventListener("input", filter);
  order.addEventListener("change", sort);
})();
