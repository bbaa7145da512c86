// A line chart of the last two minutes on a canvas.
const POINTS = 120;

export class Chart {
  // lines: how many; top: fixed upper end of the axis, or the largest value if left out.
  constructor(canvas, lines, top) {
    this.canvas = canvas;
    this.top = top;
    this.series = Array.from({ length: lines }, () => []);
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  add(values) {
    this.series.forEach((points, i) => {
      points.push(values[i]);
      if (points.length > POINTS) points.shift();
    });
    this.draw();
  }

  draw() {
    const { canvas, series } = this;
    const scale = window.devicePixelRatio || 1;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    canvas.width = width * scale;
    canvas.height = height * scale;
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    const style = getComputedStyle(canvas);
    const top = this.top ?? niceTop(Math.max(1, ...series.flat()));
    const y = (value) => height - 4 - (value / top) * (height - 20);

    context.font = "11px system-ui, sans-serif";
    context.fillStyle = style.getPropertyValue("color");
    context.strokeStyle = style.getPropertyValue("color");
    context.globalAlpha = 0.55;
    context.fillText(this.top ? "100 %" : String(top), 2, 11);
    context.globalAlpha = 0.15;
    for (const level of [0, top / 2, top]) {
      context.beginPath();
      context.moveTo(0, y(level));
      context.lineTo(width, y(level));
      context.stroke();
    }
    context.globalAlpha = 1;
    context.lineWidth = 2;
    ["--second", "--first"].slice(-series.length).forEach((color, i) => {
      const points = series[series.length - 1 - i];
      context.strokeStyle = resolveColor(canvas, color);
      context.beginPath();
      points.forEach((value, j) => {
        const x = width - ((points.length - 1 - j) / (POINTS - 1)) * width;
        if (j) context.lineTo(x, y(value));
        else context.moveTo(x, y(value));
      });
      context.stroke();
    });
  }
}

// 1, 2 or 5 times a power of ten, not below value.
function niceTop(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((candidate) => candidate >= value);
}

// A custom property may hold light-dark(), which only a real property resolves.
function resolveColor(element, property) {
  const previous = element.style.borderColor;
  element.style.borderColor = `var(${property})`;
  const color = getComputedStyle(element).borderTopColor;
  element.style.borderColor = previous;
  return color;
}
