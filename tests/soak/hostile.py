"""Makes hostile files: programs in pickles, torn and altered tensors, lying headers, images and texts that bite."""
from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image, PngImagePlugin
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

MAGIC, PROTOCOL = 0x1950a86a20f9469cfc6c, 1001           # of torch's files from before they were zipped


@dataclass(frozen=True)
class Hostile:
    """A file's bytes, what was done to it, and whether a program that takes it without a word is wrong."""

    what: str
    data: bytes
    must: bool


# --- programs ---------------------------------------------------------------------------------------------------------

class Runs:
    """What calls a function when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def payloads(canary: Path) -> dict[str, Runs]:
    shell = f"touch '{canary}'"
    return {"os.system": Runs(os.system, shell), "exec": Runs(exec, f"open({str(canary)!r}, 'w')"),
            "Path.touch": Runs(Path.touch, canary), "subprocess": Runs(subprocess.call, ["touch", str(canary)]),
            "eval": Runs(eval, f"__import__('os').system({shell!r})"), "open": Runs(open, str(canary), "w"),
            "torch.load": Runs(torch.load, str(canary)), "import": Runs(__import__, "os")}


def opcodes(canary: Path) -> dict[str, bytes]:
    """Pickles written by hand, which no pickler makes."""
    shell = f"touch '{canary}'".encode()
    text = b"S" + repr(shell.decode()).encode() + b"\n"
    deep = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
    laugh = b"\x80\x02]q\0" + b"".join(b"](h" + bytes([n]) + b"h" + bytes([n]) + b"eq" + bytes([n + 1])
                                       for n in range(60)) + b"."
    return {"INST": b"(" + text + b"ios\nsystem\n.", "OBJ": b"(cos\nsystem\n" + text + b"o.",
            "GLOBAL": b"cos\nsystem\n(" + text + b"tR.", "posix": b"cposix\nsystem\n(" + text + b"tR.",
            "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93" + text + b"\x85R.",
            "NEWOBJ": b"\x80\x02cos\nsystem\n" + text + b"\x85\x81.",
            "BUILD": b"\x80\x02ccollections\nOrderedDict\n)R}S'x'\ncos\nsystem\nsb.",
            "dotted": b"\x80\x04\x8c\x05torch\x8c\x13serialization.os.x\x93.", "EXT1": b"\x80\x02\x82\x01.",
            "PERSID": b"Pstorage\n.", "BINPERSID": b"\x80\x02N Q.".replace(b" ", b""), "no STOP": b"\x80\x02}",
            "POP": b"\x80\x020.", "deep": deep, "laughs": laugh, "LONG4": b"\x80\x02\x8b\xff\xff\xff\x7f.",
            "BINUNICODE8": b"\x80\x04\x8d" + struct.pack("<Q", 2 ** 60) + b".", "only STOP": b".",
            "FRAME": b"\x80\x04\x95" + struct.pack("<Q", 2 ** 62) + b"}.", "int": b"\x80\x02K\x01.", "None": b"N.",
            "huge int": b"I" + b"9" * 200_000 + b"\n.", "memo": b"\x80\x02j\xff\xff\xff\xff."}


def zipped(data: bytes, prefix: str = "archive", **others: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in {"data.pkl": data, "version": b"3\n", "byteorder": b"little", **others}.items():
            archive.writestr(f"{prefix}/{name}", content)
    return file.getvalue()


def legacy(data: bytes) -> bytes:
    head = [pickle.dumps(value, 2) for value in (MAGIC, PROTOCOL, {"little_endian": True})]
    return b"".join([*head, data, pickle.dumps([], 2)])


def tarred(data: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def torchscript() -> bytes:
    """A program torch would load where its file says so."""
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), file)
    return file.getvalue()


WRAPS: dict[str, Callable[[bytes], bytes]] = {
    "bare": bytes, "zip": zipped, "zip without version": lambda data: zipped(data, version=b""), "legacy": legacy,
    "tar": tarred, "zip with code": lambda data: zipped(data, **{"constants.pkl": data, "code/x.py": b"import os"})}


def program(rng: Random, valid: Path, canary: Path) -> Hostile:
    """A pickle that runs something: by every protocol and form of file, alone or beside tensors."""
    if rng.random() < 0.05:
        return Hostile("TorchScript", torchscript(), True)
    wrap = rng.choice(list(WRAPS))
    if rng.random() < 0.3:
        name, data = rng.choice(list(opcodes(canary).items()))
        return Hostile(f"{wrap} of opcode {name}", WRAPS[wrap](data), True)
    name, runs = rng.choice(list(payloads(canary).items()))
    protocol, around = rng.randrange(6), rng.choice(["", "state_dict", "optimizer_states"])
    content = {around: {"a": runs}, "epoch": 1} if around else runs
    return Hostile(f"{wrap} of {name}, protocol {protocol}, in '{around}'",
                   WRAPS[wrap](pickle.dumps(content, protocol)), True)


# --- tensors ----------------------------------------------------------------------------------------------------------

def read(path: Path) -> dict[str, Any]:
    """Reads a good file."""
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError:
        return torch.load(path, weights_only=True)


def metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, "pt") as file:
            return dict(sorted((file.metadata() or {}).items()))        # read in another order each time
    except SafetensorError:
        return {}


def torn(rng: Random, valid: Path, canary: Path) -> Hostile:
    """A good file that was cut short, or in which bytes changed; a changed weight is one no reader can know of."""
    data, kind = bytearray(valid.read_bytes()), rng.choice(["cut", "flip", "flip", "begin", "double", "zeros"])
    at = rng.randrange(min(len(data), rng.choice([64, 4096, len(data)])))
    if kind == "cut":
        return Hostile(f"cut at {at}", bytes(data[:at]), True)
    if kind == "flip":
        for _ in range(rng.randint(1, 8)):
            data[min(len(data) - 1, at + rng.randrange(64))] ^= 1 << rng.randrange(8)
    elif kind == "begin":
        del data[:1 + at % 64]
    elif kind == "double":
        data[at:at] = data[at:at + 512]
    else:
        data = bytearray(len(data))
    return Hostile(f"{kind} at {at}", bytes(data), kind == "zeros")


def tensors_of(state: Any, trail: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Lists the places of tensors within nested dicts."""
    if isinstance(state, Tensor):
        return [trail]
    if isinstance(state, dict):
        return [place for key, value in state.items() for place in tensors_of(value, (*trail, key))]
    return []


ALTERED: dict[str, tuple[Callable[[Tensor], Any], bool]] = {
    "NaN": (lambda x: torch.full_like(x.float(), torch.nan), True),
    "one infinity": (lambda x: x.float().flatten().index_fill(0, torch.tensor([0]), torch.inf).view(x.shape), True),
    "longer": (lambda x: torch.cat([x.flatten(), x.flatten()]), True), "a number": (lambda x: torch.tensor(1.0), True),
    "empty": (lambda x: torch.zeros(0), True), "complex": (lambda x: x.float().to(torch.complex64), True),
    "whole numbers": (lambda x: x.to(torch.int64), False), "truth values": (lambda x: x.bool(), False),
    "meta": (lambda x: torch.empty(x.shape, device="meta"), True), "sparse": (lambda x: x.to_sparse(), True),
    "one cell": (lambda x: torch.zeros(1).expand(x.shape), False),
    "10^13 of one cell": (lambda x: torch.zeros(1).expand(10 ** 13), True),
    "more dimensions": (lambda x: x[None, None, None], True), "half": (lambda x: x.half(), False),
    "text": (lambda x: "text", True), "nothing": (lambda x: None, True), "a list": (lambda x: [1.0, 2.0], True),
    "a dict": (lambda x: {"x": x}, True), "8 bits": (lambda x: x.float().to(torch.float8_e5m2), False),
    "quantised": (lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8), True)}


def altered(rng: Random, valid: Path, canary: Path) -> Hostile:
    """A good file in which one tensor is something else."""
    state = read(valid)
    place = rng.choice([place for place in tensors_of(state) if place[-1] not in ("betas", "n_averaged")])
    name = rng.choice(list(ALTERED))
    change, must = ALTERED[name]
    within = state
    for key in place[:-1]:
        within = within[key]
    if not (within[place[-1]].numel() and within[place[-1]].ndim):
        name, change, must = "text", ALTERED["text"][0], False
    try:
        within[place[-1]] = change(within[place[-1]])
    except (RuntimeError, NotImplementedError):          # no such form of this tensor
        within[place[-1]], name, must = "text", "text", True
    # What is not in a model's own table (an optimizer's, an average's) may be left unread.
    return Hostile(f"{'.'.join(map(str, place))} is {name}", saved(state, metadata(valid), rng),
                   must and not str(place[0]).startswith("optim"))


def saved(state: dict[str, Any], said: dict[str, str], rng: Random) -> bytes:
    file = io.BytesIO()
    plain = all(isinstance(value, Tensor) and value.layout == torch.strided and value.is_contiguous()
                and not value.is_quantized and value.device.type == "cpu" for value in state.values())
    if plain and said:
        path = Path(f"/dev/shm/soak-{os.getpid()}.safetensors")
        try:
            save_file(state, path, said)
            return path.read_bytes()
        finally:
            path.unlink(missing_ok=True)
    torch.save(state if rng.random() < 0.5 or "state_dict" in state else {"state_dict": state}, file)
    return file.getvalue()


def with_header(header: bytes, body: bytes = b"\0" * 64, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def lying(rng: Random, valid: Path, canary: Path) -> Hostile:
    """A .safetensors whose header does not tell the truth, or is none."""
    def one(**entry: Any) -> bytes:
        return json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **entry}}).encode()

    many = json.dumps({str(n): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(50_000)})
    twice = b'{"a": ' + one()[6:-1] + b', "a": ' + one()[6:-1] + b"}"
    headers = {
        "endless": with_header(b"{}", length=2 ** 63), "beyond the file": with_header(b"{}", length=1000),
        "deep": with_header(b"{" + b'"a":{' * 50_000), "deep list": with_header(b'{"a":' + b"[" * 100_000),
        "twice": with_header(twice), "negative": with_header(one(shape=[-4])), "kind": with_header(one(dtype="F7")),
        "huge": with_header(one(shape=[10 ** 13])), "product": with_header(one(shape=[2 ** 33, 2 ** 33])),
        "offsets": with_header(one(data_offsets=[0, 10 ** 12])), "back": with_header(one(data_offsets=[16, 0])),
        "bytes": with_header(b'{"\xff\xfe": 1}'), "many": with_header(many.encode(), b""), "empty": with_header(b"{}"),
        "metadata": with_header(b'{"__metadata__": {"a": 1}}'), "metadata list": with_header(b'{"__metadata__": []}'),
        "no length": with_header(b"", b"", 0), "spaces": with_header(b" " * 1000), "half": with_header(one()[:-9])}
    name = rng.choice(list(headers))
    return Hostile(f"header: {name}", headers[name], True)


NASTY: list[Any] = [
    None, True, -1, 0, 1e308, 10 ** 30, "", " ", "x" * 100_000, "\x1b[31m", "\ud800", "${oc.env:HOME}", "{}", "<new1>",
    [], {}, [[[]]], [1, "a", None], {"a": {"b": []}}, "../../x", "/etc/passwd", "a\0b", "\u202egnp", "NaN", 1.5, "1"]
BROKEN = ["", "null", "[" * 100_000, '{"a":' * 50_000, "NaN", "1e999", "hello", '{"a": 1, "a": 2}', "9" * 10_000, "\0"]


def told(rng: Random, valid: Path, canary: Path) -> Hostile:
    """A good file whose metadata says something else; what it may say freely no reader can refuse."""
    said = dict(metadata(valid)) or {"dci-ico": "{}"}
    key = rng.choice(list(said))
    if rng.random() < 0.3:
        said[key] = rng.choice(BROKEN)
        what = f"{said[key][:20]!r}"
    elif rng.random() < 0.1:
        del said[key]
        what = "nothing"
    else:
        said[key], what = with_a_change(said[key], rng)
    state = read(valid)
    path = Path(f"/dev/shm/soak-{os.getpid()}.safetensors")
    try:
        save_file({name: value.contiguous() for name, value in state.items() if isinstance(value, Tensor)}, path, said)
        data = path.read_bytes()
    except (SafetensorError, UnicodeEncodeError):
        data, what = with_header(b'{"__metadata__": {"x": "\xed\xa0\x80"}}'), "no text"
    finally:
        path.unlink(missing_ok=True)
    return Hostile(f"metadata {key}: {what}", data, False)


def with_a_change(text: str, rng: Random) -> tuple[str, str]:
    """Puts something nasty in one place of a JSON text."""
    try:
        content = json.loads(text)
    except ValueError:
        return rng.choice(BROKEN), "broken"
    place, within = (), content
    while isinstance(within, dict | list) and within and (not place or rng.random() < 0.8):
        step = rng.choice(list(within) if isinstance(within, dict) else range(len(within)))
        place, parent, within = (*place, step), within, within[step]
    value = rng.choice(NASTY)
    if not place:
        return json.dumps(value), f"{value!r:.40}"
    parent[place[-1]] = value
    return json.dumps(content), f"{'.'.join(map(str, place))} = {value!r:.40}"


# --- images and texts -----------------------------------------------------------------------------------------------

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"
DISGUISED = {
    "EPS": EPS,
    "EPS of DOS": b"\xc5\xd0\xd3\xc6" + struct.pack("<6I", 30, len(EPS), 0, 0, 0, 0) + b"\xff\xff" + EPS,
    "PS": b"%!PS-Adobe-3.0\n(x) run\nshowpage\n", "PDF": b"%PDF-1.4\n1 0 obj<<>>endobj\ntrailer<<>>\n%%EOF",
    "WMF": b"\xd7\xcd\xc6\x9a\0\0" + struct.pack("<4hHI", 0, 0, 9, 9, 96, 0) + b"\0\0\1\0\x09\0\0\3" + b"\0" * 40,
    "EMF": b"\1\0\0\0" + b"\0" * 36 + b" EMF" + b"\0" * 60, "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "GRIB": b"GRIB\0\0\0\1" + b"\0" * 60, "BUFR": b"BUFR" + b"\0" * 60, "HDF5": b"\x89HDF\r\n\x1a\n" + b"\0" * 60,
    "FITS": b"SIMPLE  =                    T" + b" " * 2850, "XPM": b'/* XPM */\nstatic char *x[] = {"1 1 1 1"};',
    "PSD": b"8BPS\0\1" + b"\0" * 60, "ICNS": b"icns\0\0\0\x08", "FLI": b"\0\0\0\0\x11\xaf" + b"\0" * 130,
    "HTML": b"<html><script>1</script></html>", "ZIP": zipped(b"N."), "shell": b"#!/bin/sh\ntouch canary\n",
    "MPEG": b"\0\0\1\xb3" + b"\0" * 60, "nothing": b"", "PCD": b"\0" * 2048 + b"PCD_IPI" + b"\0" * 1000}


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes, rows: int = 1000) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(rows)))
    return b"".join([b"\x89PNG\r\n\x1a\n", head, *chunks, pixels, chunk(b"IEND", b"")])


def image(rng: Random, valid: Path, canary: Path) -> Hostile:
    """An image that is none, claims too much, or says too much."""
    kind = rng.choice(["disguised", "disguised", "bomb", "told", "torn"])
    if kind == "disguised":
        name = rng.choice(list(DISGUISED))
        return Hostile(name, DISGUISED[name], True)
    if kind == "bomb":
        sides = rng.choice([(100_000, 100_000), (2 ** 31 - 1, 1), (1, 2 ** 31 - 1), (60_000, 5000), (0, 0), (0, 5)])
        return Hostile(f"{sides[0]} x {sides[1]}", png(*sides), True)
    if kind == "told":
        zeros = zlib.compress(bytes(100_000_000))
        extra = rng.choice([chunk(b"zTXt", b"dci-ico\0\0" + zeros), chunk(b"iCCP", b"x\0\0" + zeros),
                            chunk(b"acTL", struct.pack(">II", 2 ** 31 - 1, 0)), chunk(b"eXIf", b"MM\0*\0\0\0\x08" * 99),
                            chunk(b"tEXt", b"dci-ico\0" + b"[" * 500_000)])
        return Hostile("an image that says much", png(8, 8, extra, rows=16), False)
    file = io.BytesIO()
    info = PngImagePlugin.PngInfo()
    info.add_text("dci-ico", with_a_change('{"prompt": "a", "seed": 1, "concept": {"class_noun": "a"}}', rng)[0])
    name = rng.choice(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
    Image.effect_noise((40, 40), 90).convert("RGB").save(file, name, **({"pnginfo": info} if name == "PNG" else {}))
    data = file.getvalue()
    return Hostile(f"torn {name}", data[:rng.randrange(len(data))], False)


def text(rng: Random, valid: Path, canary: Path) -> Hostile:
    """A text that a reader of YAML or JSON may choke on."""
    laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]\n" for n in range(9))
    shell = f"touch '{canary}'"
    bombs = {
        "laughs": laughs, "itself": "a: &a [*a]\n", "deep": "[" * 50_000, "deep map": "{a: " * 20_000,
        "deep dots": "a: " + "\n".join(" " * n + f"b{n}:" for n in range(1, 3000)),
        "python": f"!!python/object/apply:os.system [\"{shell}\"]\n",
        "target": f"model: {{target: os.system, params: {{command: \"{shell}\"}}}}\n",
        "environment": "name: ${oc.env:PATH}\n", "loop": "name: ${seed}\nseed: ${name}\n", "unknown": "name: ${x:1}\n",
        "number": "seed: " + "9" * 100_000, "hex": "seed: 0x" + "f" * 100_000, "sixty": "seed: " + "1:" * 5000 + "1",
        "nothing": "", "zeros": "\0" * 1000, "list": "[1, 2]", "word": "hello", "tabs": "a:\n\t- b",
        "twice": "a: 1\na: 2",
        "JSON": '[{"instance_data_dir": 5}]', "JSON nulls": '[{"instance_data_dir": "a\\u0000", "class_prompt": "x"}]',
        "long": json.dumps([{"instance_data_dir": "x" * 5000, "class_prompt": "cat"}]),
        "surrogate": '[{"instance_data_dir": "a", "class_prompt": "\\ud800"}]', "dates": "name: 2026-99-99",
        "merge": "<<: [1, 2]", "tags": "name: !x y", "anchors": "a: *b", "keys": "? [a, b]\n: c", "null key": "~: a"}
    name = rng.choice(list(bombs))
    return Hostile(f"text: {name}", bombs[name].encode(), name in ("python", "target", "deep"))
