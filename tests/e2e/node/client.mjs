// What every script here needs. Node looks for packages beside a script, and this one's are in
// .tools/node: so the package is found from there.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
import path from "node:path";

const require = createRequire(path.join(process.env.NODE_TOOLS, "package.json"));
const sdk = await import(pathToFileURL(require.resolve("openai")).href);

export const { OpenAI, toFile } = sdk;
export const attempts = [];

export function client(options = {}) {
  return new OpenAI({
    // Counts the attempts: the SDK retries below its own promises.
    fetch: (url, init) => {
      attempts.push(String(url));
      return fetch(url, init);
    },
    ...options,
  });
}

export function say(value) {
  process.stdout.write(JSON.stringify(value));
}

// An error as a user of the SDK sees it.
export function seen(error) {
  return {
    name: error.constructor.name,
    status: error.status ?? null,
    code: error.code ?? null,
    type: error.type ?? null,
    param: error.param ?? null,
    requestId: error.requestID ?? null,
    message: error.message,
    attempts: attempts.length,
  };
}
