"""Familiar command-line flags: one table of which key each sets, read by the parser, its help and the merge."""
from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from ldm.config import CHOICE_STRENGTHS, TrainConfig
from ldm.config_files import merge
from ldm.text import literal
from ldm.util import UserError, allow_targets

AUTO = "auto"     # in place of strengths: the program chooses


@dataclass(frozen=True)
class Flag:
    """A familiar option that sets one key of the configuration; parser, help and merge read the same table of them.

    Attributes:
        name: of the option, without its hyphens.
        key: the dotted key it sets.
        kind: reads its value; None is a switch, which takes none and sets True.
        help: what the key's own comment does not say; "" leaves it to that.
        many: takes any number of values.
        short: a one-letter form, with its hyphen.
    """

    name: str
    key: str
    kind: Callable[[str], Any] | None = str
    help: str = ""
    many: bool = False
    short: str = ""


BASE_FLAGS = (
    Flag("ckpt", "base.ckpt", help="SD v1 checkpoint, .ckpt or .safetensors"),
    Flag("vae", "base.vae", help="file of another autoencoder for it, such as vae-ft-mse"),
    Flag("any_base", "base.any_base", None, "use a concept on another base than its own, with a warning"),
)


def yes_or_no(text: str) -> bool:
    """Reads a truth value; any other text is an error, never "true"."""
    words = {"true": True, "yes": True, "1": True, "on": True, "false": False, "no": False, "0": False, "off": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")
    return words[text.lower()]


def strength(text: str) -> float | str:
    """Reads a strength, or AUTO."""
    return AUTO if text == AUTO else float(text)


def guidance_named(text: str) -> str:
    """Reads the release's --share_guidance as a value of dci.guidance."""
    return "shared" if yes_or_no(text) else "separate"


def words_named(text: str) -> list[str]:
    """Reads concept words joined by +, as Custom Diffusion writes them."""
    return text.split("+")


def count_gpus(text: str) -> int:
    """Reads '2', or CompVis's list '0,1,', which must count from 0."""
    numbers = [part for part in text.split(",") if part]     # a trailing comma is CompVis's way to write one GPU
    if not all(part.isdecimal() for part in numbers) or ("," in text and numbers != [*map(str, range(len(numbers)))]):
        raise UserError(f"--gpus '{text}' is neither a number nor 0,1,...; choose others with CUDA_VISIBLE_DEVICES.")
    return len(numbers) if "," in text else int(text)


SAMPLING_FLAGS = (
    Flag("ddim_steps", "steps", int), Flag("ddim_eta", "eta", float), Flag("scale", "scale", float),
    Flag("n_samples", "n_samples", int), Flag("n_iter", "n_iter", int), Flag("H", "height", int),
    Flag("W", "width", int), Flag("seed", "seed", int), Flag("precision", "precision"),
    Flag("compile", "compile", None),
    Flag("use_dci", "dci.use", yes_or_no, "sample with DCI too, true or false"),
    Flag("replace_noun", "dci.replace_noun", help="auxiliary noun, or auto: by the context; "
         "of several concepts noun,noun"),
    Flag("agg_lambda", "dci.agg_lambda", strength, "strengths of the injection; auto [STRENGTH ...] keeps one for each "
         "prompt and seed", many=True),
    Flag("agg_time", "dci.agg_time", float, "share of steps with two branches"),
    Flag("share_guidance", "dci.guidance", guidance_named,
             "one unconditional prediction for both branches, true or false"),
)


TRAINING_FLAGS = (
    Flag("reg_mode", "data.reg.mode", help="folder, generate or none"),
    Flag("modifier_token", "method.words", words_named, "concept words joined by +, e.g. '<new1>+<new2>'"),
    Flag("init_ctx", "method.prefix", help="words the prefix contexts start from"),
    Flag("ctx_end_init", "method.suffix", help="words the suffix contexts start from"),
    Flag("name", "name", help="of the run; left out, the first concept's", short="-n"),
    Flag("logdir", "trainer.logdir", help="where run folders go", short="-l"),
    Flag("seed", "trainer.seed", int, short="-s"),
)
CONCEPT_FLAGS = (      # of the first concept that is configured
    Flag("datapath", "concepts.0.images", help="folder of reference photos"),
    Flag("class_noun", "concepts.0.class_noun", help="what the thing is, e.g. 'tortoise plushy'"),
    Flag("reg_datapath", "concepts.0.regularization", help="real_reg folder or any folder of the class"),
    Flag("reg_caption", "concepts.0.regularization_caption", help="of class images, or a file"),
)


def read_flags(options: Namespace, flags: Iterable[Flag] = ()) -> dict[str, Any]:
    """Returns what flags and those of `Parser.add_base` say, by keys; targets are allowed at once."""
    allow_targets(options.allow_target)     # before a configuration is read that may name them
    values = {}
    for flag in (*BASE_FLAGS, *flags):
        value = getattr(options, flag.name)
        if value is not None:
            values[flag.key] = value
    return values


def set_keys(values: Mapping[str, Any]) -> DictConfig:
    """Makes a configuration of values by their dotted keys."""
    config = OmegaConf.create()
    for key, value in values.items():
        OmegaConf.update(config, key, literal(value))
    return config


def sampling_settings(options: Namespace) -> DictConfig:
    """Turns the flags of scripts/sample.py into configuration.

    Raises:
        UserError: two of them exclude each other.
    """
    if options.plms and options.dpm_solver:
        raise UserError("--plms and --dpm_solver exclude each other; give one.")
    values = read_flags(options, SAMPLING_FLAGS)
    if options.preview_lambda:
        if options.agg_lambda:
            raise UserError("--agg_lambda and --preview_lambda exclude each other; give one.")
        values["dci.agg_lambda"] = options.preview_lambda
        values["dci.preview"] = True
    if options.plms or options.dpm_solver:
        values["sampler"] = "plms" if options.plms else "dpm_solver"
        values.setdefault("eta", 0.0)                # neither adds noise
    strengths = values.get("dci.agg_lambda", [])
    if AUTO in strengths:
        named = [value for value in strengths if value != AUTO]
        values["dci.agg_lambda"] = named or list(CHOICE_STRENGTHS)
        values["dci.choice.use"] = True
    return set_keys(values)


def training_settings(options: Namespace, files: Sequence[str | Path]) -> DictConfig:
    """Turns the flags of scripts/train.py into configuration for what `files` configure.

    Raises:
        UserError: flags contradict each other.
    """
    flags = set_keys(read_flags(options, TRAINING_FLAGS))
    if options.gpus:     # CompVis's spelling
        OmegaConf.update(flags, "trainer", {"accelerator": "gpu", "devices": count_gpus(options.gpus)}, merge=True)
    configured = merge(TrainConfig, files, data=bool(options.resume)).concepts     # to change its first concept
    concepts = concepts_named(options, configured)
    if concepts:
        flags.concepts = concepts
    if options.caption:
        # Of the flags' concepts, else of the files'.
        nouns = [entry.get("class_noun", "") for entry in flags.get("concepts") or configured]
        method = caption_to_method(options.caption, nouns[0] if nouns else "")
        if options.modifier_token and options.modifier_token != method["words"]:
            raise UserError(f"--modifier_token '{'+'.join(options.modifier_token)}' contradicts --caption "
                            f"'{options.caption}'.")
        flags = OmegaConf.merge(flags, {"method": literal(method)})
    return flags


def concepts_named(options: Namespace, configured: ListConfig) -> list[Any]:
    """Returns the concepts that flags name: those of a list, or the first configured one changed; none without flags.

    Raises:
        UserError: flags of one concept stand beside a list of them, or subjects without a list.
    """
    concept = {}
    for flag in CONCEPT_FLAGS:
        value = getattr(options, flag.name)
        if value is not None:
            concept[flag.key.removeprefix("concepts.0.")] = literal(value)
            if options.concepts_list:
                raise UserError(f"--{flag.name} is for one concept and means nothing beside --concepts_list; "
                                "give one of the two.")
    if options.concepts_list:
        from ldm.data.concept_lists import choose_concepts  # torch loads only when there is work for it
        return [literal(found.entry()) for found in choose_concepts(options.concepts_list, options.subject)]
    if options.subject:
        raise UserError(f"--subject '{options.subject[0]}' chooses from a list, and none is given; add "
                        "--concepts_list.")
    if not concept:
        return []
    if options.datapath or not configured:        # other images are another concept
        concept.setdefault("name", literal((options.class_noun or "concept").replace(" ", "_")))
        return [concept]
    return [OmegaConf.merge(configured[0], concept), *configured[1:]]


def caption_to_method(caption: str, class_noun: str) -> dict[str, Any]:
    """Reads words and template off a Custom Diffusion caption such as 'photo of a <new1> cat'."""
    caption = caption.replace("+<", " <")     # Custom Diffusion joins words by +
    words = [word for word in caption.split() if word.startswith("<")]
    concept = " ".join([*words, class_noun]).strip()
    if not words or concept not in caption:     # in their order, and the noun right after them
        raise UserError(f"--caption '{caption}' must contain the concept words and then the class noun '{class_noun}' "
                        "(--class_noun), as in 'photo of a <new1> cat'.")
    return {"words": words, "template": caption.replace(concept, "{}")}
