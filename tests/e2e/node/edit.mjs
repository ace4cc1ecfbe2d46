// One edit for each way in which Node holds a file.
import fs from "node:fs";
import { client, say, seen, toFile } from "./client.mjs";

const openai = client();
const file = process.env.PICTURE;
const bytes = fs.readFileSync(file);
const ways = {
  file: () => new File([bytes], "file.png", { type: "image/png" }),
  toFile: () => toFile(fs.createReadStream(file), "to-file.png", { type: "image/png" }),
  several: () => [
    new File([bytes], "b.png", { type: "image/png" }),
    new File([bytes], "a.png", { type: "image/png" }),
  ],
  stream: () => fs.createReadStream(file),
};
const said = {};
for (const [name, image] of Object.entries(ways)) {
  try {
    const answer = await openai.images.edit({
      image: await image(),
      model: process.env.MODEL,
      quality: "low",
      prompt: name,
    });
    said[name] = { b64: answer.data[0].b64_json };
  } catch (error) {
    said[name] = seen(error);
  }
}
say(said);
