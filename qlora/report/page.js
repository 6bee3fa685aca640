// Reads out the point under the pointer; the arrow keys move it. Everything else works without scripts.
const number = {
  number: value => String(Number(value.toPrecision(4))),
  count: value => Math.round(value).toLocaleString("en"),
  power: value => value.toExponential(2),
};
for (const chart of document.querySelectorAll(".chart")) {
  const { last, style, series } = JSON.parse(chart.dataset.chart);
  const plot = chart.querySelector(".plot");
  const cursor = chart.querySelector(".cursor");
  const readout = chart.querySelector("output");
  const values = series.map(({ points }) => new Map(points));
  const steps = [...new Set(series.flatMap(({ points }) => points.map(([step]) => step)))].sort((a, b) => a - b);
  let at = steps.length - 1;
  const show = index => {
    at = Math.max(0, Math.min(steps.length - 1, index));
    const named = series.flatMap(({ name }, i) => {
      const value = values[i].get(steps[at]);
      return value === undefined ? [] : [`${name} ${value === null ? "not finite" : number[style](value)}`];
    });
    readout.textContent = [`step ${steps[at].toLocaleString("en")}`, ...named].join(" · ");
    cursor.style.left = `${(100 * steps[at]) / Math.max(last, 1)}%`;
    chart.classList.add("pointed");
  };
  const leave = () => {
    chart.classList.remove("pointed");
    readout.textContent = "";
  };
  plot.addEventListener("pointermove", event => {
    const box = plot.getBoundingClientRect();
    const step = ((event.clientX - box.left) / box.width) * last;
    const next = steps.findIndex(other => other >= step);
    const after = next < 0 ? steps.length - 1 : next;
    show(after > 0 && step - steps[after - 1] < steps[after] - step ? after - 1 : after);
  });
  plot.addEventListener("pointerleave", leave);
  plot.addEventListener("blur", leave);
  plot.addEventListener("focus", () => show(at));
  plot.addEventListener("keydown", event => {
    const moves = { ArrowLeft: at - 1, ArrowRight: at + 1, PageUp: at - 10, PageDown: at + 10, Home: 0, End: Infinity };
    if (event.key in moves) {
      event.preventDefault();
      show(moves[event.key]);
    }
  });
}
