"""Fills real_reg/samples_<class> from a clip-retrieval server; `index` and `serve` make one of your own images.

`setup` makes an environment with clip-retrieval, in which `index`, `serve` and OpenAI's CLIPs run where this has none.
"""
from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ldm import cli, flags
from ldm.util import UserError, folder_name, from_here

COMMANDS = ("index", "serve", "setup")


def retrieval_parser() -> cli.Parser:
    """Makes the parser of plain retrieval."""
    parser = cli.Parser(__doc__, configured=False, prog="retrieve.py")
    parser.add_argument("--class_noun", "--target_name", required=True, help="what to retrieve, e.g. 'tortoise plushy'")
    parser.add_argument("--num", "--num_class_images", type=int, default=200, help="images wanted")
    parser.add_argument("--out", "--outpath", type=Path, help="folder of the set; default real_reg/samples_<class>")
    parser.add_argument("--url", help="the clip-retrieval server, e.g. http://127.0.0.1:1234; none is assumed")
    parser.add_argument("--index", help="the server's index; default its first")
    parser.add_argument("--text", help="what to ask for, where it is not the class noun")
    parser.add_argument("--oversample", type=float, default=2.0, help="candidates asked for per image")
    parser.add_argument("--clip", help="CLIP that compares captions: ViT-B/32, or open_clip:NAME/FILE; default none")
    parser.add_argument("--threshold", type=float, default=0.85, help="cosine a caption needs, with --clip")
    parser.add_argument("--deduplicate", type=flags.yes_or_no, default=True, help="leave out look-alikes")
    add_download_options(parser)
    return parser


def add_download_options(parser: cli.Parser) -> None:
    """Adds what all downloading commands take."""
    parser.add_argument("--clip_config", type=Path, help="JSON of an architecture open_clip does not know (its name)")
    parser.add_argument("--workers", type=int, default=8, help="downloads at a time")
    parser.add_argument("--max_megabytes", type=float, default=20.0, help="larger files are refused")
    parser.add_argument("--allow_private", action="store_true", help="also fetch from this machine and its network")


def command_parser(command: str) -> cli.Parser:
    """Makes the parser of `setup`, `index` or `serve`."""
    if command == "setup":
        return cli.Parser("Makes .venv-retrieval, an environment with clip-retrieval.", False, "retrieve.py setup")
    if command == "index":
        parser = cli.Parser("Builds a clip-retrieval index of your own images.", False, "retrieve.py index")
        parser.add_argument("source", help="folder of images (captions beside them are kept), or list of addresses")
        parser.add_argument("--out", type=Path, default=Path("outputs/index"), help="folder of the index")
        parser.add_argument("--clip", required=True, help="CLIP to see with: ViT-B/32, or open_clip:NAME/FILE")
        add_download_options(parser)
        return parser
    parser = cli.Parser("Serves an index on this machine alone.", False, "retrieve.py serve")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("outputs/index"), help="what `index` made")
    parser.add_argument("--port", type=int, default=1234, help="where to listen; 0 takes a free one")
    parser.add_argument("--clip", help="the CLIP the index was built with, if its file has moved")
    parser.add_argument("--clip_config", type=Path, help="JSON of an architecture open_clip does not know (its name)")
    return parser


def main(arguments: Sequence[str]) -> None:
    command = arguments[0] if arguments and arguments[0] in COMMANDS else None
    options = (command_parser(command) if command else retrieval_parser()).parse_command(arguments[bool(command):])
    if command == "setup":
        sys.exit(subprocess.call([sys.executable, Path(__file__).with_name("environment.py"), "retrieval"]))
    from retrieval import client, clip, download, image_set, index, server  # not for --help
    if command or options.clip in clip.OPENAI:
        client.change_environment(Path(__file__), arguments)
    if options.clip_config:
        clip.register_architecture(options.clip_config)
    if command == "serve":
        served = server.IndexServer(options.folder, options.port, options.clip)
        print(f"index '{served.name}' is served at {served.url}; end with Ctrl-C", flush=True)
        print(f"next: python {from_here('scripts/retrieve.py')} --class_noun cat --url {served.url}", flush=True)
        return served.run()
    if options.workers < 1 or options.max_megabytes <= 0:
        raise UserError("--workers and --max_megabytes must be positive.")
    downloader = download.Downloader(int(options.max_megabytes * 1e6), allow_private=options.allow_private)
    if command == "index":
        built = index.build_index(options.source, options.out, options.clip, downloader)
        for line in built.skipped:
            print(f"skipped {line}")
        print(f"index: {built.images} images in {built.folder}")
        return print(f"next:  python {from_here('scripts/retrieve.py')} serve {shlex.quote(str(built.folder))}")
    query = client.Query(options.class_noun, options.num, options.url, options.index, options.text,
                         options.oversample, options.clip, options.threshold, options.deduplicate)
    folder = options.out or Path("real_reg") / f"samples_{folder_name(options.class_noun)}"
    found = image_set.retrieve(folder, query, downloader, options.workers)
    for reason, count in found.refused.items():
        print(f"left out: {count} ({reason})")
    print(f"regularization set: {found.images} of {options.num} images in {found.folder}")
    print(f"next: python {from_here('scripts/train.py')} ... "
          + shlex.join(["--class_noun", options.class_noun, "--reg_datapath", str(found.folder)]))


if __name__ == "__main__":
    cli.run(main)
