"use strict";
// Search and order of the samples. Everything is on the page already; without scripts it stays readable as it is.
(() => {
  const list = document.getElementById("list");
  if (!list) return;
  const search = document.getElementById("search");
  const order = document.getElementById("order");
  const count = document.getElementById("count");
  const items = [...list.children].map((node, index) => ({
    node,
    index,
    text: node.textContent.toLowerCase(),
    gain: node.dataset.gain === "" ? null : Number(node.dataset.gain),
  }));

  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
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

  search.addEventListener("input", filter);
  order.addEventListener("change", sort);
})();
