"""Rewrites a checkpoint as .safetensors: smaller without training state, half the size with --half."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ldm import cli


def parser() -> cli.Parser:
    """Makes the parser."""
    parser = cli.Parser(__doc__, configured=False)
    parser.add_argument("ckpt", type=Path, help="the checkpoint, .ckpt or .safetensors")
    parser.add_argument("-o", "--out", type=Path, help="the file to write; by default beside the checkpoint")
    parser.add_argument("--half", action="store_true", help="write weights as float16")
    return parser


def main(arguments: Sequence[str]) -> None:
    options = parser().parse_command(arguments)
    from ldm.convert.single_file import convert  # torch loads only when there is work for it
    suffix = "-fp16.safetensors" if options.half else ".safetensors"
    target = options.out or options.ckpt.with_name(options.ckpt.stem + suffix)
    written = convert(options.ckpt, target, options.half)
    print(f"{written.path}: {written.tensors} tensors, {written.bytes / 1e9:.2f} GB; "
          f"{written.left_out} entries of the source (averages, training state) are left out")


if __name__ == "__main__":
    cli.run(main)
