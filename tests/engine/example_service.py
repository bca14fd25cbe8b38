"""A service in 20 lines: one question per TCP connection, the answer streams back. Start: FOLDER PORT."""

import asyncio
import sys

from kvkeye import AsyncEngine, EngineConfig, SamplingParams


async def main(folder, port):
    async def answer(reader, writer):
        question, shown = [{"role": "user", "content": (await reader.readline()).decode().strip()}], 0
        async for output in engine.generate(question, SamplingParams(temperature=0, max_tokens=64), timeout=60):
            text = output.outputs[0].text
            writer.write(text[shown:].encode())
            shown = len(text)
            await writer.drain()
        writer.close()

    async with AsyncEngine(EngineConfig(model=folder)) as engine:
        server = await asyncio.start_server(answer, "127.0.0.1", port)
        await server.serve_forever()


asyncio.run(main(sys.argv[1], int(sys.argv[2])))
