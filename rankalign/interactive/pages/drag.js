// Dragging with the pointer: mouse, pen and finger alike.
import { element } from "./text.js";

const NEAR = 6; // pixels that a press may slip

// Lets what matches `from` be dragged onto what matches `onto`. `free()` tells whether that is allowed now,
// `drop(source, target)` and, where the pointer did not leave its place, `press(source, click)` do the work.
export const enableDrag = (from, onto, { free, drop, press }) => {
  let drag = null; // { source, x, y, pointer, ghost }; the ghost appears when the pointer has left its place
  let dragged = false; // the click that ends a drag is no press

  const target = ({ clientX, clientY }) => document.elementFromPoint(clientX, clientY)?.closest(onto) ?? null;
  const mark = (node) => {
    document.querySelectorAll(".over").forEach((other) => other.classList.remove("over"));
    node?.classList.add("over");
  };
  const end = () => {
    drag?.ghost?.remove();
    drag = null;
    mark(null);
    document.body.classList.remove("dragging");
  };
  const lift = () => {
    drag.ghost = element("div", "ghost", drag.source.textContent);
    document.body.append(drag.ghost);
    document.body.classList.add("dragging");
  };

  addEventListener("pointerdown", (event) => {
    dragged = false;
    const source = event.target.closest?.(from);
    if (!source || !free() || event.button !== 0 || drag) return;
    drag = { source, x: event.clientX, y: event.clientY, pointer: event.pointerId, ghost: null };
  });
  addEventListener("pointermove", (event) => {
    if (event.pointerId !== drag?.pointer) return;
    if (!drag.ghost && Math.hypot(event.clientX - drag.x, event.clientY - drag.y) > NEAR) lift();
    if (!drag.ghost) return;
    drag.ghost.style.left = `${event.clientX}px`;
    drag.ghost.style.top = `${event.clientY}px`;
    mark(target(event));
  });
  addEventListener("pointerup", (event) => {
    if (event.pointerId !== drag?.pointer) return;
    const { source, ghost } = drag;
    end();
    dragged = Boolean(ghost);
    const there = target(event);
    if (dragged && there && free()) drop(source, there);
  });
  addEventListener("pointercancel", end);
  addEventListener("keydown", (event) => { if (event.key === "Escape") end(); });
  addEventListener("click", (event) => {
    const source = event.target.closest?.(from);
    if (source && !dragged && free()) press(source, event);
  });
};
