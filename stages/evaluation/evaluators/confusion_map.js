// Zooms the confusion matrix and says what is under the pointer. Without it the picture stands still.
const { names, cells } = JSON.parse(document.getElementById("confusion").textContent);
const box = document.querySelector(".zoom"), picture = box.querySelector("img");
const caption = document.querySelector(".map .cell"), atRest = caption.textContent;
const counts = new Map(cells.map(([row, column, count]) => [row * names.length + column, count]));
const totals = new Array(names.length).fill(0);
for (const [row, , count] of cells) totals[row] += count;
document.querySelector(".map .hint").hidden = false;

let scale = 1, left = 0, top_ = 0, held = null;
const most = Math.max(1, names.length / 8); // eight classes fill the box

function place() {
  const size = box.clientWidth;
  left = Math.min(0, Math.max(left, size - size * scale));
  top_ = Math.min(0, Math.max(top_, size - size * scale));
  picture.style.transform = `translate(${left}px, ${top_}px) scale(${scale})`;
}

function describe(event) {
  const corner = box.getBoundingClientRect(), side = (box.clientWidth * scale) / names.length;
  const column = Math.floor((event.clientX - corner.left - box.clientLeft - left) / side);
  const row = Math.floor((event.clientY - corner.top - box.clientTop - top_) / side);
  if (!(names[row] && names[column])) return;
  const count = counts.get(row * names.length + column) || 0;
  caption.textContent = `${names[row]}: ${count} of ${totals[row]} ${row === column ? "are named right" : `are taken for ${names[column]}`}.`;
}

box.addEventListener("wheel", (event) => {
  if (!event.ctrlKey && !event.metaKey) return; // the page scrolls
  event.preventDefault();
  const corner = box.getBoundingClientRect(), x = event.clientX - corner.left, y = event.clientY - corner.top;
  const wanted = Math.min(most, Math.max(1, scale * Math.exp(-event.deltaY / 400)));
  left = x - ((x - left) * wanted) / scale;
  top_ = y - ((y - top_) * wanted) / scale;
  scale = wanted;
  place();
  describe(event);
}, { passive: false });
box.addEventListener("pointerdown", (event) => { held = [event.clientX - left, event.clientY - top_]; box.setPointerCapture(event.pointerId); event.preventDefault(); });
box.addEventListener("pointerup", () => { held = null; });
box.addEventListener("pointermove", (event) => {
  if (held) { [left, top_] = [event.clientX - held[0], event.clientY - held[1]]; place(); }
  describe(event);
});
box.addEventListener("pointerleave", () => { caption.textContent = atRest; });
box.addEventListener("dblclick", () => { scale = 1; left = top_ = 0; place(); });
window.addEventListener("resize", place);
