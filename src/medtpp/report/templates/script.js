"use strict";

// Choose one line in the plots of a section: the others fade.
for (const select of document.querySelectorAll("[data-choose]")) {
  select.closest(".chooser").classList.add("ready");
  const section = select.closest("section");
  select.addEventListener("change", () => {
    for (const part of section.querySelectorAll("[data-series]")) {
      part.classList.toggle("faded", select.value !== "" && part.dataset.series !== select.value);
    }
  });
}

// Sort a table by a column: numbers by value, other cells as text, empty ones last.
const text = (row, column) => row.cells[column].textContent.trim();
const value = (row, column) => parseFloat(text(row, column).replaceAll(",", "").replace("−", "-"));

const compare = (column, ascending, numeric) => (one, other) => {
  if (!numeric) {
    return (ascending ? 1 : -1) * text(one, column).localeCompare(text(other, column), undefined, { numeric: true });
  }
  const [a, b] = [value(one, column), value(other, column)];
  if (Number.isNaN(a) || Number.isNaN(b)) {
    return Number.isNaN(a) - Number.isNaN(b);
  }
  return ascending ? a - b : b - a;
};

for (const table of document.querySelectorAll("table[data-sortable]")) {
  const body = table.tBodies[0];
  if (body.rows.length < 2) {
    continue;
  }
  for (const header of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => {
      const numeric = header.classList.contains("num");
      const before = header.getAttribute("aria-sort");
      const ascending = before ? before === "descending" : !numeric;
      for (const other of table.tHead.rows[0].cells) {
        other.removeAttribute("aria-sort");
      }
      header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      body.append(...[...body.rows].sort(compare(header.cellIndex, ascending, numeric)));
    });
  }
}

// Enlarge an image.
const dialog = document.getElementById("zoom");
const large = dialog.appendChild(new Image());
for (const image of document.querySelectorAll("img[data-zoom]")) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "zoom";
  button.setAttribute("aria-label", `Enlarge: ${image.alt}`);
  image.replaceWith(button);
  button.append(image);
  button.addEventListener("click", () => {
    large.src = image.src;
    large.alt = image.alt;
    dialog.showModal();
  });
}
dialog.addEventListener("click", (event) => {
  if (event.target === dialog) {
    dialog.close();
  }
});

// Paper shows everything, and the screen what it showed before.
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  opened.forEach((part) => (part.open = true));
});
addEventListener("afterprint", () => opened.forEach((part) => (part.open = false)));
