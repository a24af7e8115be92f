// The agent of agent.py for node: the same environment variables and the same requests.

const { createHash, randomBytes } = require("node:crypto");
const http = require("node:http");

const MIB = 1 << 20;
const ballast = Array.from({ length: Number(process.env.BALLAST_MIB || 0) }, () => randomBytes(MIB));
const conversation = [];

const turns = () => conversation.length / 2;

function chat(text) {
  const number = turns() + 1;
  const before = conversation.length ? conversation.at(-2) : null;
  const reply = `${number}: you said ${JSON.stringify(text)}, and before that ${JSON.stringify(before)}`;
  conversation.push(text, reply);
  console.log(`turn ${number}`);
  return { turn: number, history: conversation.length, reply };
}

function digest() {
  const state = createHash("sha256");
  ballast.forEach((block) => state.update(block));
  conversation.forEach((entry) => state.update(entry + "\0"));
  return state.digest("hex");
}

function answer(method, path, body) {
  switch (`${method} ${path}`) {
    case "GET /health":
      return [200, "ok"];
    case "GET /turn":
      return [200, JSON.stringify({ turn: turns() })];
    case "GET /digest":
      return [200, digest()];
    case "POST /chat":
      return [200, JSON.stringify(chat(body))];
    case "POST /exit":
      return process.exit(Number(body || 0));
    default:
      return [404, "no such thing"];
  }
}

const server = http.createServer((request, response) => {
  const pieces = [];
  request.on("data", (piece) => pieces.push(piece));
  request.on("end", () => {
    const [status, text] = answer(request.method, request.url, Buffer.concat(pieces).toString());
    response.writeHead(status, { "Content-Length": Buffer.byteLength(text) });
    response.end(text);
  });
});

if (process.env.TERM_STATUS !== undefined) {
  process.on("SIGTERM", () => process.exit(Number(process.env.TERM_STATUS)));
}
const port = Number(process.env.PORT || 8080);
server.listen(port, process.env.BIND || "0.0.0.0", () => console.log(`listening on ${port}`));
