"use strict";
const PAPER = 660;  // px: what an A4 page holds between its margins
const narrow = () => window.innerWidth < 640;

// What all pictures share; their own layout goes over it.
function layout(own) {
  const legend = {orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: {size: narrow() ? 11 : 12}};
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: false, hovermode: "closest",
    font: {family: "system-ui, sans-serif", size: narrow() ? 11 : 12.5}, legend,
    margin: {l: 50, r: 16, t: 12, b: 46}, ...own,
  };
}

const plots = [];
for (const figure of document.querySelectorAll("figure:has(.plot)")) {
  const spec = JSON.parse(figure.querySelector("script").textContent);
  const div = figure.querySelector(".plot");
  const config = {responsive: true, displaylogo: false, displayModeBar: false, scrollZoom: false};
  Plotly.newPlot(div, spec.data, layout(spec.layout), config);
  plots.push(div);
}

// On paper a picture cannot scroll and does not follow the window.
addEventListener("beforeprint", () => plots.forEach(div => Plotly.relayout(div, {width: PAPER, autosize: false})));
addEventListener("afterprint", () => plots.forEach(div => Plotly.relayout(div, {width: null, autosize: true})));

function sortBy(table, column, rising) {
  const text = row => row.cells[column].textContent;
  const order = (a, b) => {
    const [x, y] = [parseFloat(text(a)), parseFloat(text(b))];
    if (isNaN(x) !== isNaN(y)) return isNaN(x) ? 1 : -1;  // what has no figure stays at the end
    return (rising ? 1 : -1) * (isNaN(x) ? text(a).localeCompare(text(b)) : x - y);
  };
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
}

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const rising = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", rising ? "ascending" : "descending");
      sortBy(table, column, rising);
    });
  });
}
document.documentElement.dataset.drawn = plots.length;
