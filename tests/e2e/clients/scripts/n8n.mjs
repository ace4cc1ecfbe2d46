// What n8n's OpenAI node sends for a picture (its node's generate and edit operations, 2026-11).
// Replayed, not run: the requests and what it reads of the answers are its, the code is not.
import fs from "node:fs";
import { FIRST, KEY, POOR_KEY, SECOND, UNKNOWN_KEY, tell } from "./story.mjs";

const BASE = process.env.OPENAI_BASE_URL;

async function ask(path, body, key = KEY) {
  const json = !(body instanceof FormData);
  const answer = await fetch(`${BASE}${path}`, {
    method: "POST",
    headers: {
      authorization: `Bearer ${key}`,
      ...(json && { "content-type": "application/json" }),
    },
    body: json ? JSON.stringify(body) : body,
  });
  if (!answer.ok) throw Object.assign(new Error(await answer.text()), { status: answer.status });
  return (await answer.json()).data;
}

const generation = (changes, key) =>
  ask("/images/generations", { model: "dall-e-3", ...changes }, key);

await tell({
  // Its default model; it asks every model but gpt-image for a format.
  async generate() {
    const data = await generation({
      prompt: "generate: a lighthouse",
      response_format: "b64_json",
      quality: "hd",
      size: "1792x1024",
      style: "natural",
    });
    return data.map((entry) => entry.b64_json);
  },

  // The form-data package: pictures first, every field after them.
  async edit() {
    const form = new FormData();
    for (const file of [FIRST, SECOND]) {
      form.append("image[]", new Blob([fs.readFileSync(file)], { type: "image/png" }), "data.png");
    }
    const fields = {
      prompt: "edit: both on one table", model: "gpt-image-1", n: "1", size: "1024x1024",
      quality: "auto",
    };
    for (const [name, value] of Object.entries(fields)) form.append(name, value);
    return (await ask("/images/edits", form)).map((entry) => entry.b64_json);
  },

  // With "Respond with Image URL(s)".
  async url() {
    const data = await generation({
      model: "dall-e-2", prompt: "url: a lighthouse", response_format: "url", n: 2, size: "256x256",
    });
    return data.map((entry) => entry.url);
  },

  async errors() {
    const status = async (changes, key) => {
      try {
        await generation({ prompt: "errors: a lighthouse", ...changes }, key);
      } catch (error) {
        return String(error.status);
      }
      return "nothing";
    };
    return {
      unknown_key: await status({}, UNKNOWN_KEY),
      over_budget: await status({}, POOR_KEY),
      bad_parameter: await status({ n: 11 }),
    };
  },
});
