"""Writes a concept for other tools: LoRA, lossless differences, embeddings, diffusers' processors, a full checkpoint.

Prints what to type in each of them. They draw with the fine-tuned model; DCI is this project's sampler.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ldm import cli
from ldm.config import SampleConfig
from ldm.config_files import merge
from ldm.flags import BASE_FLAGS, read_flags, set_keys
from ldm.util import UserError

EMBEDDED = ("configs/sample-tiny.yaml",)
FORMS = ("lora", "diff", "embedding", "diffusers", "ckpt")
RECIPE = """    weights = safetensors.torch.load_file("{path}")
    processors = dict(pipe.unet.attn_processors)
    for name in [name for name in processors if name.endswith("attn2.processor")]:
        part = {{key.removeprefix(name + "."): value for key, value in weights.items() if key.startswith(name)}}
        size = part["to_k_custom_diffusion.weight"].shape
        processors[name] = diffusers.models.attention_processor.CustomDiffusionAttnProcessor(
            train_kv=True, train_q_out=False, hidden_size=size[0], cross_attention_dim=size[1])
        processors[name].load_state_dict(part)
    pipe.unet.set_attn_processor(processors)"""


def parser() -> cli.Parser:
    """Makes the parser."""
    parser = cli.Parser(__doc__, schema=SampleConfig, shipped={"": EMBEDDED, "SD v1": ("configs/sample-sd-v1.yaml",)})
    parser.add_argument("concept", type=Path, help="concept file; also the release's or Custom Diffusion's")
    parser.add_argument("--to", choices=FORMS, required=True, help="lora: all tools; diff: A1111 and ComfyUI, nothing "
                        "lost; embedding: the words alone; diffusers: its Custom Diffusion weights; ckpt: the whole "
                        "model")
    parser.add_argument("--rank", type=int, help="of a LoRA, the same for every layer; default: by --error")
    parser.add_argument("--error", type=float, default=0.05, help="share of what was learned that a LoRA may leave out")
    parser.add_argument("--name", help="name of files and in prompts; default: the class noun")
    parser.add_foreign()
    parser.add_base()
    parser.add_argument("--outdir", type=Path, default=Path("outputs/export"), help="where files go")
    return parser


def hints(form: str, name: str, concept, first: Path) -> list[str]:
    """Says what to type in each tool."""
    from ldm.customization.export import embedding_name
    noun, spoken = concept.scheme.class_noun, embedding_name(concept, name)
    if form == "ckpt":
        return [f"any tool: load {first.name} as the model, and the words as an embedding"]
    if form == "diffusers":
        return ["diffusers: pipe.load_textual_inversion(...) for each file of a word, then", RECIPE.format(path=first),
                f"    prompt: a {concept.scheme.concept} in the snow"]
    tail = {"lora": f" <lora:{name}:1>", "diff": f" <lora:{name}-diff:1>"}.get(form, "")
    lines = [f"A1111: {spoken}.safetensors into embeddings/; prompt: a {spoken} {noun} in the snow{tail}",
             f"ComfyUI: {spoken}.safetensors into models/embeddings/; prompt: a embedding:{spoken} {noun} in the snow"]
    if tail:
        lines.append(f"    {first.name} into models/Lora/ (A1111) or models/loras/ (ComfyUI), strength 1")
    if form != "diff":
        load = f"pipe.load_lora_weights('{first}'); " if form == "lora" else ""
        lines.append(f"diffusers: {load}pipe.load_textual_inversion(file, token=word) for each word; prompt: "
                     f"a {concept.scheme.concept} in the snow")
    return lines


def main(arguments: Sequence[str]) -> None:
    options = parser().parse_command(arguments)
    if not 0 <= options.error <= 1 or (options.rank is not None and options.rank < 1):
        raise UserError("--error is a share, from 0 to 1, and --rank at least 1.")
    from ldm.customization.delta import load_concept  # torch loads only when there is work for it
    from ldm.customization.export import slug_of
    words = tuple(options.modifier_token)
    concept = load_concept(options.concept, words, options.class_noun)
    name = slug_of(options.name or concept.scheme.class_noun)
    config = merge(SampleConfig, options.base or EMBEDDED, options.overrides, set_keys(read_flags(options, BASE_FLAGS)))
    from ldm.exporting import write_export
    written = write_export(concept, options.to, name, options.outdir, config, options.rank, options.error)
    for path in written:
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    for line in hints(options.to, name, concept, written[0]):
        print(line)
    print("these draw with the fine-tuned model; DCI needs scripts/sample.py")


if __name__ == "__main__":
    cli.run(main)
