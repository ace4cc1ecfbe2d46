// LangChain in JavaScript: DallEAPIWrapper as it comes (dall-e-3, style, quality, url), and
// ChatOpenAI with the image tool.
import {
  KEY, MODEL, POOR_KEY, TEXT_MODEL, UNKNOWN_KEY, load, raised, tell,
} from "./story.mjs";

const { ChatOpenAI, DallEAPIWrapper, tools } = await load("@langchain/openai");

await tell({
  async generate() {
    const tool = new DallEAPIWrapper({ apiKey: KEY, dallEResponseFormat: "b64_json" });
    return [await tool.invoke("generate: a lighthouse")];
  },

  // n=2 are two calls of n=1, alike and at once.
  async url() {
    const tool = new DallEAPIWrapper({ apiKey: KEY, n: 2, size: "1792x1024" });
    return (await tool.invoke("url: a lighthouse")).map((item) => item.image_url);
  },

  async responses() {
    const model = new ChatOpenAI({ model: TEXT_MODEL, useResponsesApi: true }).bindTools([
      tools.imageGeneration({ model: MODEL, quality: "low" }),
    ]);
    const answer = await model.invoke("responses: draw a lighthouse");
    return answer.additional_kwargs.tool_outputs
      .filter((output) => output.type === "image_generation_call")
      .map((output) => output.result);
  },

  async errors() {
    const ask = (apiKey, changes) =>
      raised(new DallEAPIWrapper({ apiKey, ...changes }).invoke("errors: a lighthouse"));
    return {
      unknown_key: await ask(UNKNOWN_KEY),
      over_budget: await ask(POOR_KEY),
      bad_parameter: await ask(KEY, { quality: "best" }),
    };
  },

  async retry() {
    return [await new DallEAPIWrapper({ apiKey: KEY }).invoke("retry: a lighthouse")];
  },
});
