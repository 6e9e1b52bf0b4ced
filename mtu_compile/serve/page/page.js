// The page of `mtu-compile serve`: every task of the bundle, by POST /v1/tasks/{task} and its events.

const $ = (id) => document.getElementById(id);
const WORDS = {t2i: "Create", edit: "Edit", sr: "Enlarge", inpaint: "Repaint"};
const LARGEST = 2048; // pixels of a side that are sent: the engine takes far fewer
const KEPT = 60; // pictures of the history, in memory alone

let token = "";
let about = null; // GET /v1/tasks
let task = null;
let source = null; // {blob, width, height, url}
let job = null; // {id, abort}
let shown = null; // of the history
const history = [];
const empty = $("empty");

// ---- the token: from #token=, which does not stay in the address, or typed

function storedToken() {
  const found = new URLSearchParams(location.hash.slice(1)).get("token");
  if (found) {
    sessionStorage.setItem("token", found);
    window.history.replaceState(null, "", location.pathname);
  }
  return found || sessionStorage.getItem("token") || "";
}

async function ask(path, options = {}) {
  const headers = {...options.headers, Authorization: `Bearer ${token}`};
  const response = await fetch(path, {...options, headers, cache: "no-store"});
  if (!response.ok) throw await problem(response);
  return response;
}

async function problem(response) {
  let message = `${response.status} ${response.statusText}`;
  try { message = (await response.json()).error.message || message; } catch { /* not JSON */ }
  const error = new Error(message);
  error.status = response.status;
  error.wait = response.headers.get("Retry-After");
  return error;
}

async function enter(candidate) {
  token = candidate;
  about = await (await ask("/v1/tasks")).json();
  sessionStorage.setItem("token", token);
  $("login").hidden = true;
  $("work").hidden = $("leave").hidden = false;
  $("model").textContent = about.model;
  $("facts").textContent = [about.size.replace("x", " × "), about.precision, about.target].join(" · ");
  document.title = `${about.model} · mtu-compile`;
  $("scheduler").append(...about.schedulers.map((name) => new Option(name, name)));
  $("count").max = about.limits.n;
  $("steps").max = about.limits.num_inference_steps;
  $("prompt").maxLength = $("negative").maxLength = about.limits.prompt_characters;
  $("tasks").replaceChildren(...about.tasks.map(tab));
  choose(about.tasks[0]);
}

function showLogin(message) {
  token = "";
  sessionStorage.removeItem("token");
  $("login").hidden = false;
  $("work").hidden = $("leave").hidden = true;
  say("login-error", message);
  $("token").focus();
}

function say(id, message) {
  $(id).textContent = message || "";
  $(id).hidden = !message;
}

// ---- tasks

function tab(one) {
  const button = document.createElement("button");
  button.type = "button";
  button.role = "tab";
  button.dataset.task = one.name;
  button.textContent = WORDS[one.name] || one.name;
  button.addEventListener("click", () => choose(one));
  return button;
}

function choose(one) {
  task = one;
  for (const button of $("tasks").children) button.ariaSelected = String(button.dataset.task === one.name);
  const free = one.guidance === "none";
  $("source").hidden = !one.needs.image;
  $("prompt-part").hidden = !one.needs.prompt;
  $("prompt-label").textContent = one.needs.image && !one.needs.mask ? "What to change" : "Prompt";
  $("prompt").placeholder = one.needs.mask ? "what belongs in the painted area"
    : one.needs.image ? "make it blue" : "a red apple";
  $("negative-part").hidden = free || one.guidance === "embedded";
  $("guidance-part").hidden = free;
  $("image-guidance-part").hidden = one.guidance !== "text+image";
  $("fit-part").hidden = !one.needs.image;
  $("steps").placeholder = Math.min(one.num_inference_steps, about.limits.num_inference_steps);
  $("guidance").placeholder = one.guidance_scale;
  $("image-guidance").placeholder = one.image_guidance_scale;
  say("error", "");
  layOut();
}

// ---- the source picture

async function take(file) {
  say("error", "");
  try {
    const bitmap = await createImageBitmap(file);
    const most = Math.min(LARGEST, Math.floor(Math.sqrt(about.limits.picture_pixels)));
    const scale = Math.min(1, most / Math.max(bitmap.width, bitmap.height));
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(bitmap.width * scale));
    canvas.height = Math.max(1, Math.round(bitmap.height * scale));
    canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    const blob = await new Promise((done) => canvas.toBlob(done, "image/png"));
    if (source) URL.revokeObjectURL(source.url);
    source = {blob, width: canvas.width, height: canvas.height, url: URL.createObjectURL(blob)};
    $("source-picture").src = source.url;
    await $("source-picture").decode();
    mask.reset();
  } catch {
    source = null;
    say("error", "that is no picture this browser can read");
  }
  layOut();
}

function layOut() {
  const there = source !== null;
  const painting = there && task.needs.mask;
  $("invite").hidden = there;
  $("source-picture").hidden = !there;
  $("easel").classList.toggle("filled", there);
  $("drop-source").hidden = !there;
  $("take").hidden = !shown;
  $("brush").hidden = $("mask").hidden = !painting;
  if (painting) requestAnimationFrame(mask.place);
}

// ---- the mask: strokes in the picture's own coordinates, drawn with mouse, pen or finger

const mask = {
  strokes: [],
  erasing: false,
  reset() { mask.strokes = []; },
  /** Lay the canvas over the picture as it is shown. */
  place() {
    const picture = $("source-picture"), canvas = $("mask"), box = picture.getBoundingClientRect();
    if (!source || !box.width) return;
    const scale = Math.min(box.width / source.width, box.height / source.height);
    const width = source.width * scale, height = source.height * scale;
    Object.assign(canvas.style, {
      width: `${width}px`, height: `${height}px`,
      left: `${picture.offsetLeft + (box.width - width) / 2}px`,
      top: `${picture.offsetTop + (box.height - height) / 2}px`,
    });
    canvas.width = source.width;
    canvas.height = source.height;
    mask.draw(canvas.getContext("2d"), getComputedStyle(document.body).getPropertyValue("--accent"));
  },
  draw(context, colour) {
    context.lineCap = context.lineJoin = "round";
    for (const stroke of mask.strokes) {
      context.globalCompositeOperation = stroke.erase ? "destination-out" : "source-over";
      context.strokeStyle = context.fillStyle = colour;
      context.lineWidth = stroke.width;
      context.beginPath();
      if (stroke.points.length === 1) {
        context.arc(...stroke.points[0], stroke.width / 2, 0, 7);
        context.fill();
        continue;
      }
      stroke.points.forEach((point, index) => (index ? context.lineTo(...point) : context.moveTo(...point)));
      context.stroke();
    }
    context.globalCompositeOperation = "source-over";
  },
  point(event) {
    const box = $("mask").getBoundingClientRect();
    return [
      (event.clientX - box.left) * source.width / box.width,
      (event.clientY - box.top) * source.height / box.height,
    ];
  },
  /** White where to repaint. */
  async blob() {
    const painted = document.createElement("canvas"), whole = document.createElement("canvas");
    painted.width = whole.width = source.width;
    painted.height = whole.height = source.height;
    mask.draw(painted.getContext("2d"), "#fff");
    const context = whole.getContext("2d");
    context.fillRect(0, 0, whole.width, whole.height);
    context.drawImage(painted, 0, 0);
    return new Promise((done) => whole.toBlob(done, "image/png"));
  },
};

$("mask").addEventListener("pointerdown", (event) => {
  if (!event.isPrimary || event.button) return;
  event.preventDefault();
  $("mask").setPointerCapture(event.pointerId);
  const width = Number($("brush-size").value) / 100 * Math.max(source.width, source.height);
  mask.strokes.push({erase: mask.erasing, width, points: [mask.point(event)]});
  mask.place();
});
$("mask").addEventListener("pointermove", (event) => {
  if (!$("mask").hasPointerCapture(event.pointerId)) return;
  const last = mask.strokes.at(-1);
  for (const one of event.getCoalescedEvents?.() || [event]) last.points.push(mask.point(one));
  mask.place();
});
new ResizeObserver(() => task?.needs.mask && mask.place()).observe($("easel"));

function brush(erasing) {
  mask.erasing = erasing;
  for (const [id, on] of [["paint", !erasing], ["erase", erasing]]) {
    $(id).classList.toggle("on", on);
    $(id).ariaPressed = String(on);
  }
}
$("paint").addEventListener("click", () => brush(false));
$("erase").addEventListener("click", () => brush(true));
$("undo").addEventListener("click", () => { mask.strokes.pop(); mask.place(); });
$("clear").addEventListener("click", () => { mask.reset(); mask.place(); });

// ---- making pictures

const FIELDS = {
  negative_prompt: "negative", num_inference_steps: "steps", rng_seed: "seed", guidance_scale: "guidance",
  image_guidance_scale: "image-guidance", n: "count", scheduler: "scheduler", fit: "fit",
};

async function body() {
  const form = new FormData();
  if (task.needs.prompt) form.set("prompt", $("prompt").value);
  for (const [name, id] of Object.entries(FIELDS)) {
    const hidden = $(id).parentElement.hidden;
    if (!hidden && $(id).value !== "") form.set(name, $(id).value);
  }
  if (task.needs.image) form.set("image", source.blob, "image.png");
  if (task.needs.mask) {
    form.set("mask", await mask.blob(), "mask.png");
    form.set("mask_mode", "white");
  }
  form.set("stream", "true");
  form.set("partial_images", "3");
  return form;
}

function missing() {
  if (task.needs.image && !source) return "choose a picture first";
  if (task.needs.mask && !mask.strokes.some((one) => !one.erase)) return "paint over what is to be repainted first";
  if (task.needs.prompt && !$("prompt").value.trim()) return "write a prompt first";
  return "";
}

async function make() {
  say("error", missing());
  if (missing() || job) return;
  const asked = {task: task.name, settings: Object.fromEntries(Object.values(FIELDS).map((id) => [id, $(id).value]))};
  asked.prompt = task.needs.prompt ? $("prompt").value : "";
  job = {id: null, abort: new AbortController()};
  busy(true, "sending");
  const results = [], sketches = [];
  try {
    const options = {method: "POST", body: await body(), signal: job.abort.signal};
    const response = await ask(`/v1/tasks/${encodeURIComponent(task.name)}`, options);
    for await (const event of events(response.body)) {
      if (event.type === "task.queued") {
        job.id = event.id;
        busy(true, event.position ? `waiting, ${event.position} before this` : "waiting");
      } else if (event.type === "task.started") busy(true, "preparing");
      else if (event.type === "task.progress") step(event.done, event.total);
      else if (event.type === "task.partial_image") {
        sketches[event.image_index] = url(event);
        show(sketches.filter(Boolean), "");
      } else if (event.type === "task.completed") results.push({...asked, ...event, url: url(event)});
      else if (event.type === "error") throw new Error(event.error.message);
    }
    if (!results.length) throw new Error("the connection ended early");
    results.forEach(remember);
    present(results.at(-1), results);
  } catch (error) {
    if (error.name === "AbortError") busy(false);
    else if (error.status === 401) showLogin(error.message);
    else say("error", error.wait ? `${error.message} (in ${error.wait} s or so)` : error.message);
    if (shown) present(shown); else show([], "");
  } finally {
    job = null;
    busy(false);
  }
}

/** The JSON of each server-sent event. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data) yield JSON.parse(data);
    }
  }
}

async function cancel() {
  if (!job) return;
  const {id, abort} = job;
  if (id) await ask(`/v1/jobs/${id}`, {method: "DELETE"}).catch(() => {});
  abort.abort();
}

function busy(on, text = "") {
  $("run").disabled = on;
  $("cancel").hidden = $("progress").hidden = !on;
  $("bar").classList.toggle("waiting", on);
  $("bar").style.width = "";
  $("state").textContent = text;
}

function step(done, total) {
  $("bar").classList.remove("waiting");
  $("bar").style.width = `${100 * done / total}%`;
  $("state").textContent = done < total ? `step ${done} of ${total}` : "decoding";
}

const url = (event) => `data:image/${event.output_format};base64,${event.b64_json}`;

// ---- results and history

function show(urls, label) {
  const pictures = urls.map((one) => Object.assign(new Image(), {src: one, alt: label || "The picture so far"}));
  $("canvas").classList.toggle("alone", urls.length < 2);
  $("canvas").style.setProperty("--columns", Math.ceil(Math.sqrt(urls.length || 1)));
  $("canvas").replaceChildren(...(pictures.length ? pictures : [empty]));
}


function present(one, all = [one]) {
  shown = one;
  show(all.map((each) => each.url), one.prompt || WORDS[one.task] || one.task);
  const words = [WORDS[one.task] || one.task, `seed ${one.seed}`].join(" · ");
  $("caption-text").textContent = one.prompt ? `${one.prompt} · ${words}` : words;
  $("notices").textContent = (one.notices || []).map((notice) => notice.message).join("; ");
  $("caption").hidden = false;
  $("download").href = one.url;
  $("download").download = `${one.task}-${one.seed}.${one.output_format}`;
  for (const button of $("history").children) button.ariaCurrent = String(button.picture === one);
  layOut();
}

function remember(one) {
  history.unshift(one);
  const button = document.createElement("button");
  button.type = "button";
  button.picture = one;
  button.title = one.prompt || one.task;
  button.append(Object.assign(new Image(), {src: one.url, alt: one.prompt || one.task}));
  button.addEventListener("click", () => present(one));
  $("history").prepend(button);
  while (history.length > KEPT) { history.pop(); $("history").lastChild.remove(); }
  $("history-part").hidden = false;
}

$("again").addEventListener("click", () => {
  choose(about.tasks.find((one) => one.name === shown.task));
  if (shown.prompt) $("prompt").value = shown.prompt;
  for (const [id, value] of Object.entries(shown.settings)) $(id).value = value;
  $("seed").value = shown.seed;
  $("count").value = 1;
  $("more").open = true;
});
$("take").addEventListener("click", async () => take(await (await fetchPicture(shown.url)).blob()));
// fetch() of a data: URL would need a wider connect-src
const fetchPicture = async (address) => {
  const [head, data] = address.split(",");
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  return new Response(new Blob([bytes], {type: head.slice(5).split(";")[0]}));
};

// ---- what the user does

$("form").addEventListener("submit", (event) => { event.preventDefault(); make(); });
$("cancel").addEventListener("click", cancel);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) make();
});
$("file").addEventListener("change", () => { if ($("file").files[0]) take($("file").files[0]); $("file").value = ""; });
$("drop-source").addEventListener("click", () => { source = null; mask.reset(); layOut(); });
for (const kind of ["dragover", "dragleave", "drop"]) {
  $("easel").addEventListener(kind, (event) => {
    event.preventDefault();
    $("easel").classList.toggle("over", kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files[0]) take(event.dataTransfer.files[0]);
  });
}
document.addEventListener("paste", (event) => {
  const file = [...(event.clipboardData?.files || [])].find((one) => one.type.startsWith("image/"));
  if (file && task?.needs.image) take(file);
});
$("login-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  try { await enter($("token").value.trim()); $("token").value = ""; } catch (error) { showLogin(error.message); }
});
$("leave").addEventListener("click", () => { showLogin(""); window.location.reload(); });

window.addEventListener("hashchange", () => window.location.reload()); // a token, pasted into an open page

const first = storedToken();
if (first) enter(first).catch((error) => showLogin(error.message));
else showLogin("");
