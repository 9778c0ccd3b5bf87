"""Names of options in other programs, which our commands refuse with the name here."""

from __future__ import annotations

from collections.abc import Mapping

_BASE = "model model-id model-path model-name ckpt ckpt-path checkpoint sd-model pretrained-model-name-or-path m"
_STEPS = "num-steps n-steps num-inference-steps inference-steps sampling-steps ddim-steps sample-steps"
_OUTPUT = "out outdir out-dir output-dir output-path output-file outpath save-dir save-path save-to o"
_SAMPLING: Mapping[str, str] = {
    "--base": _BASE,
    "--vae": "vae-path vae-model pretrained-vae-model-name-or-path",
    "--prompt": "p text prompts positive positive-prompt",
    "--negative-prompt": "neg negative negative-prompts n-prompt neg-prompt uncond-prompt",
    "--seed": "random-seed manual-seed",
    "--images": "n num n-samples num-samples num-images n-images num-images-per-prompt n-iter batch-count count",
    "--steps": _STEPS,
    "--guidance": "cfg cfg-scale guidance-scale scale",
    "--guidance-rescale": "cfg-rescale rescale-cfg",
    "--scheduler": "sampler sampler-name sampling-method scheduler-type",
    "--clip-skip": "clip-layer clip-stop-at-last-layers",
    "--width": "w W",
    "--height": "H",
    "--width and --height": "size resolution res image-size",
    "--init-image": "image img init init-img input-image",
    "--strength": "denoise denoising-strength",
    "--tuner": "tuners adapter adapters tuner-path",
    "--lora": "loras lora-path lora-weights lora-file network-weights",
    "a weight after a colon, as in --tuner FILE:0.8": "weight lora-scale lora-weight network-mul multiplier",
    "--control-image": "control hint control-net-image",
    "--control-scale": "controlnet-scale controlnet-conditioning-scale",
    "--output": _OUTPUT,
    "--device cpu": "cpu use-cpu",
    "--device cuda": "gpu cuda use-gpu",
    "--dtype": "precision torch-dtype mixed-precision",
    "--dtype fp16": "fp16 half",
    "--dtype bf16": "bf16",
}
_FOLDER = "data folder dataset data-dir train-data-dir"
# Flags of the training scripts of diffusers and kohya are translated instead (`foreign_flags`).
_TRAINING: Mapping[str, str] = {
    "--base": "model model-id model-path model-name ckpt ckpt-path checkpoint m",
    "--data": "data-dir dataset dataset-dir images image-folder train-data d",
    "--output": "out outdir out-dir output-path save-dir save-path save-to o",
    "--learning-rate": "lr rate l-r",
    "--steps": "num-steps n-steps max-steps train-steps num-train-steps iterations iters",
    "--epochs": "num-epochs epochs-num n-epochs epoch max-epochs",
    "--batch-size": "batch bs b train-batch",
    "--gradient-accumulation-steps": "grad-accum gradient-accumulation grad-accumulation accum",
    "--resolution": "size res image-size",
    "--prompt": "caption p",
    "--trigger-word": "trigger token keyword",
    "--validation.prompts": "val-prompt val-prompts sample-prompt",
    "--mixed-precision": "precision dtype",
    "--mixed-precision fp16": "fp16 half",
    "--mixed-precision bf16": "bf16",
    "--cpu": "use-cpu no-cuda",
    "--res.width": "dim r lora-rank lora-dim",
    "--lr-scheduler": "scheduler schedule",
    "--lr-warmup-steps": "warmup warmup-steps",
    "--seed": "random-seed",
    "--name": "run-name exp-name",
    "--resume": "continue restart",
}
_OF_COMMAND: Mapping[str, Mapping[str, str]] = {
    "train": _TRAINING,
    "generate": _SAMPLING,
    "grid": {
        **_SAMPLING,
        "--weights": "scales lora-scales multipliers",
        "--columns-at-once": "batch-size batch bs",
        "--share-steps": "shared-steps",
    },
    "evaluate": {
        **{name: _SAMPLING[name] for name in ("--base", "--vae", "--seed", "--steps", "--guidance", "--output")},
        **{name: _SAMPLING[name] for name in ("--device cpu", "--device cuda", "--dtype", "--dtype fp16")},
        "--tuner": f"{_SAMPLING['--tuner']} lora {_SAMPLING['--lora']}",
        "a weight after a colon, as in --tuner FILE:0.8": "weight lora-scale lora-weight",
        "--data": "images dataset data-dir test-data val-data held-out train-data-dir",
        "--training-images": "train train-data training-data",
        "--prompts": "prompt validation-prompts",
        "--drift-prompts": "leak-prompts",
        "--limit": "n num max-images max-samples num-images",
        "--batch-size": "batch bs b",
    },
    "convert": {
        "--base": _BASE,
        "--to": "format target target-format output-format type t",
        "--rank": "dim network-dim new-rank r",
        "the input as the first argument": "input in source src from i",
        "the output as the second argument": f"output dst dest target-path {_OUTPUT}",
    },
    "merge": {
        "--output": _OUTPUT,
        "--method": "mode type merge-method",
        "--rank": "dim network-dim new-rank r",
        "the files as arguments, without a flag": "tuner tuners lora loras models model input inputs",
        "a weight after a colon, as in FILE:0.8": "weight weights ratio ratios alpha scale scales",
    },
    "data inspect": {"--base": _BASE, "the folder as the argument after `inspect`": _FOLDER},
    "data caption": {
        "--model": "repo-id model-id model-path model-dir model-name pretrained-model-name-or-path m",
        "--batch-size": "batch bs b",
        "--general-threshold": "thresh threshold",
        "--max-tokens": "max-length max-new-tokens",
        "--beams": "num-beams beam-size",
        "--existing append": "append-tags append",
        "--trigger-word": "trigger prefix class-token",
        "--device cpu": "cpu use-cpu",
        "--device cuda": "gpu cuda use-gpu",
        "the folder as the argument after `caption`": _FOLDER,
    },
    "data edit": {
        "--find": "search pattern from old",
        "--replace": "replacement with to new",
        "--remove-tag": "remove-tags undesired-tags delete-tag",
        "--dry-run": "dryrun preview diff",
        "the folder as the argument after `edit`": _FOLDER,
    },
    "report": {"--output": _OUTPUT, "the run's folder as the argument": "run folder input dir"},
    "inspect": {"the file as the argument": "tuner file input lora"},
    "demo": {"--output": _OUTPUT, "--steps": f"{_STEPS} max-train-steps", "--seed": "random-seed"},
}


def name_here(command: str, flag: str) -> str | None:
    """Return what to give instead of an option of another program, or None if its name is not known.

    Args:
        command: name of our command.
        flag: the option without its dashes, with `-` in its name.
    """
    names = _OF_COMMAND.get(command, {})
    return next((ours for ours, theirs in names.items() if flag in theirs.split()), None)
