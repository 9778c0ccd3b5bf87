"""Flags of diffusers' `train_dreambooth_lora(_sdxl).py` and `train_text_to_image_lora(_sdxl).py`.

Source: the argparse calls of huggingface/diffusers, `examples/dreambooth` and `examples/text_to_image`, of 0.22.
Later flags, such as `--use_dora` and `--text_encoder_lr`, come from a copy of a later `train_dreambooth_lora_sdxl.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from .entry import LOGGERS, ForeignFlag, NotTranslated, chosen, gradient_norm, ignored, only, refused, same, switch


def _resume(values: Sequence[str]) -> list[str]:
    if values[0] != "latest":
        raise NotTranslated("--resume continues from the newest checkpoint in --output; leave the path out")
    return ["--resume"]


_DEFAULT_BETAS = "the betas and epsilon of the optimizer are fixed to 0.9, 0.999 and 1e-8"

DIFFUSERS: tuple[ForeignFlag, ...] = (
    same("pretrained_model_name_or_path", "--base", "b"),
    same("pretrained_vae_model_name_or_path", "--vae", "v"),
    refused("revision", "download the revision and give its folder as --base"),
    refused("variant", "give the folder of the variant as --base; --mixed-precision sets the precision"),
    refused("tokenizer_name", "the tokenizer is that of --base"),
    refused("dataset_name", "save the dataset with `save_to_disk` and give its folder as --data"),
    refused("dataset_config_name", "save the dataset with `save_to_disk` and give its folder as --data"),
    same("instance_data_dir", "--data", "d", "subfolders are read too"),
    same("train_data_dir", "--data", "d", "subfolders are read too"),
    *ignored("cache_dir", "set HF_HOME to move the cache of downloads"),
    same("image_column", "--image-column", "image"),
    same("caption_column", "--caption-column", "text", "of a list the first; `--captions all` uses each, as there"),
    *ignored("repeats", "images repeat until --steps is reached"),
    same("instance_prompt", "--prompt", "a dog", "caption of the images that have none"),
    same("class_prompt", "--class-prompt", "a dog"),
    same("class_data_dir", "--class-data", "c", "default OUTPUT/class-images"),
    switch("with_prior_preservation", "--preservation prior"),
    same("prior_loss_weight", "--prior-loss-weight", "0.5"),
    same("num_class_images", "--num-class-images", "50"),
    same("sample_batch_size", "--class-batch-size", "2", "class images in a batch"),
    *ignored("prior_generation_precision", "--mixed-precision applies to class images too"),
    same("validation_prompt", "--validation.prompts", "a dog"),
    same("validation_prompts", "--validation.prompts", "a dog"),
    *ignored("num_validation_images", "each prompt gives one sample; repeat prompts in --validation.prompts"),
    *ignored("validation_epochs", "samples are drawn at the start and the end; --validation.every N draws more"),
    same("validation_steps", "--validation.every", "5", "`--validation.steps` is the number of denoising steps"),
    refused("validation_images", "--validation.control-images takes control images", "values"),
    refused("class_labels_conditioning", "class labels are for the IF models, which are not supported"),
    refused("max_train_samples", "give a smaller folder as --data"),
    refused("do_edm_style_training", "EDM training is not supported; use --prediction-type", "nothing"),
    same("output_dir", "--output", "o", "the tuner is OUTPUT/NAME.safetensors, see `--name`"),
    *ignored("output_kohya_format", "`restune convert IN OUT --to kohya` writes it after training", "nothing"),
    same("seed", "--seed", "1"),
    same("resolution", "--resolution", "512"),
    switch("center_crop", "--crop center", "the default here; diffusers crops at random without the flag"),
    switch("random_flip", "--flip"),
    *ignored("crops_coords_top_left_h crops_coords_top_left_w", "the crop of each image is recorded as it is"),
    *ignored("image_interpolation_mode", "images are resized with Lanczos"),
    switch("train_text_encoder", "--tuner res text", "trains LoRA on the text encoder, see `--text.rank`"),
    same("train_batch_size", "--batch-size", "2", "per process, as there"),
    same("num_train_epochs", "--epochs", "5", "`--max_train_steps` takes precedence, as there"),
    same("max_train_steps", "--steps", "5"),
    same("checkpointing_steps", "--checkpoint-every", "5"),
    same("checkpoints_total_limit", "--checkpoints-kept", "3"),
    same("resume_from_checkpoint", "--resume", "latest", "only `latest`", _resume),
    same("gradient_accumulation_steps", "--gradient-accumulation-steps", "2"),
    switch("gradient_checkpointing", "--gradient-checkpointing"),
    same("learning_rate", "--learning-rate", "0.0001"),
    same("text_encoder_lr", "--text-learning-rate", "0.0001"),
    refused("scale_lr", "multiply --learning-rate by batch size, accumulation and processes", "nothing"),
    same("lr_scheduler", "--lr-scheduler", "cosine", "the default is `constant`"),
    same("lr_warmup_steps", "--lr-warmup-steps", "5", "left out for the schedule `constant`, as there"),
    same("lr_num_cycles", "--lr-num-cycles", "2"),
    same("lr_power", "--lr-power", "2.0"),
    same(
        "optimizer",
        "--optimizer",
        "AdamW",
        "",
        chosen("--optimizer", {name: name for name in ("adamw", "adamw8bit", "prodigy", "adafactor", "lion")}),
    ),
    switch("use_8bit_adam", "--optimizer adamw8bit"),
    only("adam_beta1", "0.9", _DEFAULT_BETAS),
    only("adam_beta2", "0.999", _DEFAULT_BETAS),
    only("adam_epsilon", "1e-8 1e-08 0.00000001", _DEFAULT_BETAS),
    same("adam_weight_decay", "--weight-decay", "0.01"),
    refused("adam_weight_decay_text_encoder", "--weight-decay applies to all parts"),
    refused("prodigy_beta3", "prodigy runs with its default beta3"),
    only("prodigy_decouple", "true", "prodigy runs with decoupled weight decay"),
    only("prodigy_use_bias_correction", "true", "prodigy runs with its own settings"),
    only("prodigy_safeguard_warmup", "true", "prodigy runs with its own settings"),
    same("max_grad_norm", "--max-grad-norm", "1.0", "", gradient_norm),
    same("snr_gamma", "--snr-gamma", "5.0"),
    same("prediction_type", "--prediction-type", "epsilon"),
    same("noise_offset", "--noise-offset", "0.1"),
    same("input_perturbation", "--input-perturbation", "0.1"),
    same("proportion_empty_prompts", "--caption-dropout", "0.1"),
    switch("use_ema", "--ema-decay 0.999"),
    same("mixed_precision", "--mixed-precision", "bf16", "the tuner's weights stay in fp32"),
    same("rank", "--res.width", "4", "trains LoRA on attention, unless `--tuner` or `--preset` is given"),
    same("lora_alpha", "--res.alpha", "4"),
    only("lora_dropout", "0 0.0", "LoRA has no dropout; use --caption-dropout"),
    refused("use_dora", "DoRA is not trained; leave the flag out for LoRA", "nothing"),
    same("report_to", "--log-with", "tensorboard", "", chosen("--log-with", LOGGERS)),
    *ignored("logging_dir", "logs are written to OUTPUT/logs"),
    *ignored("push_to_hub", "call `push_to_hub` in Python after training", "nothing"),
    *ignored("hub_token hub_model_id", "call `push_to_hub` in Python after training"),
    *ignored("dataloader_num_workers", "latents are encoded once, so no workers are needed"),
    *ignored("local_rank", "`accelerate launch` and `torchrun` set it by the environment"),
    *ignored("allow_tf32", "set torch.backends.cuda.matmul.allow_tf32 in Python", "nothing"),
    *ignored("enable_xformers_memory_efficient_attention", "PyTorch's attention saves the same memory", "nothing"),
    *ignored("enable_npu_flash_attention", "PyTorch's attention is used", "nothing"),
    *ignored("pre_compute_text_embeddings", "text is encoded once anyway", "nothing"),
    *ignored("debug_loss", "`metrics.jsonl` holds the loss by timestep", "nothing"),
    refused("tokenizer_max_length", "captions have the length of the tokenizer of --base"),
    refused("text_encoder_use_attention_mask", "CLIP is used without an attention mask", "nothing"),
)
