"""A model inside a Python service: requests of several threads are answered in batches.

    python examples/python_service.py MODEL

`quatom.LLM` belongs to one thread. This service gives it a thread of its own and a queue: prompts
that wait at the same time run in one batch. For an HTTP API use `quatom serve`.
"""

import argparse
import queue
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import quatom


class Completer:
    """Completes prompts of any thread; use it as a context manager."""

    def __init__(self, model: str, *, max_batch: int = 32) -> None:
        """Load the model.

        Args:
            model: what `quatom.LLM` takes.
            max_batch: prompts that run together.
        """
        self._llm = quatom.LLM(model, max_num_seqs=max_batch)
        self._max_batch = max_batch
        self._waiting: queue.Queue[tuple[str, Future[str]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="quatom")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._waiting.put(None)
        self._thread.join()

    def complete(self, prompt: str) -> str:
        """The text after a prompt; waits until it is there.

        Raises:
            QuatomError: the prompt is refused.
        """
        answer: Future[str] = Future()
        self._waiting.put((prompt, answer))
        return answer.result()

    def _run(self) -> None:
        params = quatom.SamplingParams(max_tokens=32, temperature=0.0)
        while (first := self._waiting.get()) is not None:
            batch = [first]
            while len(batch) < self._max_batch:
                try:
                    item = self._waiting.get_nowait()
                except queue.Empty:
                    break
                if item is None:  # answer this batch, then end
                    self._waiting.put(None)
                    break
                batch.append(item)
            self._answer(batch, params)

    def _answer(
        self, batch: "list[tuple[str, Future[str]]]", params: quatom.SamplingParams
    ) -> None:
        try:
            results = self._llm.generate([prompt for prompt, _ in batch], params)
        except Exception as error:  # whoever asked is told
            for _, answer in batch:
                answer.set_exception(error)
            return
        for (_, answer), result in zip(batch, results, strict=True):
            answer.set_result(result.text)


def main() -> None:
    """Answer prompts from eight threads."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    args = parser.parse_args()
    prompts = [f"{n} times {n} is" for n in range(2, 18)]
    with Completer(args.model) as completer, ThreadPoolExecutor(8) as users:
        for prompt, text in zip(prompts, users.map(completer.complete, prompts), strict=True):
            print(f"{prompt!r} -> {text!r}")


if __name__ == "__main__":
    main()
