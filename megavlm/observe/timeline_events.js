"use strict";
// Reads the events out of the flat lanes, and says in words what stands at a point of a timeline.

const EVENT_WIDTH = 7; // numbers of one event in a lane: kind, microbatch, chunk, payload, peer, start, end
const KIND_NAMES = {
  F: "language model, forward", B: "language model, backward", E: "encoder, forward, features only",
  EF: "encoder, forward", EB: "encoder, backward", send: "sends", receive: "waits for", reduce: "gradient reduction",
};

const startOf = (lane, at) => lane[at * EVENT_WIDTH + 5];
const endOf = (lane, at) => lane[at * EVENT_WIDTH + 6];
const isWork = (kind) => !["receive", "send", "reduce"].includes(kind);

function eventAt(data, lane, at) {
  const [kind, microbatch, chunk, payload, peer, start, end] = lane.slice(at * EVENT_WIDTH, (at + 1) * EVENT_WIDTH);
  return {
    kind: data.kinds[kind], microbatch, chunk, peer, start, end,
    payload: payload < 0 ? null : data.payloads[payload],
    cause: payload < 0 ? null : data.causes[payload],
    name: microbatch + (chunk ? "." + chunk : ""),
  };
}

const messageName = (event) => event.payload.replaceAll("_", " ") + " " + event.name;

// A title and rows of (name, value). `say` writes seconds.
function describeSpot(data, spot, say) {
  const { lane, at, rank } = spot;
  if (at < 0) return describeGap(data, spot, say);
  const event = eventAt(data, lane, at);
  const isMessage = event.kind === "receive" || event.kind === "send";
  const rows = [["rank", rank]];
  if (isMessage) {
    const peer = event.peer === rank ? "the same pipeline rank" : "rank " + event.peer;
    rows.push([event.kind === "send" ? "to" : "from", peer]);
  }
  if (isWork(event.kind)) rows.push(["microbatch", event.microbatch], ["chunk", event.chunk]);
  rows.push(["start", say(event.start)], ["duration", say(event.end - event.start)]);
  if (event.kind === "receive") rows.push(["counted as", event.cause]);
  for (let before = at - 1; isWork(event.kind) && before >= 0; before -= 1) {
    const earlier = eventAt(data, lane, before);
    if (earlier.kind !== "receive") break;
    const waited = say(earlier.end - earlier.start);
    rows.push(["waited for", messageName(earlier) + " from rank " + earlier.peer + ", " + waited]);
  }
  return [KIND_NAMES[event.kind] + (isMessage ? " " + messageName(event) : ""), rows];
}

function describeGap(data, { band, rank, lane, next }, say) {
  const isLast = next >= lane.length / EVENT_WIDTH;
  const start = next ? endOf(lane, next - 1) : 0;
  const end = isLast ? data.bands[band].makespan : startOf(lane, next);
  const isDone = isLast || eventAt(data, lane, next).kind === "reduce";
  return [
    isDone ? "done with the schedule" : "between two actions",
    [["rank", rank], ["start", say(start)], ["duration", say(end - start)]],
  ];
}
