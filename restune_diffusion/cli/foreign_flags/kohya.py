"""Flags of kohya's `train_network.py` and `sdxl_train_network.py`.

Source: the argparse calls of kohya-ss/sd-scripts: `train_network.py`, `sdxl_train_network.py`,
`library/sdxl_train_util.py` and `library/config_util.py`. Those of `train_util.py`, `custom_train_functions.py`,
`deepspeed_utils.py`, `sai_model_spec.py` and `utils.py` were read in copies, some of which split the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .entry import (
    LOGGERS,
    ForeignFlag,
    NotTranslated,
    chosen,
    gradient_norm,
    ignored,
    only,
    refused,
    resolution,
    same,
    switch,
)


def _folder(values: Sequence[str]) -> list[str]:
    return ["--data", *values, "--folder-repeats"]


def _masks(values: Sequence[str]) -> list[str]:
    return ["--masked-loss", "files", "--mask-data", *values]


def _class_images(values: Sequence[str]) -> list[str]:
    return ["--preservation", "prior", "--class-data", *values]


def _text_rate(values: Sequence[str]) -> list[str]:
    if len(values) != 1:
        raise NotTranslated("one --text-learning-rate applies to all text encoders")
    return ["--text-learning-rate", *values]


def _optimizer_arguments(values: Sequence[str]) -> list[str]:
    found: list[str] = []
    for value in values:
        name, _, number = value.partition("=")
        if name != "weight_decay":
            raise NotTranslated(f"of its arguments only weight_decay has an equivalent, not {name}")
        found += ["--weight-decay", number]
    return found


def _module(values: Sequence[str]) -> list[str]:
    if values[0] != "networks.lora":
        raise NotTranslated("only networks.lora is translated; `restune train --help` lists the other tuners")
    return []


def _network_arguments(values: Sequence[str]) -> list[str]:
    given = dict(value.partition("=")[::2] for value in values)
    others = [name for name in given if name not in ("conv_dim", "conv_alpha")]
    if others or "conv_dim" not in given:
        raise NotTranslated("only conv_dim, with or without conv_alpha, is translated; --res.linears selects layers")
    # kohya's default is 1.
    alpha = given.get("conv_alpha", "1")
    return ["--res.convolutions", "lora", "--res.conv-width", given["conv_dim"], "--res.conv-alpha", alpha]


def _split(values: Sequence[str]) -> list[str]:
    try:
        nothing = float(values[0]) == 0
    except ValueError:
        nothing = False
    return [] if nothing else ["--validation.holdout", *values]


def _prompts(values: Sequence[str]) -> list[str]:
    path = Path(values[0])
    if path.suffix in (".json", ".toml"):
        raise NotTranslated("give the prompts as --validation.prompts")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise NotTranslated(f"{path} cannot be read; give the prompts as --validation.prompts") from error
    prompts = [line.partition(" --")[0].strip() for line in lines if line.strip() and not line.startswith("#")]
    return ["--validation.prompts", *prompts]


_OPTIMIZERS = {"": "adamw"} | {name: name for name in ("adamw", "adamw8bit", "prodigy", "adafactor", "lion")}
_TAGS = "captions are encoded once, so tags are not shuffled or dropped; use --caption-dropout"
_CAPTIONS = "captions are read from .txt and .caption files; rename them"
_HUGGING_FACE = "call `push_to_hub` in Python after training"
_DEEPSPEED = "DeepSpeed is not supported; use --mixed-precision and --gradient-checkpointing"
_EPOCHS = "--save-every N counts steps"
_HUBER = "the loss is the squared error; leave the flag out"
_MEMORY = "memory is managed here by --drop-encoders and --gradient-checkpointing"

KOHYA: tuple[ForeignFlag, ...] = (
    same("pretrained_model_name_or_path", "--base", "b"),
    *ignored("v2", "the version is read from the base", "nothing"),
    switch("v_parameterization", "--prediction-type v_prediction"),
    *ignored("tokenizer_cache_dir", "the tokenizer is that of --base"),
    same("vae", "--vae", "v"),
    same("train_data_dir", "--data --folder-repeats", "d", "`10_sks dog` folders repeat their images", _folder),
    same("reg_data_dir", "--preservation prior --class-data", "c", "needs `--class-prompt` too", _class_images),
    refused("in_json", "write the captions to `metadata.jsonl` in the folder of --data"),
    refused("dataset_class", "give a folder as --data"),
    refused("dataset_repeats", "name the folder 10_NAME and add --folder-repeats"),
    refused("train_inpainting", "give an inpainting checkpoint as --base", "nothing"),
    same("output_dir", "--output", "o"),
    same("output_name", "--name", "ink"),
    same(
        "network_module", "--tuner res (lora)", "networks.lora",
        "only `networks.lora`; attention, feed-forward, `proj_in` and `proj_out`, as there", _module,
    ),
    same("network_dim", "--res.width", "8", "trains LoRA, unless `--tuner` or `--preset` is given"),
    same("network_alpha", "--res.alpha", "1", "kohya's default of 1 is written out"),
    only("network_dropout", "0 0.0", "LoRA has no dropout; use --caption-dropout"),
    ForeignFlag(
        "network_args", "values", "translated", "--res.convolutions --res.conv-width --res.conv-alpha",
        "only `conv_dim` and `conv_alpha`; --res.sites and --res.linears select layers", _network_arguments,
        ("conv_dim=4", "conv_alpha=2"),
    ),
    same("network_weights", "--init-tuner", "f", "a tuner file; `restune convert` makes one of a LoRA"),
    refused("dim_from_weights", "give the rank as --res.width", "nothing"),
    switch("network_train_unet_only", "--tuner res", "kohya trains the text encoders without this flag"),
    switch("network_train_text_encoder_only", "--tuner text"),
    refused("base_weights", "merge the LoRA into the base first", "values"),
    refused("base_weights_multiplier", "merge the LoRA into the base first", "values"),
    refused("scale_weight_norms", "lower --learning-rate or raise --weight-decay"),
    same("learning_rate", "--learning-rate", "0.0001"),
    same("unet_lr", "--learning-rate", "0.0001", "takes precedence over `--learning_rate`"),
    ForeignFlag("text_encoder_lr", "values", "translated", "--text-learning-rate", "one rate", _text_rate, ("1e-4",)),
    same("optimizer_type", "--optimizer", "AdamW8bit", "", chosen("--optimizer", _OPTIMIZERS)),
    ForeignFlag(
        "optimizer_args", "values", "translated", "--weight-decay", "only `weight_decay`", _optimizer_arguments,
        ("weight_decay=0.1",),
    ),
    switch("use_8bit_adam", "--optimizer adamw8bit"),
    switch("use_lion_optimizer", "--optimizer lion"),
    same("max_grad_norm", "--max-grad-norm", "1.0", "0 clips nothing", gradient_norm),
    same("lr_scheduler", "--lr-scheduler", "cosine"),
    same("lr_warmup_steps", "--lr-warmup-steps", "5", "a share of the steps needs `--max_train_steps`"),
    same("lr_scheduler_num_cycles", "--lr-num-cycles", "2"),
    same("lr_scheduler_power", "--lr-power", "2.0"),
    only("lr_decay_steps", "0", "choose a schedule of --lr-scheduler"),
    refused("lr_scheduler_type", "choose a schedule of --lr-scheduler"),
    refused("lr_scheduler_args", "choose a schedule of --lr-scheduler", "values"),
    refused("lr_scheduler_timescale", "choose a schedule of --lr-scheduler"),
    refused("lr_scheduler_min_lr_ratio", "choose a schedule of --lr-scheduler"),
    *ignored("fused_backward_pass", "only the tuner has gradients", "nothing"),
    same("max_train_steps", "--steps", "5"),
    same("max_train_epochs", "--epochs", "5", "takes precedence over `--max_train_steps`, as there"),
    same("train_batch_size", "--batch-size", "2"),
    same("gradient_accumulation_steps", "--gradient-accumulation-steps", "2"),
    same("seed", "--seed", "1"),
    same("mixed_precision", "--mixed-precision", "bf16"),
    *ignored("full_fp16 full_bf16", "the tuner's weights stay in fp32; --mixed-precision sets the base", "nothing"),
    switch("fp8_base", "--base-quantization int8", "8-bit integers"),
    switch("fp8_base_unet", "--base-quantization int8", "8-bit integers"),
    *ignored("no_half_vae", "a VAE runs in fp32 unless its config declares that fp16 is safe", "nothing"),
    switch("gradient_checkpointing", "--gradient-checkpointing"),
    *ignored("cpu_offload_checkpointing lowram highvram", _MEMORY, "nothing"),
    *ignored("xformers sdpa mem_eff_attn", "PyTorch's attention is used", "nothing"),
    *ignored("torch_compile", "training runs eagerly", "nothing"),
    *ignored("dynamo_backend", "training runs eagerly"),
    same("resolution", "--resolution", "512,512", "one side", resolution),
    switch("enable_bucket", "--bucketing"),
    switch("bucket_no_upscale", "--bucket-no-upscale"),
    *ignored("min_bucket_reso max_bucket_reso bucket_reso_steps", "--max-aspect-ratio bounds the buckets"),
    refused("skip_image_resolution", "remove small images from --data"),
    *ignored("resize_interpolation", "images are resized with Lanczos"),
    switch("flip_aug", "--flip"),
    switch("random_crop", "--crop random"),
    refused("color_aug", "color augmentation is not supported", "nothing"),
    refused("face_crop_aug_range", "use --crop random"),
    *ignored("debug_dataset", "`restune data inspect` shows the samples", "nothing"),
    *ignored("cache_latents cache_latents_to_disk skip_cache_check cache_info", "latents are always kept", "nothing"),
    *ignored("vae_batch_size", "latents are cached anyway"),
    *ignored(
        "cache_text_encoder_outputs cache_text_encoder_outputs_to_disk", "text is encoded once, unless `text` trains",
        "nothing",
    ),
    *ignored("disable_mmap_load_safetensors", "files are read as safetensors does it", "nothing"),
    only("caption_extension", ".txt .caption", _CAPTIONS),
    only("caption_extention", ".txt .caption", _CAPTIONS),
    only("caption_separator", ",", _TAGS),
    refused("shuffle_caption", _TAGS, "nothing"),
    only("keep_tokens", "0", _TAGS),
    refused("keep_tokens_separator", _TAGS),
    refused("secondary_separator", _TAGS),
    refused("enable_wildcard", _TAGS, "nothing"),
    refused("caption_prefix", 'write it in --caption-template "PREFIX {caption}"'),
    refused("caption_suffix", 'write it in --caption-template "{caption} SUFFIX"'),
    same("caption_dropout_rate", "--caption-dropout", "0.1"),
    only("caption_dropout_every_n_epochs", "0", _TAGS),
    only("caption_tag_dropout_rate", "0 0.0", _TAGS),
    only("token_warmup_min", "1", _TAGS),
    only("token_warmup_step", "0", _TAGS),
    refused("weighted_captions", "weights in captions are not supported", "nothing"),
    refused("max_token_length", "captions have 75 tokens; shorten them"),
    only("clip_skip", "1", "text is encoded by the last layer, or by that of the base's pipeline"),
    switch("alpha_mask", "--masked-loss alpha"),
    *ignored("masked_loss", "--masked-loss files follows from conditioning_data_dir", "nothing"),
    same("conditioning_data_dir", "--masked-loss files --mask-data", "m", "masks beside the images", _masks),
    same("prior_loss_weight", "--prior-loss-weight", "0.5"),
    same("noise_offset", "--noise-offset", "0.1"),
    refused("noise_offset_random_strength", "--noise-offset has a fixed strength", "nothing"),
    refused("adaptive_noise_scale", "--noise-offset has a fixed strength"),
    refused("multires_noise_iterations", "use --noise-offset"),
    *ignored("multires_noise_discount", "it has no effect without multires_noise_iterations"),
    same("ip_noise_gamma", "--input-perturbation", "0.1"),
    refused("ip_noise_gamma_random_strength", "--input-perturbation has a fixed strength", "nothing"),
    switch("zero_terminal_snr", "--rescale-betas-zero-snr"),
    same("min_timestep", "--min-timestep", "5"),
    same("max_timestep", "--max-timestep", "500"),
    same("min_snr_gamma", "--snr-gamma", "5"),
    switch("debiased_estimation_loss", "--debiased-estimation"),
    refused("scale_v_pred_loss_like_noise_pred", "use --snr-gamma", "nothing"),
    refused("v_pred_like_loss", "use --snr-gamma"),
    only("loss_type", "l2", _HUBER),
    *ignored("huber_schedule huber_c huber_scale", "the loss is the squared error"),
    same("save_every_n_steps", "--save-every", "5", "finished tuner files; --checkpoint-every N saves the state"),
    *ignored("save_every_n_epochs save_n_epoch_ratio", _EPOCHS),
    *ignored(
        "save_last_n_epochs save_last_n_epochs_state save_last_n_steps save_last_n_steps_state",
        "--keep-last K counts tuner files, --checkpoints-kept K checkpoints",
    ),
    *ignored("save_state save_state_on_train_end", "each checkpoint holds the state", "nothing"),
    *ignored("save_precision", "tuners are saved in fp32; `restune convert` changes formats"),
    only("save_model_as", "safetensors", "tuners are safetensors files"),
    refused("resume", "--resume without a folder continues from the newest checkpoint in --output"),
    refused("resume_from_huggingface", "download the run and use --resume", "nothing"),
    refused("skip_until_initial_step", "use --resume", "nothing"),
    refused("initial_epoch", "use --resume"),
    refused("initial_step", "use --resume"),
    *ignored(
        "huggingface_repo_id huggingface_repo_type huggingface_path_in_repo huggingface_token "
        "huggingface_repo_visibility",
        _HUGGING_FACE,
    ),
    *ignored("save_state_to_huggingface async_upload", _HUGGING_FACE, "nothing"),
    same("sample_prompts", "--validation.prompts", "prompts.txt", "each line a prompt; ` --n ...` is cut", _prompts),
    same("sample_every_n_steps", "--validation.every", "5"),
    *ignored("sample_every_n_epochs", "--validation.every N counts steps"),
    *ignored("sample_at_first", "samples at the start are always drawn", "nothing"),
    *ignored("sample_sampler", "samples use the scheduler of the base"),
    same("log_with", "--log-with", "tensorboard", "", chosen("--log-with", LOGGERS)),
    *ignored("logging_dir log_prefix", "logs are written to OUTPUT/logs"),
    *ignored("log_tracker_name log_tracker_config wandb_run_name", "the run is named after --output and --name"),
    *ignored("wandb_api_key", "wandb reads WANDB_API_KEY from the environment"),
    *ignored("log_config", "the settings are in OUTPUT/config.yaml", "nothing"),
    *ignored("console_log_level console_log_file", "messages are printed to the terminal"),
    *ignored("console_log_simple", "messages are printed to the terminal", "nothing"),
    refused("output_config", "each run writes OUTPUT/config.yaml", "nothing"),
    same("validation_split", "--validation.holdout", "0.1", "0 holds out nothing", _split),
    same("validation_seed", "--validation.holdout-seed", "7", "0 by default, not that of the run"),
    same("validate_every_n_steps", "--validation.loss-every", "5", "needs `--validation_split`"),
    *ignored("validate_every_n_epochs", "--validation.loss-every N counts steps"),
    *ignored("max_validation_steps", "each held-out image is measured at eight timesteps"),
    *ignored("no_metadata", "`restune inspect FILE` shows what the tuner file records", "nothing"),
    *ignored(
        "training_comment metadata_title metadata_author metadata_description metadata_license metadata_tags "
        "metadata_usage_hint metadata_thumbnail metadata_merged_from metadata_preprocessor "
        "metadata_is_negative_embedding",
        "the model card takes descriptions",
    ),
    *ignored("metadata_trigger_phrase", "--trigger-word records it and puts it into captions"),
    *ignored("max_data_loader_n_workers", "latents are cached, so no workers are needed"),
    *ignored("persistent_data_loader_workers", "latents are cached, so no workers are needed", "nothing"),
    *ignored("ddp_timeout", "`accelerate launch` sets it"),
    *ignored("ddp_gradient_as_bucket_view ddp_static_graph", "gradients are reduced without DDP", "nothing"),
    refused("deepspeed", _DEEPSPEED, "nothing"),
    *(
        refused(name, _DEEPSPEED)
        for name in (
            "zero_stage", "offload_optimizer_device", "offload_optimizer_nvme_path", "offload_param_device",
            "offload_param_nvme_path",
        )
    ),
    *(
        refused(name, _DEEPSPEED, "nothing")
        for name in ("zero3_init_flag", "zero3_save_16bit_model", "fp16_master_weights_and_gradients")
    ),
)  # fmt: skip
