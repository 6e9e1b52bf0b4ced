// Draws /openapi.json, without anything from elsewhere.

const make = (name, text, ...children) => {
  const element = document.createElement(name);
  if (text) element.textContent = text;
  element.append(...children.filter(Boolean));
  return element;
};

function kind(schema) {
  if (schema.anyOf) return schema.anyOf.filter((one) => one.type !== "null").map(kind).join(" or ");
  if (schema.enum) return schema.enum.join(" | ");
  if (schema.const) return String(schema.const);
  return schema.format === "binary" ? "file" : schema.type === "array" ? "list" : schema.type || "any";
}

function fields(content) {
  const kinds = Object.keys(content);
  const all = Object.assign({}, ...Object.values(content).map((one) => one.schema.properties));
  const rows = Object.entries(all).map(([name, schema]) =>
    make("tr", "", make("td", name), make("td", kind(schema)), make("td", schema.description || "")));
  const table = make("div", "", make("table", "", ...rows));
  table.className = "table";
  return [make("p", `Takes ${kinds.join(" or ")}.`), table];
}

const api = await (await fetch("/openapi.json")).json();
document.getElementById("about").textContent = api.info.description.replaceAll("`", "");
document.getElementById("example").textContent = `from openai import OpenAI

client = OpenAI(base_url="${location.origin}/v1", api_key=TOKEN)
picture = client.images.generate(prompt="a red apple").data[0].b64_json`;
const list = document.getElementById("operations");
list.style.display = "grid";
list.style.gap = "18px";
for (const [path, methods] of Object.entries(api.paths)) {
  for (const [method, operation] of Object.entries(methods)) {
    const section = make("section", "", make("h2", "", make("b", method.toUpperCase()), path));
    section.className = "card";
    section.append(make("p", (operation.description || operation.summary).replaceAll("`", "")));
    const content = operation.requestBody?.content;
    if (content) section.append(...fields(content));
    list.append(section);
  }
}
