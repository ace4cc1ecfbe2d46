// Asks with little patience, RUNS times at once and in the three forms by turns, and says what
// came in the end.
import fs from "node:fs";
import { attempts, client, say, toFile } from "./client.mjs";

const openai = client({ timeout: Number(process.env.TIMEOUT_MS), maxRetries: 8 });
const bytes = fs.readFileSync(process.env.PICTURE);

async function ask(number) {
  const asked = { model: process.env.MODEL, quality: "low", size: "1024x1024" };
  if (number % 3 === 0) {
    const made = { ...asked, prompt: `${process.env.PROMPT} json ${number}` };
    const { data, response } = await openai.images.generate(made).withResponse();
    return { cache: response.headers.get("x-cache"), b64: data.data[0].b64_json };
  }
  if (number % 3 === 1) {
    const image = await toFile(bytes, "a.png", { type: "image/png" });
    const made = { ...asked, prompt: `${process.env.PROMPT} edit ${number}`, image };
    const { data, response } = await openai.images.edit(made).withResponse();
    return { cache: response.headers.get("x-cache"), b64: data.data[0].b64_json };
  }
  const made = { ...asked, prompt: `${process.env.PROMPT} stream ${number}` };
  const { data, response } = await openai.images
    .generate({ ...made, stream: true, partial_images: 1 })
    .withResponse();
  const events = [];
  for await (const event of data) events.push(event);
  return {
    cache: response.headers.get("x-cache"),
    types: events.map((event) => event.type),
    b64: events.at(-1).b64_json,
  };
}

const runs = Array.from({ length: Number(process.env.RUNS) }, (_, number) => ask(number));
say({ answers: await Promise.all(runs), attempts: attempts.length });
