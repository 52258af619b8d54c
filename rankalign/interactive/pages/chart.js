// One small line chart in SVG: whole ticks below, values at the side, a reading where the pointer is.
import { element } from "./text.js";

const NS = "http://www.w3.org/2000/svg";
const W = 400;
const H = 210;
const LEFT = 58;
const RIGHT = 10;
const TOP = 8;
const BOTTOM = 28;

const node = (name, attributes, text) => {
  const made = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
};

export const short = (value) => {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-3) return value.toExponential(1).replace("e+", "e");
  return String(Number(value.toPrecision(4)));
};

// Round places between two bounds, four or so; whole numbers where only those have a meaning.
export const ticks = (low, high, whole = false) => {
  const span = high - low || Math.abs(high) || 1;
  const power = 10 ** Math.floor(Math.log10(span / 4));
  let step = [1, 2, 5, 10].map((n) => n * power).find((n) => span / n <= 5);
  if (whole) step = Math.max(1, Math.round(step));
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n += 1) found.push(Number((n * step).toPrecision(12)));
  return found;
};

// Mean over a 25th of the curve to either side; short curves stay as they are.
export const smooth = (points) => {
  const reach = Math.floor(points.length / 25);
  if (reach < 1) return points;
  const sums = [0];
  for (const [, y] of points) sums.push(sums.at(-1) + y);
  return points.map(([x], at) => {
    const first = Math.max(at - reach, 0);
    const last = Math.min(at + reach + 1, points.length);
    return [x, (sums[last] - sums[first]) / (last - first)];
  });
};

const bounds = (series, axis) => {
  let low = Infinity;
  let high = -Infinity;
  for (const { points } of series) for (const point of points) {
    low = Math.min(low, point[axis]);
    high = Math.max(high, point[axis]);
  }
  const room = (high - low) * 0.05 || Math.abs(high) * 0.05 || 0.05;
  return axis ? [low - room, high + room] : low === high ? [low - 1, high + 1] : [low, high];
};

// A figure of `{title, series: [{name, points}]}`; `bare` draws values that are set, not measured.
export const chart = ({ title, series }, bare) => {
  const figure = element("figure");
  const legend = element("ul", "legend");
  const [left, right] = bounds(series, 0);
  const [low, high] = bounds(series, 1);
  const x = (value) => LEFT + ((value - left) / (right - left)) * (W - LEFT - RIGHT);
  const y = (value) => H - BOTTOM - ((value - low) / (high - low)) * (H - TOP - BOTTOM);
  const said = series.map(({ name, points }) => `${name} ${short(points.at(-1)[1])}`).join(", ");
  const svg = node("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${title}: ${said} at step ${series[0].points.at(-1)[0]}` });
  for (const value of ticks(low, high)) {
    svg.append(node("line", { class: "grid", x1: LEFT, x2: W - RIGHT, y1: y(value), y2: y(value) }));
    svg.append(node("text", { x: LEFT - 6, y: y(value) + 5, "text-anchor": "end" }, short(value)));
  }
  for (const value of ticks(left, right, true)) {
    svg.append(node("text", { x: x(value), y: H - BOTTOM + 19, "text-anchor": "middle" }, String(value)));
  }
  svg.append(node("line", { class: "axis", x1: LEFT, x2: W - RIGHT, y1: H - BOTTOM, y2: H - BOTTOM }));
  const path = (points) => points.map(([px, py], n) => `${n ? "L" : "M"}${x(px).toFixed(1)} ${y(py).toFixed(1)}`).join("");
  series.forEach(({ points }, index) => {
    const group = node("g", { class: `s${index + 1}` });
    const main = bare ? points : smooth(points);
    if (main !== points) group.append(node("path", { class: "thin", d: path(points) }));
    if (points.length === 1) group.append(node("circle", { class: "dot", cx: x(points[0][0]), cy: y(points[0][1]), r: 3 }));
    else group.append(node("path", { class: "thick", d: path(main) }));
    svg.append(group);
  });
  const line = node("line", { class: "at", y1: TOP, y2: H - BOTTOM, visibility: "hidden" });
  svg.append(line);
  const names = (step) => {
    const items = series.map(({ name, points }, index) => {
      const near = step === null ? points.at(-1) : points.reduce((a, b) => (Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a));
      return element("li", `s${index + 1}`, `${name.replaceAll("_", " ")} ${short(near[1])}`);
    });
    if (step !== null) items.push(element("li", "", `step ${Math.round(step)}`));
    legend.replaceChildren(...items);
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = left + (((event.clientX - box.left) / box.width) * W - LEFT) / (W - LEFT - RIGHT) * (right - left);
    const step = Math.round(Math.min(right, Math.max(left, at)));
    line.setAttribute("x1", x(step));
    line.setAttribute("x2", x(step));
    line.setAttribute("visibility", "visible");
    names(step);
  });
  svg.addEventListener("pointerleave", () => {
    line.setAttribute("visibility", "hidden");
    names(null);
  });
  names(null);
  figure.append(element("h3", "", title), legend, svg);
  return figure;
};
