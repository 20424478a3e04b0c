"""The inside on a device with ONNX Runtime, NumPy and cryptography alone: no torch.

    device = Device("device.onnx")                       # sfumato export onnx device.onnx --alpha 0.8
    request = device.release(frame)                      # tensors of core.wire, by name; noise is new for every one
    loc, conf = send("https://inference.example:8000", "face_detection_release", request)

A device has no ledger and no keyed noise: how often it may send one scene is for whoever runs it to bound, or for a
gateway behind it.
"""

import http.client
import json
import math
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np

from sfumato.core.errors import ArtefactError, ImageError, RequestError, ServerError
from sfumato.trusted.stream import KEY_BYTES, fill

Tensors = dict[str, np.ndarray[Any, Any]]
MOST = 2**26  # bytes of an answer
_TYPES = {"int8": "INT8", "uint8": "UINT8", "float32": "FP32", "int32": "INT32"}
_DTYPES = {"FP32": np.float32, "FP16": np.float16, "INT64": np.int64, "INT32": np.int32}


class Device:
    """The exported head and obfuscator. Raises ArtefactError for a file that is none."""

    def __init__(self, path: str | Path, *, threads: int = 1) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            facts = self._session.get_modelmeta().custom_metadata_map
            self.digest, self.alpha, self.task = facts["digest"], float(facts["alpha"]), facts["task"]
            self.sites = tuple(int(side) for side in facts["sites"].split())
            self._channels = np.frombuffer(bytes.fromhex(facts["channels"]), np.uint8)
            self._mean = np.array(facts["minus"].split(), np.float32)
            given = {one.name: one.shape for one in self._session.get_inputs()}
            self.size: tuple[int, int] = tuple(given["INPUT__0"][2:])
            self._noise: tuple[int, ...] = tuple(given["NOISE"][1:])
        except Exception as error:  # the runtime raises what it likes
            raise ArtefactError(
                f"{path}: no exported device", wanted="an ONNX file", do="sfumato export onnx FILE"
            ) from error

    def release(self, record: np.ndarray[Any, Any]) -> Tensors:
        """One picture, uint8 [H, W, 3] BGR of `size`, as the tensors of one request. Raises ImageError."""
        if record.dtype != np.uint8 or record.shape != (*self.size, 3):
            raise ImageError(
                f"{record.dtype} of shape {list(record.shape)}", wanted=f"uint8 of shape {[*self.size, 3]}, BGR"
            )
        x = (record.astype(np.float32) - self._mean).transpose(2, 0, 1)[None]
        noise = np.empty(math.prod(self._noise), np.float32)
        fill(noise, os.urandom(KEY_BYTES))
        codes = self.codes(x, noise.reshape(1, *self._noise))
        return {
            "CODES": codes,
            "CHANNELS": self._channels[None],
            "ALPHA": np.array([[self.alpha]], np.float32),
            "SITES": np.array([self.sites], np.int32),
            "DIGEST": np.frombuffer(bytes.fromhex(self.digest), np.uint8)[None],
        }

    def codes(self, x: np.ndarray[Any, Any], noise: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Preprocessed records [N, 3, H, W] and standard normals -> codes int8; for tests, which know the noise."""
        codes: np.ndarray[Any, Any] = self._session.run(None, {"INPUT__0": np.ascontiguousarray(x), "NOISE": noise})[0]
        return codes


def send(
    url: str, model: str, tensors: Mapping[str, np.ndarray[Any, Any]], *, timeout: float = 30.0
) -> list[np.ndarray[Any, Any]]:
    """Posts a request of the open inference protocol with binary tensors; its outputs, in order.

    https, or http to this very machine, past any proxy of the environment. Raises RequestError for another address,
    ServerError where no answer came, or one that is no number: so a server says that it is of another artefact.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RequestError("an address that is none", wanted="https://HOST:PORT")
    if parts.scheme == "http" and not _here(parts.hostname):
        raise RequestError(f"http to {parts.hostname}", wanted="https: obfuscation is not encryption", do="https://")
    inputs = [
        {"name": name, "datatype": _TYPES[array.dtype.name], "shape": list(array.shape),
         "parameters": {"binary_data_size": array.nbytes}}
        for name, array in tensors.items()
    ]  # fmt: skip
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    body = head + b"".join(np.ascontiguousarray(array).tobytes() for array in tensors.values())
    place = f"{url.rstrip('/')}/v2/models/{quote(model)}/infer"
    headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
    try:
        request = urllib.request.Request(place, body, headers)
        with _DIRECT.open(request, timeout=timeout) as answer:
            told, size = answer.read(MOST + 1), answer.headers.get("Inference-Header-Content-Length")
    except urllib.error.HTTPError as error:
        raise ServerError(f"{parts.hostname} answered {error.code}", status="refused") from error
    except (OSError, http.client.HTTPException) as error:
        raise ServerError(f"{parts.hostname} cannot be reached, or broke off", status="down") from error
    try:
        if len(told) > MOST:
            raise ValueError
        outputs = _outputs(told, len(told) if size is None else int(size))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ServerError(f"{parts.hostname} answered what cannot be read", status="wrong") from error
    rows = {len(array) for array in tensors.values()}
    if not outputs or any(a.ndim < 1 or {len(a)} != rows or not np.isfinite(a).all() for a in outputs):
        raise ServerError(f"{parts.hostname} answered what is no number, or for other records", status="wrong")
    return outputs


class _Straight(urllib.request.HTTPRedirectHandler):
    """A release goes where it was sent, or nowhere."""

    def redirect_request(self, *_: Any) -> None:
        return None


_DIRECT = urllib.request.build_opener(_Straight, urllib.request.ProxyHandler({}))


def _outputs(told: bytes, size: int) -> list[np.ndarray[Any, Any]]:
    at, found = size, []
    for one in json.loads(told[:size])["outputs"]:
        kind = _DTYPES[one["datatype"]]
        if "data" in one:
            found.append(np.array(one["data"], kind).reshape(one["shape"]))
            continue
        length = int(one["parameters"]["binary_data_size"])
        found.append(np.frombuffer(told[at : at + length], kind).reshape(one["shape"]))
        at += length
    return found


def _here(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
