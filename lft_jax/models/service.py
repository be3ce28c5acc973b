"""A classifier behind an HTTP address: only queries, each of which is sent over the network."""

import dataclasses
import email.utils
import http.client
import io
import json
import operator
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lft_jax import base
from lft_jax._reading import parse_json, parse_npy
from lft_jax.models._preparation import OUTPUTS, Preparation
from lft_jax.models.classifier import Classifier, HostModel, host_classifier

CONTENT_TYPES = {"json": "application/json", "npy": "application/octet-stream"}
LONGEST_PAUSE = 3600.0  # seconds; a server that asks for more is not waited for
SHOWN = 200  # characters of an answer in an error
#: Longest answer, in bytes: 4 MiB for each image (100,000 classes as text), and at most 1 GiB.
LONGEST_ANSWER, PER_IMAGE = 2**30, 2**22


def from_url(
    url: str,
    *,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    channels: str = "last",
    input_range: tuple[float, float] = (0.0, 1.0),
    output: str | int | Callable[[Any], Any] = "logits",
    batch_size: int | None = None,
    format: str = "json",
    headers: Mapping[str, str] | None = None,
    timeout: float = 30.0,
    retries: int = 3,
    backoff: float = 0.5,
    rate_limit: float | None = None,
    max_queries: int | None = None,
) -> Classifier:
    """A classifier that is an HTTP service, for queries only.

    A request is a POST of images in one of two formats:

    - "json": the body is `{"instances": images}`, images as nested lists. The answer is the scores as nested lists:
      alone, or under the key "predictions" or the one that `output` names, of the whole answer or of each prediction.
      This is the row format of TensorFlow Serving.
    - "npy": the body is a float32 array in NumPy's `.npy` format, and so is the answer.

    Connection errors, timeouts and the statuses 429 and 5xx are tried again, other statuses are not. Redirections are
    not followed. An answer of more than 4 MiB per image, or 1 GiB, is refused. `classifier.host.values.sent` is the
    number of images sent so far, retries included.

    Args:
      url: address of the service, `http://` or `https://`.
      mean: of each channel, or one number, in units of `input_range`; None for 0.
      std: the same of the standard deviation; None for 1.
      channels: "last" if it takes `[N, H, W, C]`, "first" for `[N, C, H, W]`.
      input_range: what 0 and 1 are for it before `mean` and `std`: (0, 255), say.
      output: "logits" or "probabilities" (whose logarithm is taken), `[N, classes]` or one column for two classes; or
        a key, an index or a function that finds the logits in the answer. A function gets the whole answer.
      batch_size: largest number of images in a request, or None for no limit.
      format: "json" or "npy".
      headers: of each request, such as `{"Authorization": "Bearer ..."}`; they replace the usual ones.
      timeout: seconds that the connection, or the next part of an answer, may take.
      retries: how often a request is repeated at most.
      backoff: seconds before the first repetition, doubled before each further one. A longer `Retry-After` of the
        answer is obeyed up to an hour; beyond that the request fails.
      rate_limit: largest number of requests per second, repetitions included; None for no limit.
      max_queries: largest number of images sent in all, repetitions included; None for no limit. A request that would
        exceed it is not sent.

    Returns:
      The classifier. It is called eagerly; under `jax.jit` each call sends one more image when it is compiled, for the
      number of classes.

    Raises:
      ValueError: for arguments out of range; when called, for an answer that is not finite scores `[N, classes]`, or
        longer than above.
      ConnectionError: when called, for a service that does not answer, or with the status of an error.
      RuntimeError: when called, for a request that would exceed `max_queries`.

    Examples:
      With a service at this address::

        model = lft_jax.models.from_url("http://localhost:8501/v1/models/net:predict", max_queries=10_000)
        result = lft_jax.universal_perturbation(model, images, labels, epsilon=8 / 255, oracle="query")
        model.host.values.sent  # images sent
    """
    base.check_name("format", format, CONTENT_TYPES)
    if format == "npy" and not (callable(output) or output in OUTPUTS):
        raise ValueError(f"output must be 'logits', 'probabilities' or a function with format='npy', got {output!r}.")
    base.check_positive("timeout", timeout)
    if rate_limit is not None:
        base.check_positive("rate_limit", rate_limit)
    if not 0 <= backoff < float("inf"):
        raise ValueError(f"backoff must be a finite number of seconds, at least 0, got {backoff!r}.")
    for name, count, least in (("retries", retries, 0), ("batch_size", batch_size, 1), ("max_queries", max_queries, 1)):
        if count is not None or name == "retries":
            _check_count(name, count, least)
    headers = dict(headers or {})
    if not all(isinstance(part, str) for pair in headers.items() for part in pair):
        raise ValueError(f"headers must be strings by name, got values for {sorted(map(str, headers))}.")
    service = _Service(
        url=url,
        shown=_checked(url),
        preparation=Preparation(mean, std, channels, input_range),
        output=output,
        batch_size=batch_size,
        format=format,
        headers={"Content-Type": CONTENT_TYPES[format], "Accept": CONTENT_TYPES[format], **headers},
        timeout=timeout,
        retries=retries,
        backoff=backoff,
        interval=0.0 if rate_limit is None else 1 / rate_limit,
        max_queries=max_queries,
    )
    known = "probabilities" if output == "probabilities" else "logits"
    return host_classifier(HostModel(service, output=known, pads=False))


def _check_count(name, value, least):
    try:
        operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, at least {least}, got {value!r}.") from None
    base.check_at_least(name, value, least)


def _checked(url):
    """The address without user, query and fragment, which may hold secrets: what errors show."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or not url.isprintable() or " " in url:
        raise ValueError(f"url must be an address such as 'https://host/path' or 'http://host:8501/path', got {url!r}.")
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    """A redirected POST would become a GET, which is no query."""

    def http_error_302(self, req, fp, code, msg, headers):
        return None  # before the new address is parsed

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


@dataclasses.dataclass(eq=False)
class _Service:
    """Images `[N, H, W, C]` in [0, 1] -> scores, by HTTP.

    Attributes:
      sent: number of images sent so far.
      columns: shape of the scores of one image, once known.
      earliest: time before which no request is sent.
    """

    url: str
    shown: str
    preparation: Preparation
    output: str | int | Callable[[Any], Any]
    batch_size: int | None
    format: str
    headers: dict[str, str] = dataclasses.field(repr=False)
    timeout: float
    retries: int
    backoff: float
    interval: float
    max_queries: int | None
    sent: int = 0
    columns: tuple[int, ...] | None = None
    earliest: float = float("-inf")
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    opener: urllib.request.OpenerDirector = dataclasses.field(
        default_factory=lambda: urllib.request.build_opener(_NoRedirection)
    )

    def __call__(self, images):
        self._check_queries(len(images))
        size = self.batch_size or len(images)  # cut here, so that `max_queries` is checked for all parts together
        parts = [images[first : first + size] for first in range(0, len(images), size)]
        return np.concatenate([self._scores(self._post(self._encoded(part), len(part)), len(part)) for part in parts])

    def _check_queries(self, count, failure=None):
        if self.max_queries is not None and self.sent + count > self.max_queries:
            raise RuntimeError(
                f"max_queries={self.max_queries}: {self.sent} images were sent to {self.shown}, {count} more would "
                "exceed it; allow more, or attack with fewer images or steps."
            ) from failure

    def _encoded(self, images):
        x = np.ascontiguousarray(self.preparation.on_numpy(images), np.float32)
        if self.format == "json":
            return json.dumps({"instances": x.tolist()}).encode()
        file = io.BytesIO()
        np.save(file, x)
        return file.getvalue()

    def _post(self, body, count):
        """The body of the answer to a request with `count` images."""
        request = urllib.request.Request(self.url, body, self.headers, method="POST")
        attempt, pause, failure, reason = 0, 0.0, None, ""
        while attempt <= self.retries and pause <= LONGEST_PAUSE:
            self._check_queries(count, failure)
            if attempt:
                self.sleep(max(pause, self.backoff * 2 ** (attempt - 1)))
            if (wait := self.earliest - self.clock()) > 0:
                self.sleep(wait)
            self.earliest = self.clock() + self.interval
            self.sent += count
            attempt += 1
            try:
                with self.opener.open(request, timeout=self.timeout) as response:
                    return self._body(response, count)
            except urllib.error.HTTPError as error:
                with error:
                    failure, pause = error, _retry_after(error.headers)
                    reason = f"HTTP {error.code} {error.reason}, {_start(_read(error))}"
                if error.code != 429 and error.code < 500:
                    raise ConnectionError(
                        f"{self.shown} answered {reason}; check url, headers, format and the images that it expects."
                    ) from error
            except (OSError, http.client.HTTPException) as error:  # timeouts and URLError are OSErrors
                failure, pause, reason = error, 0.0, f"{type(error).__name__}: {error}"
        asked = f", which asks for a pause of {pause:.0f} s" if pause > LONGEST_PAUSE else ""
        raise ConnectionError(
            f"{self.shown} did not answer in {attempt} attempts; the last: {reason}{asked}. Check that it runs, or "
            f"raise timeout={self.timeout}, retries={self.retries} or backoff={self.backoff}."
        ) from failure

    def _body(self, response, count):
        """The body of an answer, read only if it is not too long."""
        most = min(LONGEST_ANSWER, PER_IMAGE * (count + 1))
        known = response.length  # None if the answer ends with the connection, or comes in chunks
        body = response.read() if known is not None and known <= most else response.read(most + 1)
        if len(body) > most:
            raise ValueError(f"{self.shown} answered {count} images with more than {most} bytes: {_start(body)}.")
        return body

    def _scores(self, body, count):
        """The scores that an answer for `count` images holds."""
        expected = f"finite scores [{count}, classes] in the format {self.format!r}"
        try:
            found = parse_npy(io.BytesIO(body), len(body)) if self.format == "npy" else parse_json(body)
            scores = np.asarray(self._found(found))
        except Exception as error:  # anything may be in an answer
            raise ValueError(f"{self.shown} must answer with {expected}, got {_start(body)}: {error!r}.") from error
        kinds = {1: "f", 2: "fiu"}.get(scores.ndim, "")  # integers [N] are classes, not scores
        with np.errstate(over="ignore"):
            values = scores.astype(np.float32) if scores.dtype.kind in kinds else np.full((), np.nan)
        if not np.all(np.isfinite(values)) or len(values) != count or not values.size:
            form = f"shape {scores.shape}, dtype {scores.dtype}"
            raise ValueError(f"{self.shown} must answer with {expected}, got {form}: {_start(body)}.")
        self.columns = scores.shape[1:] if self.columns is None else self.columns
        if scores.shape[1:] != self.columns:
            raise ValueError(
                f"{self.shown} must answer with as many classes as before, {self.columns}, got {scores.shape[1:]}: "
                f"{_start(body)}."
            )
        return values

    def _found(self, answer):
        """The scores in an answer: nested lists, or an array."""
        if callable(self.output):
            return self.output(answer)
        if isinstance(answer, dict):
            answer = answer[self.output if self.output in answer else "predictions"]
        if isinstance(answer, list) and any(isinstance(row, dict) for row in answer):
            answer = [row[self.output] for row in answer]
        elif isinstance(self.output, int):
            answer = answer[self.output]
        if isinstance(answer, list):
            _check_numbers(answer)
        return answer


def _check_numbers(rows):
    """Raises a TypeError unless lists hold numbers; of texts NumPy would make an array as wide as the longest."""
    for row in rows:
        for value in row if isinstance(row, list) else (row,):
            if not isinstance(value, int | float):
                raise TypeError(f"expected numbers, got {type(value).__name__}")


def _read(error):
    try:
        return error.read(SHOWN + 1)
    except (OSError, http.client.HTTPException):
        return b""


def _start(body):
    text = body[: SHOWN + 1].decode("utf-8", "replace")
    return repr(text[:SHOWN]) + ("..." if len(text) > SHOWN else "")


def _retry_after(headers):
    """Seconds that a server asks to wait, as a number or as a date; 0 if it does not."""
    value = (headers.get("Retry-After") or "").strip()
    try:
        if value.isdigit():
            return float(value)
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0
