// Draws every chart of a page: <div class="chart" id="NAME"><script type="application/json">SPECIFICATION</script></div>
for (const place of document.querySelectorAll(".chart")) {
  const specification = JSON.parse(place.querySelector("script").textContent);
  const note = document.createElement("p"); // the last layer, as text of the page: it folds
  note.textContent = specification.layer.pop().encoding.text.value.join(" · ");
  if (specification.usermeta?.fixed) place.classList.add("fixed");
  else specification.width = "container"; // as wide as there is room
  if (place.clientWidth < 480) {
    specification.config.legend.columns = 1;
    Object.assign(specification.title, { fontSize: 13, subtitleFontSize: 11 });
  }
  vegaEmbed(place, specification, {
    renderer: "svg",
    downloadFileName: place.id,
    actions: { export: true, source: false, compiled: false, editor: false },
  }).then(() => {
    place.append(note);
    place.setAttribute("data-drawn", "");
  });
}
