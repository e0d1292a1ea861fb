"""A bad command line exits with 2 and a message; every error is one line and an exit code."""

from pathlib import Path

import pytest
import torch

from tract_transfer.cli.main import reports_errors
from tract_transfer.files import DiskFullError

ROOT = Path(__file__).parents[2]
PRETRAIN = "--config-file configs/quickstart/pretrain.yaml"
FINETUNE = "--config-file configs/quickstart/finetune.yaml"
QUICK_SUITE = "--config-file configs/suites/quickstart.yaml"
NO_CONFIG = "No config nowhere.yaml: there is no such file, and no packaged config"
BAD_LINES = {
    # combinations of options
    "train_net.py": "give the folder of the images, or --config-file FILE",
    "train_net.py solver.lr=1": "give the folder of the images, or --config-file FILE",
    f"train_net.py docs {PRETRAIN}": "give a folder or --config-file: docs and configs/quickstart",
    f"train_net.py {PRETRAIN} --epochs 3": "--epochs goes with a folder. With --config-file, over",
    "train_net.py docs --task segment": "argument --task: invalid choice: 'segment'",
    "train_net.py docs --epochs 0": "argument --epochs: must be int >= 1, got 0",
    "check_data.py": "give the folder of the images, or --config-file FILE",
    f"train_net.py {PRETRAIN} --eval-only --dry-run": "--dry-run: not allowed with",
    f"train_net.py {PRETRAIN} --eval-only --resume": "--resume continues a training",
    "analyze_model.py": "one of --config-file, --backbone and --weights is required",
    "analyze_model.py --weights x --stem cifar": "--stem and --args go with --backbone",
    "analyze_model.py --weights x a=1": "['a=1'] override a config: give --config-file",
    "analyze_model.py --backbone timm/resnet18 seed=1": "give --config-file",
    "convert_weights.py --to detectron2 x a.pkl --method mine": "go with --from",
    "export_model.py --run a --output b --private": "--private goes with --push-to-hub",
    "report.py": "folders",
    # values of options
    f"train_net.py {PRETRAIN} --num-gpus 0": "argument --num-gpus: must be int >= 1, got 0",
    f"train_net.py {PRETRAIN} --num-gpus 99": (
        f"--num-gpus 99: torch sees {torch.cuda.device_count()} GPUs"
    ),
    "analyze_model.py --backbone timm/resnet18 --size-px 0": "argument --size-px: must be int >= 1",
    "analyze_model.py --backbone timm/resnet18 --args {": "argument --args: invalid",
    "predict.py --run run photo.jpg --top-k -3": "argument --top-k: must be int >= 1, got -3",
    "predict.py --run run photo.jpg --min-score 7": "must be float in [0, 1], got 7",
    f"visualize_data.py {PRETRAIN} --num-images none": "argument --num-images: must be int >= 1",
    "analyze_model.py --backbone cifar/resnet19": "Did you mean 'cifar/resnet18'?",
    "analyze_model.py --backbone timm/resnet19": "timm has no model 'resnet19'",
    # files
    "train_net.py --config-file cifar10_finetune": "Nearest: transfer/cifar10_finetune, transfer/",
    "train_net.py --config-file ./configs": "No config configs: it is a folder",
    "train_net.py ./nowhere": "nowhere does not exist. Give the folder of the images",
    "train_net.py docs": "docs holds nothing that can be trained on",
    "train_net.py setup.cfg": "setup.cfg is a file. Give the folder of the images",
    "check_data.py ./nowhere": "nowhere does not exist. Give the folder of the images",
    "train_net.py --config-file nowhere.yaml": NO_CONFIG,
    "run_suite.py --config-file nowhere.yaml": NO_CONFIG,
    f"check_data.py {PRETRAIN} --json nowhere/x.json": "--json nowhere/x.json: the folder does not",
    f"train_net.py {FINETUNE} model.weights=./nowhere": "model.weights: No weights at",
    f"train_net.py {PRETRAIN} --eval-only output_dir=./nowhere": "checkpoint in",
    f"train_net.py {PRETRAIN} --debug-batch nowhere.safetensors": "No debug batch at nowhere",
    "report.py ./nowhere": "nowhere: the folder does not exist",
    "predict.py --run ./nowhere setup.cfg": "nowhere is not a run folder: it contains no",
    "predict.py --run ./nowhere nowhere.jpg": "nowhere.jpg is neither a file nor a folder",
    "analyze_model.py --weights nowhere.pth": "No weights at nowhere.pth",
    "export_model.py --run ./nowhere --output ./nowhere/x": "nowhere",
    "convert_weights.py --to detectron2 ./nowhere ./nowhere/x.pkl": "No model.json",
    "convert_weights.py --from detectron2 nowhere.pkl ./nowhere": "nowhere.pkl",
    # configs
    f"train_net.py {PRETRAIN} solver.lrr=1": "solver.lrr: unknown. Did you mean solver.lr?",
    f"train_net.py {PRETRAIN} data.batch_size=5000": "data.batch_size",
    f"check_data.py {PRETRAIN} data.trian=1": "data.trian: unknown. Did you mean data.train?",
    f"run_suite.py {QUICK_SUITE} output_dir=./nowhere methods.tract.downstream={{slover:}}": (
        "slover: unknown"
    ),
    f"run_suite.py {QUICK_SUITE} baseline=tarct": "'tarct' is not one of the methods ['vanilla',",
    f"visualize_data.py {PRETRAIN} data.train.classes=[12]": "data.train.classes",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_command_line_exits_with_2(call, line):
    done = call(*line.split())
    assert done.returncode == 2
    assert BAD_LINES[line] in done.stderr
    assert "error: " in done.stderr  # argparse's after its usage, with the command's name
    assert done.stdout == ""
    assert not (ROOT / "nowhere").exists()


ENDS = {
    "a user's mistake": (ValueError("no good"), 2, "error: no good\n"),
    "a missing file": (FileNotFoundError("No x."), 2, "error: No x.\n"),
    "a missing package": (ImportError("Install x."), 2, "error: Install x.\n"),
    "a full disk": (DiskFullError("full"), 1, "failed: DiskFullError: full\n"),
    "a failure": (RuntimeError("lost"), 1, "failed: RuntimeError: lost\n"),
    "a NaN": (FloatingPointError("nan"), 1, "failed: FloatingPointError: nan\n"),
    "Ctrl-C": (KeyboardInterrupt(), 130, "SIGINT: ended.\n"),
}


@pytest.mark.parametrize(("error", "code", "line"), ENDS.values(), ids=ENDS)
def test_an_error_is_one_line_and_an_exit_code(error, code, line, capsys, monkeypatch):
    @reports_errors
    def command():
        raise error

    assert command() == code
    assert capsys.readouterr().err == line
    monkeypatch.setenv("TRACT_TRANSFER_TRACEBACK", "1")
    if code != 130:
        with pytest.raises(type(error)):
            command()


def test_a_mistake_in_the_code_keeps_its_traceback():
    @reports_errors
    def command():
        return {}["key"]

    with pytest.raises(KeyError):
        command()
