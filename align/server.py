"""Completions from an OpenAI-compatible server that takes prompts as ids and returns ids.

`POST /v1/completions` with `return_token_ids`: vLLM's server has it since 0.10.2. A server that leaves the field out is refused;
its text is not tokenized.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

from .engines import EngineConfig, describe_model, read_completion, sampling_options
from .errors import ConfigError, EngineError
from .hub import source_of
from .sample import Draws, Engine, SampleConfig, derived_seed

if TYPE_CHECKING:
    import httpx2
    from transformers import PreTrainedTokenizerBase

#: Environment variable of the key that the server asks for, if it does.
KEY_VARIABLE = "ALIGN_SERVER_KEY"

#: Answers after which the same request may succeed: the server is starting, busy, or behind a proxy that is.
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)

#: Seconds before each further try of a request.
WAITS = (1, 2, 4, 8, 16, 32)


class ServerEngine(Engine):
    """A server that runs elsewhere.

    Args:
        config: its address and options.
        model: `path`, `revision` and `trust_remote_code` of the model that it serves, for its vocabulary and end tokens.

    Raises:
        EngineError: the server cannot be reached, refuses, or does not serve the model.
    """

    def __init__(self, config: EngineConfig, model: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
        import httpx2

        self.tokenizer, self.settings = tokenizer, config.settings()
        self.vocab_size, self.end_ids = describe_model(model["path"], tokenizer, **source_of(model))
        self.url, self.timeout = _base_url(config.server_url), config.timeout or 600.0
        self.name, self.concurrency = config.served_model_name or model["path"], config.concurrency or 64
        key = _key()
        self._client = httpx2.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(self.timeout, connect=min(10.0, self.timeout), pool=None),
            limits=httpx2.Limits(max_connections=self.concurrency),
        )
        self._others: list[Any] = []
        try:
            self.max_length = self._served()
        except EngineError:
            self.close()
            raise

    def _served(self) -> int | None:
        """The model's context as the server says it, where it does."""
        body = self._json(self._send("GET", "models"))
        models = body.get("data") if isinstance(body, dict) else None
        if not isinstance(models, list) or not all(isinstance(model, dict) for model in models):
            raise EngineError(
                f"{self.url}/models does not list models ({str(body)[:200]}); is this an OpenAI-compatible server?"
            )
        found = next((model for model in models if model.get("id") == self.name), None)
        if found is None:
            names = ", ".join(repr(model.get("id")) for model in models)
            raise EngineError(
                f"{self.url} does not serve {self.name!r} but {names or 'nothing'}; if one of these is that model, name it by "
                "--served-model-name"
            )
        # An adapter's card names its base, whose context is its own; a base may have several names, and answers by the first.
        base = next((model for model in models if model.get("id") == found.get("parent")), found)
        root = found.get("root")
        others = [model for model in models if root is None or model.get("root") != root]
        self._others = [model["id"] for model in others if model.get("id") not in (None, self.name)]
        longest = found.get("max_model_len") or base.get("max_model_len")
        return longest if isinstance(longest, int) else None

    def generate(self, prompts: Sequence[Sequence[int]], config: SampleConfig, seed: int) -> list[Draws]:
        """See `Engine`. A request per prompt, each with a seed of its own, several at a time."""
        stopped = threading.Event()

        def draw(place: int) -> Draws:
            # Draw k of a request adds k to its seed.
            return self._draw(prompts[place], config, derived_seed(seed, place * config.n), stopped)

        with ThreadPoolExecutor(min(self.concurrency, len(prompts))) as pool:
            futures = [pool.submit(draw, place) for place in range(len(prompts))]
            try:
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()  # raises what went wrong, though others are not done
                return [future.result() for future in futures]
            except BaseException:
                stopped.set()  # what waits for another try gives up
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _draw(self, prompt: Sequence[int], config: SampleConfig, seed: int, stopped: threading.Event) -> Draws:
        asked = {
            "model": self.name,
            "prompt": list(prompt),
            "seed": seed,
            "return_token_ids": True,
            **sampling_options(config, self.end_ids),
        }
        body = self._json(self._send("POST", "completions", asked, stopped))
        choices = body.get("choices") if isinstance(body, dict) else None
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise EngineError(f"{self.url}/completions: no choices in the answer: {str(body)[:200]}")
        if (answered := body.get("model")) in self._others:
            raise EngineError(
                f"{self.url} answers by {answered!r} where {self.name!r} is asked: it does not tell its models apart; ask one that "
                "serves this model alone"
            )
        if sorted(str(choice.get("index")) for choice in choices) != sorted(map(str, range(config.n))):
            raise EngineError(f"{self.url}/completions: {len(choices)} choices where {config.n} were asked")
        return [
            self._read(prompt, choice, body, config) for choice in sorted(choices, key=lambda choice: choice["index"])
        ]

    def _read(
        self, prompt: Sequence[int], choice: Mapping[str, Any], body: Mapping[str, Any], config: SampleConfig
    ) -> tuple[list[int], str]:
        ids, usage = choice.get("token_ids"), body.get("usage")
        given = next((of["prompt_token_ids"] for of in (choice, body) if of.get("prompt_token_ids") is not None), None)
        if not isinstance(ids, list):
            raise EngineError(
                f"{self.url} returns no token ids, and text is not tokenized again; use a server that knows return_token_ids "
                "(vLLM from 0.10.2 on), or --engine vllm"
            )
        if (
            given is None
            and isinstance(usage, dict)
            and usage.get("prompt_tokens") not in (None, len(prompt), len(prompt) * config.n)
        ):
            raise EngineError(
                f"{self.url} read {usage['prompt_tokens']} tokens of a prompt of {len(prompt)}; it must take ids as they are, all "
                "of them"
            )
        if given is not None and given != list(prompt):
            raise EngineError(
                f"{self.url} read a prompt as other ids: {list(prompt)[:20]} as {str(given)[:100]}; it must take ids as they are"
            )
        return read_completion(
            self.tokenizer, self.vocab_size, self.end_ids, prompt, ids, choice.get("finish_reason"), config
        )

    def _send(
        self, method: str, path: str, body: Any = None, stopped: threading.Event | None = None
    ) -> httpx2.Response:
        """One request, tried again where that may help; `stopped` ends the waiting.

        Raises:
            EngineError: the last try's failure, with a remedy.
        """
        import httpx2

        # Before anything is asked, an address that nobody listens at is a mistake; later, a server that restarts.
        waits = iter(WAITS if stopped is not None else ())
        while True:
            pause = next(waits, None)
            try:
                answer = self._client.request(method, f"{self.url}/{path}", json=body)
            except httpx2.ReadTimeout:
                raise EngineError(
                    f"{self.url} did not answer within {self.timeout:g} seconds; raise --timeout, or lower --concurrency or "
                    "max_new_tokens"
                ) from None
            except (httpx2.RequestError, httpx2.InvalidURL) as error:
                problem = f"{self.url} cannot be reached ({str(error) or type(error).__name__}); start the server, or check --server-url"
                again = isinstance(error, httpx2.TransportError) and not isinstance(error, httpx2.UnsupportedProtocol)
            else:
                if answer.is_success:
                    return answer
                problem, again = self._refusal(answer), answer.status_code in TRANSIENT
            if not again or pause is None or stopped.wait(pause):
                raise EngineError(problem)

    def _refusal(self, answer: httpx2.Response) -> str:
        said = answer.text.replace(_key() or "\0", "…")  # some repeat the key that they refuse
        reason = f"{answer.request.url.path} of {self.url}: {answer.status_code}, {' '.join(said.split())[:300]!r}"
        if answer.status_code in (401, 403):
            return f"{reason}; put the server's key into the environment variable {KEY_VARIABLE}"
        if answer.status_code in TRANSIENT:
            return f"{reason}; the server does not recover: look into its log, or lower --concurrency"
        if answer.is_redirect or answer.status_code == 404:
            return f"{reason}; check --server-url (it ends with /v1 as a rule) and --served-model-name"
        return f"{reason}; the server cannot do what is asked of it"

    def _json(self, answer: httpx2.Response) -> Any:
        try:
            return answer.json()
        except ValueError:
            raise EngineError(
                f"{answer.request.url.path} of {self.url} is no JSON ({answer.text[:100]!r}); is this an OpenAI-compatible server?"
            ) from None

    def close(self) -> None:
        self._client.close()


def _key() -> str | None:
    """The server's key, without the line's end that a file's has."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not all("!" <= letter <= "~" for letter in key):
        # What sends it would say it where it cannot.
        raise ConfigError(f"{KEY_VARIABLE} has a letter that no key has (white space, or not ASCII); set it anew")
    return key or None


def _base_url(url: str) -> str:
    """The address below which `models` and `completions` lie."""
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:
        valid = False
    if not valid:
        raise ConfigError(f"server_url {url!r} is no address; write it as http://localhost:8000/v1")
    if parts.username is not None or parts.password is not None or parts.query:
        # Messages and logs name the address.
        raise ConfigError(
            f"server_url: put the server's key into the environment variable {KEY_VARIABLE}, not into the address"
        )
    url = url.rstrip("/")
    return url if parts.path.strip("/") else f"{url}/v1"
