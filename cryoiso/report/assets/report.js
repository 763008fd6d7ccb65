/* Values under the mouse, and a surface that turns. Without this script the page shows the same pictures, still. */
(function () {
  "use strict";
  const data = JSON.parse(document.getElementById("cryoiso-data").textContent);
  const state = (window.cryoisoReport = { hover: 0, surfaces: 0, frames: 0, errors: [] });
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;
  document.body.appendChild(tip);

  function said(value) {
    return value === null || value === undefined ? "–" : String(Number(value.toPrecision(4)));
  }

  /* place on an axis: fraction of its length -> value */
  function valueAt(axis, part) {
    const [low, high, scale] = axis;
    return scale === "log" ? low * Math.pow(high / low, part) : low + (high - low) * part;
  }

  function nearest(values, wanted) {
    let best = -1, least = Infinity;
    for (let i = 0; i < values.length; i++) {
      if (values[i] === null) continue;
      const apart = Math.abs(values[i] - wanted);
      if (apart < least) [best, least] = [i, apart];
    }
    return best;
  }

  function linesAt(axes, x) {
    const name = axes.xlabel || "x";
    const rows = [[null, name + ": " + said(x)]];
    if (name.startsWith("spatial frequency") && x > 0) rows[0][1] += " (" + said(1 / x) + " Å)";
    for (const line of axes.lines) {
      const i = nearest(line.x, x);
      if (i >= 0) rows.push([line.colour, line.label + ": " + said(line.y[i])]);
    }
    return rows;
  }

  function cellAt(axes, x, y) {
    const cells = axes.cells;
    let best = -1, least = Infinity;
    for (let i = 0; i < cells.x.length; i++) {
      const apart = (cells.x[i] - x) ** 2 + (cells.y[i] - y) ** 2;
      if (apart < least) [best, least] = [i, apart];
    }
    const wide = axes.x[1] - axes.x[0];
    return least > 0.01 * wide * wide ? null : [[null, (axes.unit ? axes.unit + ": " : "") + said(cells.value[best])]];
  }

  function imageAt(axes, x, y) {
    const [left, right, bottom, top] = axes.image.extent, values = axes.image.values;
    const row = Math.floor(((y - bottom) / (top - bottom)) * values.length);
    const column = Math.floor(((x - left) / (right - left)) * (values[0] || []).length);
    if (!(row in values) || !(column in values[row]) || values[row][column] === null) return null;
    return [[null, (axes.unit ? axes.unit + ": " : "") + said(values[row][column])]];
  }

  function show(rows, event) {
    tip.textContent = "";
    for (const [colour, text] of rows) {
      const line = document.createElement("div");
      if (colour) {
        const mark = document.createElement("i");
        mark.style.background = colour;
        line.appendChild(mark);
      }
      line.appendChild(document.createTextNode(text));
      tip.appendChild(line);
    }
    tip.hidden = false;
    const left = Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8);
    const above = event.clientY + 18 + tip.offsetHeight > window.innerHeight;
    tip.style.left = Math.max(4, left) + "px";
    tip.style.top = (above ? event.clientY - tip.offsetHeight - 10 : event.clientY + 18) + "px";
  }

  function withHover(figure, list) {
    const picture = figure.querySelector("img");
    if (!picture) return;
    const rule = document.createElement("div");
    rule.className = "rule";
    rule.hidden = true;
    figure.appendChild(rule);
    picture.addEventListener("pointermove", function (event) {
      const frame = picture.getBoundingClientRect(), pad = parseFloat(getComputedStyle(picture).paddingLeft) || 0;
      const wide = frame.width - 2 * pad, high = frame.height - 2 * pad;
      const fx = (event.clientX - frame.left - pad) / wide, fy = (event.clientY - frame.top - pad) / high;
      const axes = list.find((a) => fx >= a.box[0] && fx <= a.box[0] + a.box[2] && fy >= a.box[1] && fy <= a.box[1] + a.box[3]);
      let rows = null;
      if (axes) {
        const px = (fx - axes.box[0]) / axes.box[2], py = 1 - (fy - axes.box[1]) / axes.box[3];
        const x = valueAt(axes.x, px), y = valueAt(axes.y, py);
        rows = axes.lines ? linesAt(axes, x) : axes.cells ? cellAt(axes, x, y) : imageAt(axes, x, y);
      }
      tip.hidden = rule.hidden = true;
      if (!rows) return;
      show(rows, event);
      if (axes.lines) {
        const outer = figure.getBoundingClientRect();
        rule.hidden = false;
        rule.style.left = event.clientX - outer.left - figure.clientLeft + "px";
        rule.style.top = frame.top + pad + axes.box[1] * high - outer.top - figure.clientTop + "px";
        rule.style.height = axes.box[3] * high + "px";
      }
    });
    picture.addEventListener("pointerleave", function () {
      tip.hidden = rule.hidden = true;
    });
    state.hover += 1;
  }

  /* ---- a surface, drawn triangle by triangle: no graphics card, no library */

  function bytes(text) {
    const raw = atob(text), out = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
    return out.buffer;
  }

  function colourOf(value, stops) {
    if (value === 255) return [170, 178, 186];
    const at = (value / 254) * (stops.length - 1), i = Math.min(Math.floor(at), stops.length - 2), part = at - i;
    return [0, 1, 2].map((k) => stops[i][k] + part * (stops[i + 1][k] - stops[i][k]));
  }

  function meshOf(packed, stops) {
    const placed = new Uint16Array(bytes(packed.vertices)), triangles = new Uint32Array(bytes(packed.triangles));
    const values = new Uint8Array(bytes(packed.values)), n = packed.n;
    const points = new Float32Array(3 * n), normals = new Float32Array(3 * n), colours = new Float32Array(3 * n);
    const low = [1e9, 1e9, 1e9], high = [-1e9, -1e9, -1e9];
    for (let i = 0; i < 3 * n; i++) {
      points[i] = placed[i] / 65535;
      low[i % 3] = Math.min(low[i % 3], points[i]);
      high[i % 3] = Math.max(high[i % 3], points[i]);
    }
    let reach = 1e-9;
    for (let i = 0; i < n; i++) {
      let far = 0;
      for (let k = 0; k < 3; k++) {
        points[3 * i + k] -= (low[k] + high[k]) / 2;
        far += points[3 * i + k] ** 2;
      }
      reach = Math.max(reach, Math.sqrt(far));
      colours.set(colourOf(values[i], stops), 3 * i);
    }
    for (let i = 0; i < 3 * n; i++) points[i] /= reach;
    for (let t = 0; t < triangles.length; t += 3) {
      const [a, b, c] = [3 * triangles[t], 3 * triangles[t + 1], 3 * triangles[t + 2]];
      const u = [0, 1, 2].map((k) => points[b + k] - points[a + k]), v = [0, 1, 2].map((k) => points[c + k] - points[a + k]);
      const across = [u[1] * v[2] - u[2] * v[1], u[2] * v[0] - u[0] * v[2], u[0] * v[1] - u[1] * v[0]];
      for (const corner of [a, b, c]) for (let k = 0; k < 3; k++) normals[corner + k] += across[k];
    }
    for (let i = 0; i < n; i++) {
      const size = Math.hypot(normals[3 * i], normals[3 * i + 1], normals[3 * i + 2]) || 1;
      for (let k = 0; k < 3; k++) normals[3 * i + k] /= size;
    }
    return { n, points, normals, colours, triangles };
  }

  /* rows: right, up, towards the viewer; z of the map is upright at tilt 0 */
  function viewOf(turn, tilt) {
    const [c, s, d, e] = [Math.cos(turn), Math.sin(turn), Math.cos(tilt), Math.sin(tilt)];
    return [c, s, 0, s * e, -c * e, d, s * d, -c * d, -e];
  }

  function paint(canvas, mesh, view, zoom) {
    const wide = canvas.width, high = canvas.height, picture = new ImageData(wide, high), pixels = picture.data;
    const depth = new Float32Array(wide * high).fill(-1e9);
    const n = mesh.n, x = new Float32Array(n), y = new Float32Array(n), z = new Float32Array(n), light = new Float32Array(n);
    const half = (zoom * Math.min(wide, high)) / 2.08;
    for (let i = 0; i < n; i++) {
      const p = mesh.points[3 * i], q = mesh.points[3 * i + 1], r = mesh.points[3 * i + 2];
      x[i] = wide / 2 + half * (view[0] * p + view[1] * q + view[2] * r);
      y[i] = high / 2 - half * (view[3] * p + view[4] * q + view[5] * r);
      z[i] = view[6] * p + view[7] * q + view[8] * r;
      const a = mesh.normals[3 * i], b = mesh.normals[3 * i + 1], c = mesh.normals[3 * i + 2];
      const right = view[0] * a + view[1] * b + view[2] * c, up = view[3] * a + view[4] * b + view[5] * c;
      const near = view[6] * a + view[7] * b + view[8] * c;
      const lit = 0.3 + 0.62 * Math.max(0, -0.42 * right + 0.55 * up + 0.72 * near) + 0.16 * Math.max(0, 0.8 * right + 0.6 * near);
      light[i] = 1.12 * lit * (0.88 + 0.12 * z[i]);
    }
    let drawn = 0;
    for (let t = 0; t < mesh.triangles.length; t += 3) {
      const a = mesh.triangles[t], b = mesh.triangles[t + 1], c = mesh.triangles[t + 2];
      const area = (x[b] - x[a]) * (y[c] - y[a]) - (x[c] - x[a]) * (y[b] - y[a]);
      if (area >= 0) continue; /* seen from inside: the picture's y points down */
      const left = Math.max(0, Math.ceil(Math.min(x[a], x[b], x[c]) - 0.5)), right = Math.min(wide - 1, Math.floor(Math.max(x[a], x[b], x[c]) - 0.5));
      const top = Math.max(0, Math.ceil(Math.min(y[a], y[b], y[c]) - 0.5)), bottom = Math.min(high - 1, Math.floor(Math.max(y[a], y[b], y[c]) - 0.5));
      for (let row = top; row <= bottom; row++) {
        for (let column = left; column <= right; column++) {
          const px = column + 0.5, py = row + 0.5;
          const v = ((px - x[a]) * (y[c] - y[a]) - (x[c] - x[a]) * (py - y[a])) / area;
          const w = ((x[b] - x[a]) * (py - y[a]) - (px - x[a]) * (y[b] - y[a])) / area;
          const u = 1 - v - w;
          if (u < -1e-4 || v < -1e-4 || w < -1e-4) continue;
          const place = row * wide + column, near = u * z[a] + v * z[b] + w * z[c];
          if (near <= depth[place]) continue;
          depth[place] = near;
          const lit = u * light[a] + v * light[b] + w * light[c];
          for (let k = 0; k < 3; k++) {
            pixels[4 * place + k] = lit * (u * mesh.colours[3 * a + k] + v * mesh.colours[3 * b + k] + w * mesh.colours[3 * c + k]);
          }
          pixels[4 * place + 3] = 255;
          drawn += 1;
        }
      }
    }
    canvas.getContext("2d").putImageData(picture, 0, 0);
    return drawn;
  }

  function withSurface(figure, surface) {
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = 460;
    canvas.title = "drag to turn, wheel to enlarge, click to stop or go on";
    const mesh = meshOf(surface, surface.stops), still = figure.querySelector("img");
    let turn = 0.45, tilt = -0.35, zoom = 1, turning = !window.matchMedia("(prefers-reduced-motion: reduce)").matches;
    let held = null, last = 0;
    function draw() {
      const drawn = paint(canvas, mesh, viewOf(turn, tilt), zoom);
      state.frames += 1;
      canvas.dataset.drawn = String(drawn);
    }
    function step(time) {
      if (turning && !held && !document.hidden && time - last > 40) {
        turn += 0.02;
        last = time;
        draw();
      }
      window.requestAnimationFrame(step);
    }
    canvas.addEventListener("pointerdown", function (event) {
      held = { x: event.clientX, y: event.clientY, moved: 0 };
      if (event.isTrusted) canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", function (event) {
      if (!held) return;
      const [dx, dy] = [event.clientX - held.x, event.clientY - held.y];
      turn -= 0.01 * dx;
      tilt = Math.max(-1.57, Math.min(1.57, tilt - 0.01 * dy));
      held = { x: event.clientX, y: event.clientY, moved: held.moved + Math.abs(dx) + Math.abs(dy) };
      draw();
    });
    canvas.addEventListener("pointerup", function () {
      turning = held && held.moved < 4 ? !turning : false;
      held = null;
    });
    canvas.addEventListener("wheel", function (event) {
      event.preventDefault();
      zoom = Math.max(0.5, Math.min(4, zoom * Math.exp(-0.001 * event.deltaY)));
      draw();
    }, { passive: false });
    draw();
    still.replaceWith(canvas);
    state.surfaces += 1;
    window.requestAnimationFrame(step);
  }

  for (const [key, list] of Object.entries(data.hover)) withHover(document.getElementById("figure-" + key), list);
  for (const [key, surface] of Object.entries(data.surfaces)) withSurface(document.getElementById("figure-" + key), surface);
})();
