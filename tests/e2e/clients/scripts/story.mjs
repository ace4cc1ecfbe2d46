// What the scripts in JavaScript share: features, told one by one as lines of JSON.
//
// A feature is a function with its name. What it returns are the pictures that its user would now
// have (bytes, base64, or the url that it was given), or what was raised. A feature that fails is
// told with its error, and the others go on.
import fs from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";
import { pathToFileURL } from "node:url";

export const MODEL = "gpt-image-2.5-flare";
export const UNKNOWN_KEY = "sk-of-nobody-0123456789abcdef";
export const KEY = process.env.OPENAI_API_KEY;
export const POOR_KEY = process.env.POOR_API_KEY; // of a team whose budget is spent
export const TEXT_MODEL = process.env.TEXT_MODEL;
export const [FIRST, SECOND, MASK] = ["first", "second", "mask"].map((name) =>
  path.join(process.env.INPUTS, `${name}.png`),
);

// Node looks for packages beside a script, and this one's are in a folder of .tools. A package that
// require does not find, being for import alone, is found by the file that import would take.
export async function load(name, file) {
  if (file !== undefined) {
    return import(pathToFileURL(path.join(process.env.PACKAGE, "node_modules", name, file)).href);
  }
  const require = createRequire(path.join(process.env.PACKAGE, "package.json"));
  return import(pathToFileURL(require.resolve(name)).href);
}

export async function tell(features) {
  for (const [name, run] of Object.entries(features)) {
    const said = { feature: name, ok: true };
    try {
      const made = await run();
      if (Array.isArray(made)) {
        said.pictures = await Promise.all(made.map((one, number) => keep(`${name}-${number}`, one)));
      } else {
        said.raised = made;
      }
    } catch (error) {
      said.ok = false;
      said.detail = `${nameOf(error)}: ${error.message}`.slice(0, 500);
      console.error(error);
    }
    console.log(JSON.stringify(said));
  }
}

// Writes a picture as its user would have it; a url is fetched as a browser would.
async function keep(name, picture) {
  let bytes = picture;
  if (typeof picture === "string" && picture.startsWith("http")) {
    const answer = await fetch(picture);
    if (!answer.ok) throw new Error(`${picture} answers ${answer.status}`);
    bytes = Buffer.from(await answer.arrayBuffer());
  } else if (typeof picture === "string") {
    bytes = Buffer.from(picture, "base64");
  }
  fs.writeFileSync(path.join(process.env.OUTPUTS, name), bytes);
  return name;
}

const nameOf = (error) =>
  error.constructor.name === "Error" || error.name?.startsWith("AI_")
    ? error.name
    : error.constructor.name;

// The class of what is raised.
export async function raised(promise) {
  try {
    await promise;
  } catch (error) {
    return nameOf(error);
  }
  return "nothing";
}
