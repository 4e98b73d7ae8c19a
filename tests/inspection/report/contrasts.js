// Of every text and every line of a chart: its contrast with what lies behind it, after WCAG 2.2, and what AA asks for.
() => {
  const channels = (colour) => colour.match(/[\d.]+/g).map(Number);
  const linear = (value) => (value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4);
  const luminance = ([red, green, blue]) => 0.2126 * linear(red) + 0.7152 * linear(green) + 0.0722 * linear(blue);
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const found = channels(getComputedStyle(at).backgroundColor);
      if (found.length === 3 || found[3] > 0) return found;
    }
    return [255, 255, 255];
  };
  const measured = (node, colour, needed) => {
    const [front, back] = [luminance(channels(colour)), luminance(behind(node))];
    const ratio = (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
    return { text: `${node.tagName} ${node.textContent.slice(0, 30)}`, ratio, needed, background: back };
  };
  const visible = [...document.body.querySelectorAll("*")].filter((node) => node.getClientRects().length);
  const texts = visible.filter((node) => [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()));
  const lines = visible.filter((node) => node.matches(".line"));
  return [
    ...texts.map((node) => measured(node, getComputedStyle(node)[node instanceof SVGElement ? "fill" : "color"], 4.5)),
    ...lines.map((node) => measured(node, getComputedStyle(node).stroke, 3)),
  ];
}
