// Vercel's AI SDK. It reads OPENAI_BASE_URL and OPENAI_API_KEY itself.
import fs from "node:fs";
import {
  FIRST, KEY, MASK, MODEL, POOR_KEY, SECOND, TEXT_MODEL, UNKNOWN_KEY, load, raised, tell,
} from "./story.mjs";

const { generateImage, generateText } = await load("ai");
const { createOpenAI, openai } = await load("@ai-sdk/openai");
const LOW = { size: "1024x1024", providerOptions: { openai: { quality: "low" } } };
const bytesOf = ({ images }) => images.map((image) => image.uint8Array);

await tell({
  // An alias: of a name that it does not know, it asks for one picture a call, twice at once.
  async generate() {
    return bytesOf(
      await generateImage({
        model: openai.image("team-art"), prompt: "generate: a lighthouse", n: 2, ...LOW,
      }),
    );
  },

  async edit() {
    return bytesOf(
      await generateImage({
        model: openai.image(MODEL),
        prompt: {
          text: "edit: both on one table",
          images: [fs.readFileSync(FIRST), fs.readFileSync(SECOND)],
          mask: fs.readFileSync(MASK),
        },
        ...LOW,
      }),
    );
  },

  async responses() {
    const { staticToolResults } = await generateText({
      model: openai(TEXT_MODEL),
      prompt: "responses: draw a lighthouse",
      tools: { image_generation: openai.tools.imageGeneration({ model: MODEL, quality: "low" }) },
    });
    return staticToolResults
      .filter((result) => result.toolName === "image_generation")
      .map((result) => result.output.result);
  },

  async errors() {
    const ask = (apiKey, changes) =>
      raised(
        generateImage({
          model: createOpenAI({ apiKey }).image(MODEL),
          prompt: "errors: a lighthouse",
          ...LOW,
          ...changes,
        }),
      );
    return {
      unknown_key: await ask(UNKNOWN_KEY),
      over_budget: await ask(POOR_KEY),
      bad_parameter: await ask(KEY, { n: 11, maxImagesPerCall: 11 }),
    };
  },

  async retry() {
    return bytesOf(
      await generateImage({ model: openai.image(MODEL), prompt: "retry: a lighthouse", ...LOW }),
    );
  },
});
