// AzureOpenAI of OpenAI's Node SDK: the model is a deployment, named in the path.
import fs from "node:fs";
import {
  FIRST, KEY, MASK, MODEL, POOR_KEY, SECOND, UNKNOWN_KEY, load, raised, tell,
} from "./story.mjs";

const { AzureOpenAI, toFile } = await load("openai");
// The SDK takes no endpoint beside the address that the others read.
delete process.env.OPENAI_BASE_URL;
const connect = (apiKey) =>
  new AzureOpenAI({
    endpoint: process.env.GATEWAY_ORIGIN,
    apiVersion: "2025-04-01-preview",
    apiKey,
  });
const client = connect(KEY);
const LOW = { model: MODEL, size: "1024x1024", quality: "low" };
const png = (file) => toFile(fs.readFileSync(file), "picture.png", { type: "image/png" });

await tell({
  async generate() {
    const answer = await client.images.generate({ ...LOW, prompt: "generate: a lighthouse", n: 2 });
    return answer.data.map((picture) => picture.b64_json);
  },

  async edit() {
    const answer = await client.images.edit({
      ...LOW,
      image: [await png(FIRST), await png(SECOND)],
      mask: await png(MASK),
      prompt: "edit: both on one table",
    });
    return answer.data.map((picture) => picture.b64_json);
  },

  async stream() {
    const events = [];
    for await (const event of await client.images.generate({
      ...LOW, prompt: "stream: a lighthouse", stream: true, partial_images: 1,
    })) {
      events.push(event);
    }
    const types = events.map((event) => event.type.split(".")[1]).join();
    if (types !== "partial_image,completed") throw new Error(types);
    return [events.at(-1).b64_json];
  },

  async errors() {
    const ask = (key, changes) =>
      raised(
        connect(key).images.generate({ ...LOW, prompt: "errors: a lighthouse", ...changes }),
      );
    return {
      unknown_key: await ask(UNKNOWN_KEY),
      over_budget: await ask(POOR_KEY),
      bad_parameter: await ask(KEY, { n: 11 }),
    };
  },

  async retry() {
    const answer = await client.images.generate({ ...LOW, prompt: "retry: a lighthouse" });
    return answer.data.map((picture) => picture.b64_json);
  },
});
