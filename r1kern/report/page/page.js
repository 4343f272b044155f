"use strict";
// Values under the pointer (or by arrow keys), tabs, folded completions. Without it all is shown.
document.documentElement.classList.add("js");

function told(value, percent) {
  if (value === null || value === undefined) return "–";
  if (percent) return (100 * value).toFixed(1) + " %";
  return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(4)));
}

function chart(figure) {
  const source = figure.querySelector("script");
  if (!source) return;
  const data = JSON.parse(source.textContent);
  const svg = figure.querySelector("svg"), cross = svg.querySelector(".cross");
  const tip = figure.querySelector(".tip"), box = svg.viewBox.baseVal;
  const steps = [...new Set(data.series.flatMap((s) => s.x))].sort((a, b) => a - b);
  const width = data.high - data.low || 1;
  const place = (x) => data.left + ((x - data.low) / width) * (data.right - data.left);
  let at = -1;

  function show(index) {
    at = Math.max(0, Math.min(steps.length - 1, index));
    const step = steps[at], x = place(step);
    cross.setAttribute("x1", x);
    cross.setAttribute("x2", x);
    cross.removeAttribute("hidden");
    tip.replaceChildren();
    tip.append(Object.assign(document.createElement("b"), { textContent: "step " + step }));
    data.series.forEach((s, i) => {
      const j = s.x.indexOf(step);
      if (j < 0) return;
      const row = document.createElement("div"), mark = document.createElement("i");
      mark.style.setProperty("--c", "var(--c" + (i % 10) + ")");
      const half = s.half && s.half[j] !== null ? " ± " + told(s.half[j], data.percent) : "";
      row.append(mark, s.name + " ", Object.assign(document.createElement("span"), {
        textContent: told(s.y[j], data.percent) + half,
      }));
      tip.append(row);
    });
    tip.hidden = false;
    const right = x > (data.left + data.right) / 2;
    tip.style.left = right ? "" : (100 * (x + 8)) / box.width + "%";
    tip.style.right = right ? (100 * (box.width - x + 8)) / box.width + "%" : "";
    const top = svg.getBoundingClientRect().top - figure.getBoundingClientRect().top;
    tip.style.top = top + 6 + "px";
  }

  function hide() {
    tip.hidden = true;
    cross.setAttribute("hidden", "");
  }

  svg.addEventListener("pointermove", (event) => {
    const area = svg.getBoundingClientRect();
    const x = ((event.clientX - area.left) / area.width) * box.width;
    let best = 0;
    steps.forEach((s, i) => {
      if (Math.abs(place(s) - x) < Math.abs(place(steps[best]) - x)) best = i;
    });
    show(best);
  });
  svg.addEventListener("pointerleave", hide);
  figure.addEventListener("blur", hide);
  figure.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    show(at < 0 ? (move > 0 ? 0 : steps.length - 1) : at + move);
  });
}

function fold(text) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "show all";
  button.addEventListener("click", () => {
    button.textContent = text.classList.toggle("whole") ? "show less" : "show all";
  });
  text.after(button);
}

function select() {
  const links = [...document.querySelectorAll("nav a")];
  if (!links.length) return;
  const wanted = links.findIndex((link) => link.hash === location.hash);
  const chosen = Math.max(0, wanted);
  document.querySelectorAll("main > section").forEach((section, i) => {
    section.classList.toggle("away", i !== chosen);
  });
  links.forEach((link, i) => link.classList.toggle("here", i === chosen));
  if (wanted >= 0) scrollTo(0, 0);
}

document.querySelectorAll("figure.chart").forEach(chart);
document.querySelectorAll(".fold").forEach(fold);
addEventListener("hashchange", select);
select();
