"""A server that streams as fast as its sockets take it, to measure clients: no model, no parsing.

    python -m tests.benchmark.fast_server PORT [SECONDS BETWEEN STEPS]

Every step writes one event to every open stream, as an engine with a full batch does.
"""

import asyncio
import json
import re
import sys
from typing import ClassVar

TOKENS = re.compile(rb'"max_tokens": ?(\d+)')
LENGTH = re.compile(rb"content-length: ?(\d+)", re.IGNORECASE)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(**content):
    event = b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(event), event)


EVENT = chunk(
    id="cmpl-" + 32 * "0",
    object="text_completion",
    created=1700000000,
    model="m",
    choices=[
        {"index": 0, "text": " word", "logprobs": None, "finish_reason": None, "token_ids": [17]}
    ],
)
DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
MODELS = json.dumps({"object": "list", "data": [{"id": "m"}]}).encode()


class Stream(asyncio.Protocol):
    open: ClassVar[set] = set()

    def connection_made(self, transport):
        self.transport, self.request = transport, b""

    def data_received(self, data):
        self.request += data
        head, end, body = self.request.partition(b"\r\n\r\n")
        if not end:
            return
        if head.startswith(b"GET"):
            status, content = (b"200 OK", MODELS) if b"models" in head else (b"404 Not Found", b"")
            self.transport.write(
                b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(content), content)
            )
            self.request = b""
        elif len(body) >= int(LENGTH.search(head)[1]):
            self.total = self.left = int(TOKENS.search(body)[1])
            self.transport.write(HEAD)
            self.open.add(self)

    def connection_lost(self, error):
        self.open.discard(self)

    def step(self):
        self.left -= 1
        if self.left:
            self.transport.write(EVENT)
            return
        usage = {"prompt_tokens": 1, "completion_tokens": self.total, "total_tokens": 1}
        self.transport.write(EVENT + chunk(choices=[], usage=usage) + DONE)
        self.transport.close()


async def main(port, seconds):
    server = await asyncio.get_running_loop().create_server(Stream, "127.0.0.1", port)
    print(server.sockets[0].getsockname()[1], flush=True)
    while True:
        for stream in list(Stream.open):
            stream.step()
        await asyncio.sleep(seconds)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), float((*sys.argv, 0)[2])))
