// TanStack AI. Its adapter is OpenAI's SDK inside, which reads OPENAI_BASE_URL.
import fs from "node:fs";
import {
  FIRST, KEY, MASK, MODEL, POOR_KEY, SECOND, UNKNOWN_KEY, load, raised, tell,
} from "./story.mjs";

const { generateImage } = await load("@tanstack/ai", "dist/esm/index.js");
const { createOpenaiImage, openaiImage } = await load("@tanstack/ai-openai", "dist/esm/index.js");
const LOW = { modelOptions: { quality: "low" } };
const picturesOf = ({ images }) => images.map((image) => image.b64Json ?? image.url);
const part = (file, metadata) => ({
  type: "image",
  source: { type: "data", value: fs.readFileSync(file).toString("base64"), mimeType: "image/png" },
  metadata,
});

await tell({
  async generate() {
    return picturesOf(
      await generateImage({
        adapter: openaiImage(MODEL), prompt: "generate: a lighthouse", numberOfImages: 2, ...LOW,
      }),
    );
  },

  async edit() {
    return picturesOf(
      await generateImage({
        adapter: openaiImage(MODEL),
        prompt: [
          { type: "text", content: "edit: both on one table" },
          part(FIRST),
          part(SECOND),
          part(MASK, { role: "mask" }),
        ],
        ...LOW,
      }),
    );
  },

  // As programs were written for dall-e-3.
  async url() {
    return picturesOf(
      await generateImage({
        adapter: openaiImage("dall-e-3"),
        prompt: "url: a lighthouse",
        size: "1792x1024",
        modelOptions: { quality: "hd", style: "natural", response_format: "url" },
      }),
    );
  },

  async errors() {
    const ask = (key, changes) =>
      raised(
        generateImage({
          adapter: createOpenaiImage(MODEL, key), prompt: "errors: a lighthouse", ...LOW, ...changes,
        }),
      );
    return {
      unknown_key: await ask(UNKNOWN_KEY),
      over_budget: await ask(POOR_KEY),
      bad_parameter: await ask(KEY, { modelOptions: { quality: "best" } }),
    };
  },

  async retry() {
    return picturesOf(
      await generateImage({ adapter: openaiImage(MODEL), prompt: "retry: a lighthouse", ...LOW }),
    );
  },
});
