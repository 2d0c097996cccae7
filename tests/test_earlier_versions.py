"""Tests that what the first release wrote still loads: a run of two steps on the embedded model of then, words only."""
from __future__ import annotations

import shutil
from pathlib import Path

from conftest import ROOT, Call
from safetensors.torch import load_file

from ldm.config import TrainConfig
from ldm.config_files import merge
from ldm.customization.delta import load_concept

RUN = ROOT / "tests" / "fixtures" / "earlier_run"
CONCEPT = RUN / "checkpoints" / "step-000002.safetensors"


def test_a_concept_file_of_the_first_release_is_read() -> None:
    concept = load_concept(CONCEPT)
    assert concept.scheme.concept == "<new1> <new2> <new3> backpack" and concept.step == 2
    assert concept.scheme.caption(4) == "<ctx-0-4-0> <new1> <new2> <new3> backpack <ctx-0-4-1>"
    assert concept.base == {"name": "embedded", "hash": "174a30859fd88ec2", "network": concept.base["network"]}
    assert list(concept.words) == ["<new1>", "<new2>", "<new3>"] and len(concept.contexts) == 10
    stored = load_file(CONCEPT)
    assert (concept.words["<new1>"] == stored["words.<new1>"]).all() and not concept.weights


def test_a_run_of_the_first_release_goes_on_where_one_insists(tmp_path: Path, call_script: Call) -> None:
    """The embedded model has other weights since."""
    shutil.copytree(RUN, tmp_path / "run")
    refused = call_script("train", "-r", tmp_path / "run", "method.steps=3")
    assert refused.status == 1 and "was trained with the base 'embedded' (174a30859fd88ec2)" in refused.err
    done = call_script("train", "-r", tmp_path / "run", "--insist", "method.steps=3")
    assert done.status == 0, done.err
    further = load_concept(tmp_path / "run" / "checkpoints" / "step-000003.safetensors")
    assert further.schemes == load_concept(CONCEPT).schemes and further.step == 3


def test_a_run_that_retrieved_by_itself_reads_its_folder(tmp_path: Path) -> None:
    text = (RUN / "configs" / "project.yaml").read_text()
    (tmp_path / "project.yaml").write_text(text.replace("mode: null", "mode: retrieve"))
    config = merge(TrainConfig, [tmp_path / "project.yaml"], data=True)
    assert config.data.reg.mode == "folder" and config.concepts[0].regularization == "real_reg/samples_backpack"


def test_a_concept_of_the_first_release_is_drawn(tmp_path: Path, call_script: Call) -> None:
    arguments = ("sample", "--delta_ckpt", CONCEPT, "--outdir", tmp_path, "--prompt", "a {} in the snow", "--n_samples",
                 1, "--ddim_steps", 2, "--agg_lambda", 0, "device=cpu")
    refused = call_script(*arguments)
    assert refused.status == 1 and "for the base 'embedded' (174a30859fd88ec2), not for 'embedded'" in refused.err
    done = call_script(*arguments, "--any_base")
    assert done.status == 0 and len(list((tmp_path / "samples").iterdir())) == 2, done.err
