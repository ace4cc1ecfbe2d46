// OpenAI's Node SDK. It reads OPENAI_BASE_URL and OPENAI_API_KEY itself.
import fs from "node:fs";
import {
  FIRST, KEY, MASK, MODEL, POOR_KEY, SECOND, TEXT_MODEL, UNKNOWN_KEY, load, raised, tell,
} from "./story.mjs";

const { OpenAI, toFile } = await load("openai");
const client = new OpenAI();
const LOW = { model: MODEL, size: "1024x1024", quality: "low" };
const TOOL = { type: "image_generation", ...LOW };
const picturesOf = (response) =>
  response.output.filter((item) => item.type === "image_generation_call").map((item) => item.result);

await tell({
  async generate() {
    const answer = await client.images.generate({ ...LOW, prompt: "generate: a lighthouse", n: 2 });
    return answer.data.map((picture) => picture.b64_json);
  },

  // A file read as a stream is sent in chunks, as application/octet-stream.
  async edit() {
    const answer = await client.images.edit({
      ...LOW,
      image: [fs.createReadStream(FIRST), await toFile(fs.readFileSync(SECOND), "second.png")],
      mask: await toFile(fs.createReadStream(MASK), "mask.png", { type: "image/png" }),
      prompt: "edit: both on one table",
    });
    return answer.data.map((picture) => picture.b64_json);
  },

  async stream() {
    const events = [];
    for await (const event of await client.images.generate({
      ...LOW, prompt: "stream: a lighthouse", stream: true, partial_images: 2,
    })) {
      events.push(event);
    }
    const types = events.map((event) => event.type.split(".")[1]).join();
    if (types !== "partial_image,partial_image,completed") throw new Error(types);
    return [events.at(-1).b64_json];
  },

  // As programs were written for dall-e-3.
  async url() {
    const answer = await client.images.generate({
      model: "dall-e-3",
      prompt: "url: a lighthouse",
      size: "1024x1792",
      quality: "hd",
      style: "natural",
      response_format: "url",
    });
    return answer.data.map((picture) => picture.url);
  },

  // A picture is uploaded once, and named by its id; the SDK has no method for that edit.
  async files() {
    const file = await client.files.create({ file: fs.createReadStream(FIRST), purpose: "vision" });
    const answer = await client.post("/images/edits", {
      body: { ...LOW, images: [{ file_id: file.id }], prompt: "files: at night" },
    });
    const content = Buffer.from(await (await client.files.content(file.id)).arrayBuffer());
    if (!content.equals(fs.readFileSync(FIRST))) throw new Error("the file came back changed");
    if (!(await client.files.delete(file.id)).deleted) throw new Error("not deleted");
    return answer.data.map((picture) => picture.b64_json);
  },

  // A picture, then a change to it, as a stream.
  async responses() {
    const first = await client.responses.create({
      model: TEXT_MODEL, input: "responses: draw a lighthouse", tools: [TOOL],
    });
    const pictures = picturesOf(first);
    const types = [];
    for await (const event of await client.responses.create({
      model: TEXT_MODEL,
      input: "responses: now at night",
      previous_response_id: first.id,
      tools: [{ ...TOOL, partial_images: 1 }],
      stream: true,
    })) {
      types.push(event.type);
      if (event.type === "response.completed") pictures.push(...picturesOf(event.response));
    }
    if (!types.includes("response.image_generation_call.partial_image")) {
      throw new Error(types.join());
    }
    return pictures;
  },

  async errors() {
    const ask = (apiKey, changes) =>
      raised(
        new OpenAI({ apiKey }).images.generate({ ...LOW, prompt: "errors: a lighthouse", ...changes }),
      );
    return {
      unknown_key: await ask(UNKNOWN_KEY),
      over_budget: await ask(POOR_KEY),
      bad_parameter: await ask(KEY, { n: 11 }),
    };
  },

  // The first attempt is answered 429 with retry-after-ms; the SDK asks again by itself.
  async retry() {
    const answer = await client.images.generate({ ...LOW, prompt: "retry: a lighthouse" });
    return answer.data.map((picture) => picture.b64_json);
  },
});
