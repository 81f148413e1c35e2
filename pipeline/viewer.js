"use strict";  // Draws Gaussians as gslrm/model/rasterizers/projection.py does, so that images agree.
// jinja2 puts this file into page.html: no brace is followed by a brace, a percent sign or a # in it.
const VERTEX = `#version 300 es
precision highp float;
uniform highp isampler2D splats;
uniform mat3 turn;  // world to camera
uniform vec3 lens;  // distance; focal length and side of the image in pixels
layout(location = 0) in uint number;
flat out vec4 color; flat out vec3 conic; out vec2 offset;  // offset: pixels from the center
vec4 read(int k) { return vec4(texelFetch(splats, ivec2(int(number) % 512 * 4 + k, int(number) / 512), 0)); }
void main() {
  vec4 p = read(0), q = normalize(read(2));
  vec3 at = turn * (p.xyz / 5000.0) + vec3(0, 0, lens.x), scale = exp(read(1).xyz / 2000.0);
  color = vec4(read(3).rgb / 8192.0, p.w / 32767.0);
  mat3 axes = turn * mat3(
    1.0 - 2.0 * (q.z * q.z + q.w * q.w), 2.0 * (q.y * q.z + q.x * q.w), 2.0 * (q.y * q.w - q.x * q.z),
    2.0 * (q.y * q.z - q.x * q.w), 1.0 - 2.0 * (q.y * q.y + q.w * q.w), 2.0 * (q.z * q.w + q.x * q.y),
    2.0 * (q.y * q.w + q.x * q.z), 2.0 * (q.z * q.w - q.x * q.y), 1.0 - 2.0 * (q.y * q.y + q.z * q.z));
  vec2 slope = clamp(at.xy / at.z, -0.65 * lens.z / lens.y, 0.65 * lens.z / lens.y);
  vec3 S = vec3(0.3, 0, 0.3);  // the projected covariance xx, xy, yy
  for (int k = 0; k < 3; k++) {
    vec2 axis = scale[k] * lens.y / at.z * (axes[k].xy - slope * axes[k].z);
    S += axis.xxy * axis.xyy;
  }
  conic = vec3(S.z, -2.0 * S.y, S.x) / (2.0 * (S.x * S.z - S.y * S.y));
  float reach = sqrt(max(0.0, 2.0 * log(255.0 * color.a))) * 1.001 + 0.001;
  offset = (vec2(gl_VertexID & 1, gl_VertexID >> 1) * 2.0 - 1.0) * reach * sqrt(S.xz);
  vec2 pixel = lens.y * at.xy / at.z + offset;
  gl_Position = at.z < 0.01 ? vec4(2, 2, 2, 1) : vec4(2.0 * pixel.x, -2.0 * pixel.y, 0, lens.z) / lens.z;
}`;
const FRAGMENT = `#version 300 es
precision highp float;
flat in vec4 color; flat in vec3 conic; in vec2 offset; out vec4 drawn;
void main() {
  float alpha = min(0.999, color.a * exp(-dot(conic, offset.xxy * offset.xyy)));
  if (alpha < 1.0 / 255.0) discard;
  drawn = vec4(color.rgb * alpha, alpha);
}`;
const [canvas, slider, playing, turning] = ["view", "item", "play", "turn"].map(id => document.getElementById(id));
const rows = [...document.querySelectorAll("tr[data-script]")], held = new Map();
const START = {azimuth: +canvas.dataset.azimuth, elevation: +canvas.dataset.elevation, distance: 2.7};
const view = {...START};
const gl = canvas.getContext("webgl2", {alpha: false, antialias: false, preserveDrawingBuffer: true});
let values, order = new Uint32Array(0), uniforms, asked = 0, last = 0;

function prepare() {
  const program = gl.createProgram();
  for (const [kind, text] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, text);
    gl.compileShader(shader);
    gl.attachShader(program, shader);
  }
  gl.linkProgram(program);
  gl.useProgram(program);
  uniforms = ["turn", "lens"].map(name => gl.getUniformLocation(program, name));
  gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
  for (const side of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER]) gl.texParameteri(gl.TEXTURE_2D, side, gl.NEAREST);
  gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
  gl.enableVertexAttribArray(0);
  gl.vertexAttribIPointer(0, 1, gl.UNSIGNED_INT, 0, 0);
  gl.vertexAttribDivisor(0, 1);
  gl.enable(gl.BLEND);
  gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
  gl.clearColor(1, 1, 1, 1);
}

// Called by the data, in the page or in a splats.js: 16 numbers of 16 bits per Gaussian, as pipeline/page.py has them.
function show(text) {
  if (!gl || (slider && document.currentScript.dataset.item !== slider.value)) return;  // the slider has moved on
  const raw = atob(text), height = Math.ceil(raw.length / 16384) || 1, bytes = new Uint8Array(height * 16384);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  [values, order] = [new Int16Array(bytes.buffer), new Uint32Array(raw.length / 32)];
  gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA16I, 2048, height, 0, gl.RGBA_INTEGER, gl.SHORT, values);
  ask();
}

function sort([x, y, z]) {  // farthest first, by counting
  const farthest = 56760, starts = new Uint32Array(2 * farthest + 2), bins = new Uint32Array(order.length);
  for (let i = 0; i < bins.length; i++) {
    bins[i] = farthest - Math.round(x * values[16 * i] + y * values[16 * i + 1] + z * values[16 * i + 2]);
    starts[bins[i] + 1]++;
  }
  for (let i = 1; i < starts.length; i++) starts[i] += starts[i - 1];
  for (let i = 0; i < bins.length; i++) order[starts[bins[i]]++] = i;
}

function draw(now) {
  asked = 0;
  if (turning.checked) move(0.03 * Math.min(100, now - last), 0);
  last = now;
  const size = Math.round(canvas.clientWidth * devicePixelRatio), radians = Math.PI / 180;
  if (canvas.width !== size || canvas.height !== size) canvas.width = canvas.height = size;
  const [sa, ca, se, ce] = [view.azimuth, view.elevation].flatMap(a => [Math.sin(a * radians), Math.cos(a * radians)]);
  const forward = [sa * ce, ca * ce, -se];
  sort(forward);
  gl.viewport(0, 0, size, size);
  gl.clear(gl.COLOR_BUFFER_BIT);
  gl.bufferData(gl.ARRAY_BUFFER, order, gl.DYNAMIC_DRAW);
  gl.uniformMatrix3fv(uniforms[0], true, [ca, -sa, 0, -sa * se, -ca * se, -ce, ...forward]);
  gl.uniform3f(uniforms[1], view.distance, 0.5 * size / Math.tan(25 * radians), size);
  gl.drawArraysInstanced(gl.TRIANGLE_STRIP, 0, 4, order.length);
}

const ask = () => asked ||= gl && requestAnimationFrame(draw);

function move(azimuth, elevation, zoom = 1) {
  view.azimuth = (view.azimuth + azimuth + 360) % 360;
  view.elevation = Math.max(-89, Math.min(89, view.elevation + elevation));
  view.distance = Math.max(0.5, Math.min(20, view.distance * zoom));
  ask();
}

function tell() {  // in the address, to link to the view: #azimuth=20; no hashchange, which would undo a later move
  const told = Object.entries(slider ? {item: +slider.value, ...view} : view);
  history.replaceState(null, "", "#" + told.map(([name, value]) => `${name}=${+value.toFixed(2)}`).join("&"));
}

function read() {
  const told = new URLSearchParams(location.hash.slice(1));
  for (const name in START) if (told.has(name) && isFinite(told.get(name))) view[name] = +told.get(name);
  if (slider && told.has("item") && told.get("item") !== slider.value) pick(told.get("item"));
  move(0, 0);
}

function pick(number) {
  slider.value = number;
  const script = document.createElement("script"), row = rows[slider.value];
  [script.src, script.dataset.item] = [row.dataset.script, slider.value];
  script.onload = () => {
    script.remove();
    if (playing.checked) setTimeout(() => playing.checked && pick((+slider.value + 1) % rows.length), 60);
  };
  document.body.append(script);
  document.getElementById("shown").textContent = row.dataset.name;
  rows.forEach(other => other.classList.toggle("shown", other === row));
}

canvas.onpointerdown = event => canvas.setPointerCapture(event.pointerId) || held.set(event.pointerId, event);
canvas.onpointermove = event => {
  const before = held.get(event.pointerId), other = [...held.values()].find(one => one.pointerId !== event.pointerId);
  const apart = one => Math.hypot(one.clientX - other.clientX, one.clientY - other.clientY) || 1;
  if (!before) return;
  if (other) move(0, 0, apart(before) / apart(event));
  else move(0.4 * (event.clientX - before.clientX), 0.4 * (event.clientY - before.clientY));
  held.set(event.pointerId, event);
};
canvas.onpointerup = canvas.onpointercancel = event => held.delete(event.pointerId) && tell();
canvas.onwheel = event => event.preventDefault() || move(0, 0, Math.exp(0.001 * event.deltaY));
canvas.ondblclick = () => [Object.assign(view, START), ask(), tell()];
canvas.onkeydown = event => {
  const turns = {ArrowLeft: [5, 0], ArrowRight: [-5, 0], ArrowUp: [0, 5], ArrowDown: [0, -5]};
  const step = {...turns, "+": [0, 0, 0.9], "-": [0, 0, 1.1]}[event.key];
  if (step) event.preventDefault() || move(...step);
};
canvas.onkeyup = tell;  // once, however long it was held
[turning.onchange, window.onresize, window.onhashchange] = [ask, ask, read];
if (gl) prepare();
else canvas.replaceWith("This browser has no WebGL 2: open gaussians.ply in a splat viewer.");
if (slider) (slider.oninput = playing.onchange = () => pick(slider.value))();
read();
