// A click on a column's title sorts by it; cells without a value come last.
for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, column = head.cellIndex;
    const sign = head.ariaSort === "descending" ? 1 : column || head.ariaSort !== "none"
      ? -1 : 1;
    for (const other of head.parentElement.cells) other.ariaSort = "none";
    head.ariaSort = sign > 0 ? "ascending" : "descending";
    const body = head.closest("table").tBodies[0];
    const key = row => row.cells[column].dataset.value;
    const compare = (a, b) => {
      if (!column) return sign * a.cells[0].textContent.localeCompare(
        b.cells[0].textContent, undefined, { numeric: true });
      if (key(a) === undefined || key(b) === undefined)
        return (key(a) === undefined) - (key(b) === undefined);
      return sign * (key(a) - key(b));
    };
    body.append(...[...body.rows].sort(compare));
  });
}
